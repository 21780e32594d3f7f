"""A request in the LLM API's words, and what this version of TensorRT-LLM cannot do, refused by name.

TensorRT-LLM accepts every field of `SamplingParams` and ignores those that its sampler does not know. What the sampler
of an installation knows is read from the installation itself. Facts of NVIDIA/TensorRT-LLM:

- The sampler of 1.2 (tensorrt_llm/_torch/pyexecutor/sampler.py @28edbcdb) knows temperature, top_k, top_p and stop
  tokens; it counts the prompt as generated for min_tokens, and reports the likeliest tokens only, not the chosen one.
- Penalties (sampler/penalties.py), banned words and a right min_tokens (sampler/token_ban.py) and seeds
  (sampler/seed_manager.py) came in July and August 2026 (pull requests 16485, 16594, 17172). Before, they were
  "silently ignored". A seed holds for a request that is sampled alone: FlashInfer 0.6.15 reads one seed a batch.
- `sampler_type: TRTLLMSampler` (`enable_trtllm_sampler` in 1.0) takes the C++ sampler, which knows them; gone in 1.4.
- 0 log-probabilities mean "the chosen token's" since `SamplingParams` has `logprobs_simple_format`, and "none" before
  (tensorrt_llm/sampling_params.py @a98a9061); likewise for the prompt, whose own tokens were not reported before.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .contract import Guide, Sampling
from .wire import PREFIX, BadRequestError

_SAMPLER = "tensorrt_llm._torch.pyexecutor.sampler"
# Below this the division by the temperature leaves float32 no room: the request is greedy, as in the embedded engine.
_SMALLEST_TEMPERATURE = 1e-5
# Of `GuidedDecodingParams` (tensorrt_llm/sampling_params.py, the same five fields in 1.2 and in August 2026).
_GUIDE_FIELDS = {
    "json_schema": "json",
    "regex": "regex",
    "ebnf_grammar": "grammar",
    "structural_tag": "structural_tag",
}


@dataclass(frozen=True, slots=True)
class Abilities:
    """What the sampler of one installation does with a request."""

    version: str
    penalties: bool
    bad_words: bool
    min_tokens: bool
    min_p: bool
    seed: bool
    chosen_logprobs: bool
    prompt_logprobs: bool
    prompt_ignore_length: bool
    greedy_drafts: bool

    @classmethod
    def detect(cls, args: Mapping[str, Any]) -> Abilities:
        """Of the installed tensorrt_llm with these LLM arguments."""
        import tensorrt_llm
        from tensorrt_llm import SamplingParams

        names = {field.name for field in fields(SamplingParams)}
        greedy = inspect.signature(SamplingParams.params_imply_greedy_decoding).parameters
        cpp = args.get("sampler_type") == "TRTLLMSampler" or args.get("enable_trtllm_sampler") is True
        bans = cpp or _has("token_ban")
        return cls(
            version=str(tensorrt_llm.__version__),
            penalties=cpp or _has("penalties"),
            bad_words=bans,
            min_tokens=bans,
            min_p=cpp or "min_p" in greedy,
            seed=cpp or _has("seed_manager"),
            chosen_logprobs="logprobs_simple_format" in names,
            prompt_logprobs="prompt_logprobs_simple_format" in names,
            prompt_ignore_length="prompt_ignore_length" in names,
            greedy_drafts=_greedy_drafts(args.get("speculative_config")),
        )


@dataclass(frozen=True, slots=True)
class Model:
    """What a request is held against: the vocabulary's size and the tokens that end a text."""

    vocab_size: int
    ends: tuple[int, ...]


def _greedy_drafts(drafting: Any) -> bool:
    """Whether drafts are verified greedily whatever a request says: one engine for model and draft, unless told not to.

    tensorrt_llm/_torch/pyexecutor/py_executor_creator.py of 1.2 warns of it; later versions tell the two ways apart by
    `advanced_sampling_mode` and take `allow_advanced_sampling` no longer.
    """
    if not isinstance(drafting, Mapping) or drafting.get("allow_advanced_sampling"):
        return False
    kind = drafting.get("decoding_type")
    one = kind == "MTP" or (kind in ("Eagle", "Eagle3") and drafting.get("eagle3_one_model") is not False)
    return one and not _samples_drafts()


def _samples_drafts() -> bool:
    """Whether the installation samples with drafts unless told otherwise."""
    try:
        from tensorrt_llm.llmapi import llm_args
    except ImportError:
        return False
    return hasattr(llm_args, "AdvancedSamplingMode")


def is_greedy(sampling: Sampling) -> bool:
    """Whether the likeliest token is always taken."""
    asked = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    cold = sampling.temperature is not None and sampling.temperature < _SMALLEST_TEMPERATURE
    return all(value is None for value in asked) or cold or sampling.top_k == 1 or sampling.top_p == 0


def check(prompt: Sequence[int], sampling: Sampling, bad_words: Sequence[Sequence[int]], model: Model) -> None:
    """Hold every value against its range.

    Raises:
        BadRequestError: naming the input, its value and what is allowed.
    """
    most = sampling.max_tokens or 1
    _number("temperature", sampling.temperature, 0.0)
    _number("top_p", sampling.top_p, 0.0, 1.0)
    _number("min_p", sampling.min_p, 0.0, 1.0)
    _number("repetition_penalty", sampling.repetition_penalty, 0.0)
    if sampling.repetition_penalty == 0:
        raise BadRequestError(f"{PREFIX}repetition_penalty: 0 is out of range; it is above 0, and 1 means no penalty")
    _number("presence_penalty", sampling.presence_penalty, -math.inf)
    _number("frequency_penalty", sampling.frequency_penalty, -math.inf)
    _whole("min_tokens", sampling.min_tokens, most)
    _whole("top_k", sampling.top_k, None)
    _whole("logprobs", sampling.logprobs, model.vocab_size)
    _whole("prompt_logprobs", sampling.prompt_logprobs, model.vocab_size)
    _ids("input_ids", prompt, model.vocab_size)
    _ids(f"{PREFIX}stop_token_ids", sampling.stop_token_ids, model.vocab_size)
    for word in bad_words:
        _ids(f"{PREFIX}bad", word, model.vocab_size)


def refuse(sampling: Sampling, bad_words: Sequence[Sequence[int]], model: Model, can: Abilities) -> None:
    """Refuse what this installation would ignore.

    Raises:
        BadRequestError: naming the input and the version.
    """
    penalties = {
        "repetition_penalty": sampling.repetition_penalty not in (None, 1.0),
        "presence_penalty": bool(sampling.presence_penalty),
        "frequency_penalty": bool(sampling.frequency_penalty),
    }
    ignored = {name: asked and not can.penalties for name, asked in penalties.items()} | {
        "bad": bool(bad_words) and not can.bad_words,
        "min_tokens": sampling.min_tokens > 0 and not can.min_tokens,
        "min_p": bool(sampling.min_p) and not can.min_p,
        "seed": sampling.seed is not None and not is_greedy(sampling) and not can.seed,
    }
    for name, is_ignored in ignored.items():
        if is_ignored:
            raise BadRequestError(
                f"{PREFIX}{name}: the sampler of TensorRT-LLM {can.version} would ignore it; leave it out"
            )
    if sampling.logprobs is not None and not can.chosen_logprobs and not is_greedy(sampling):
        raise BadRequestError(
            f"{PREFIX}logprobs: TensorRT-LLM {can.version} reports the likeliest tokens only and not a sampled one; "
            "send temperature 0, or the request without it"
        )
    if can.greedy_drafts and not is_greedy(sampling):
        raise BadRequestError(
            f"{PREFIX}temperature: TensorRT-LLM {can.version} verifies this package's drafts greedily and would not "
            "sample; send temperature 0, or leave out temperature, top_k, top_p and min_p"
        )
    # Only the first end-of-text token is held back (token_ban.py @0a1f13c0, `_add_min_length_bans`).
    if sampling.min_tokens > 0 and not sampling.ignore_eos and (sampling.stop_token_ids or len(model.ends) > 1):
        raise BadRequestError(
            f"{PREFIX}min_tokens: TensorRT-LLM holds back one end-of-text token only, and this request has more tokens "
            "that end it; send the request without it"
        )


def arguments(
    prompt: Sequence[int], sampling: Sampling, bad_words: Sequence[Sequence[int]], model: Model, can: Abilities
) -> dict[str, Any]:
    """The keywords of `SamplingParams` for a request that passed `check` and `refuse`."""
    ends = () if sampling.ignore_eos else model.ends[1:]
    stops = [*dict.fromkeys((*sampling.stop_token_ids, *ends))]
    values: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "end_id": model.ends[0] if model.ends else None,
        "stop_token_ids": stops or None,
        # Else the stop token is cut off the ids at the end (executor/result.py @a678b91a, `_handle_sequence`).
        "include_stop_str_in_output": True,
        "ignore_eos": sampling.ignore_eos,
        "min_tokens": sampling.min_tokens or None,
        "detokenize": False,
        "return_perf_metrics": sampling.perf_metrics,
        **_choosing(sampling),
        **_penalties(prompt, sampling, can),
    }
    if sampling.logprobs is not None:
        values["logprobs"] = sampling.logprobs if can.chosen_logprobs else max(sampling.logprobs, 1)
    if sampling.prompt_logprobs is not None:
        values |= (
            {"prompt_logprobs": sampling.prompt_logprobs} if can.prompt_logprobs else {"return_context_logits": True}
        )
    if bad_words:
        values["bad"] = list(sampling.bad)
    return {name: value for name, value in values.items() if value is not None}


def guided(guide: Guide) -> dict[str, Any]:
    """The keywords of `GuidedDecodingParams`."""
    return {"json_object": True} if guide.kind == "json" else {_GUIDE_FIELDS[guide.kind]: guide.text}


def _choosing(sampling: Sampling) -> dict[str, Any]:
    if is_greedy(sampling):
        return {"top_k": 1}
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p or None,
        # The sampler keeps seeds as int64 (seed_manager.py @2341856e).
        "seed": None if sampling.seed is None else sampling.seed % 2**63,
    }


def _penalties(prompt: Sequence[int], sampling: Sampling, can: Abilities) -> dict[str, Any]:
    values: dict[str, Any] = {
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
    }
    if can.prompt_ignore_length and (sampling.presence_penalty or sampling.frequency_penalty):
        values["prompt_ignore_length"] = len(prompt)  # these two count what was generated, in both runtimes
    return values


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(f"{_SAMPLER}.{module}") is not None
    except ModuleNotFoundError:  # the sampler is one file in older versions
        return False


def _whole(name: str, value: int | None, most: int | None) -> None:
    if value is not None and (value < 0 or (most is not None and value > most)):
        limit = "of at least 0" if most is None else f"from 0 to {most}"
        raise BadRequestError(f"{PREFIX}{name}: {value} is out of range; send a whole number {limit}")


def _number(name: str, value: float | None, low: float, high: float = math.inf) -> None:
    if value is None or (math.isfinite(value) and low <= value <= high):
        return
    limit = f"from {low:g} to {high:g}" if math.isfinite(high) else "that is finite"
    if math.isfinite(low) and not math.isfinite(high):
        limit = f"of at least {low:g}"
    raise BadRequestError(f"{PREFIX}{name}: {value!r} is out of range; send a number {limit}")


def _ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    for where, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise BadRequestError(
                f"{name}[{where}]: {token} is no token of this model; send numbers from 0 to {vocab_size - 1}"
            )
