"""A request of the `llm` layout, read from its tensors and checked; nothing here knows a runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .wire import BadRequestError, Inputs, flag, ids, messages, number, text, whole, words

_PROMPTS = ("text_input", "messages", "input_ids")
_MAX_CHOICES = 64
_GUIDES = ("json", "json_schema", "regex", "ebnf_grammar", "structural_tag")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for, in tokens, and whether the model may stream."""

    max_seq_len: int
    max_input_tokens: int
    max_output_tokens: int
    default_max_tokens: int
    streaming: bool


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA adapter: one of the package by its `name`, or one that the client brings, with `id` and `path` too."""

    name: str
    id: int | None = None
    path: str | None = None
    source: str = "hf"


@dataclass(frozen=True, slots=True)
class Guide:
    """What the answer must conform to; `text` is empty for the kind ``json``."""

    kind: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen and what is reported of them; None: the runtime's default."""

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    bad: tuple[str, ...] = ()
    # Token sequences that end the answer inside the engine; stop strings of this layout are found in the text instead.
    stop_words: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    lora: Lora | None = None
    guide: Guide | None = None
    perf_metrics: bool = False
    # Whether somebody looks at an output before the last one.
    every_output: bool = True


@dataclass(frozen=True, slots=True)
class Generate:
    """A request for text: exactly one of `text`, `messages` and `input_ids` is given."""

    text: str | None
    messages: list[dict[str, Any]] | None
    input_ids: tuple[int, ...] | None
    sampling: Sampling
    stop: tuple[str, ...] = ()
    choices: int = 1
    streaming: bool = False
    cumulative: bool = False
    echo: bool = False
    return_finish_reason: bool = False
    return_stop_reason: bool = False
    return_cumulative_logprob: bool = False
    return_perf_metrics: bool = False

    @property
    def every_output(self) -> bool:
        """Whether the answer is looked at before its end: it is streamed, or its text is searched for stop strings."""
        return self.streaming or bool(self.stop)

    def for_engine(self, room: int, choice: int) -> Sampling:
        """What the engine is asked for one of the answers: answers to one seed differ, and so can be told apart."""
        sampling = self.sampling
        logprobs = sampling.logprobs
        if logprobs is None and self.return_cumulative_logprob:
            logprobs = 0
        seed = None if sampling.seed is None else (sampling.seed + choice) % 2**64
        return replace(
            sampling,
            max_tokens=room,
            seed=seed,
            logprobs=logprobs,
            perf_metrics=self.return_perf_metrics,
            every_output=self.every_output,
        )


def parse(inputs: Inputs, limits: Limits, refused: Mapping[str, str]) -> Generate:
    """The request that these tensors describe; `refused` names the inputs that this runtime cannot serve, and why.

    Raises:
        BadRequestError: an input is malformed, contradicts another, or asks for what this model does not do.
    """
    for name, why in refused.items():
        if name in inputs:
            raise BadRequestError(f"{name}: {why}; send the request without it")
    best_of = whole(inputs, "sampling_param_best_of")
    if best_of not in (None, 1):
        raise BadRequestError(f"sampling_param_best_of: {best_of} is not served; leave it out or send 1")
    given = [name for name in _PROMPTS if name in inputs]
    if len(given) != 1:
        what = f"{' and '.join(given)} are given together" if given else "no prompt is given"
        raise BadRequestError(f"{what}; send exactly one of {', '.join(_PROMPTS)}")
    request = Generate(
        text=text(inputs, "text_input"),
        messages=messages(inputs),
        input_ids=ids(inputs, "input_ids") if "input_ids" in inputs else None,
        sampling=_sampling(inputs),
        stop=words(inputs, "sampling_param_stop"),
        choices=_choices(inputs),
        streaming=flag(inputs, "streaming"),
        cumulative=flag(inputs, "streaming_cumulative"),
        echo=not flag(inputs, "sampling_param_exclude_input_from_output", default=True),
        return_finish_reason=flag(inputs, "return_finish_reason"),
        return_stop_reason=flag(inputs, "return_stop_reason"),
        return_cumulative_logprob=flag(inputs, "return_cumulative_logprob"),
        return_perf_metrics=flag(inputs, "sampling_param_return_perf_metrics"),
    )
    _check_streaming(request, limits)
    return request


def max_tokens(request: Generate, prompt_tokens: int, limits: Limits) -> int:
    """How many tokens may be generated after a prompt of this length.

    Raises:
        BadRequestError: the prompt is empty or too long, or more tokens are asked for than there is room.
    """
    if prompt_tokens == 0:
        raise BadRequestError("the prompt holds no token; send some text")
    if prompt_tokens > limits.max_input_tokens:
        raise BadRequestError(
            f"the prompt has {prompt_tokens} tokens and this model takes at most {limits.max_input_tokens}; shorten it"
        )
    room = min(limits.max_output_tokens, limits.max_seq_len - prompt_tokens)
    wanted = request.sampling.max_tokens
    if wanted is None:
        return max(min(limits.default_max_tokens, room), 1)
    if not 1 <= wanted <= limits.max_output_tokens:
        raise BadRequestError(
            f"sampling_param_max_tokens: {wanted} is out of range; ask for 1 to {limits.max_output_tokens} tokens"
        )
    if wanted > room:
        raise BadRequestError(
            f"sampling_param_max_tokens: {wanted} after a prompt of {prompt_tokens} tokens exceeds the model's "
            f"sequence length {limits.max_seq_len}; ask for at most {room} tokens or shorten the prompt"
        )
    return wanted


def _sampling(inputs: Inputs) -> Sampling:
    return Sampling(
        max_tokens=whole(inputs, "sampling_param_max_tokens"),
        min_tokens=whole(inputs, "sampling_param_min_tokens") or 0,
        temperature=number(inputs, "sampling_param_temperature"),
        top_k=whole(inputs, "sampling_param_top_k"),
        top_p=number(inputs, "sampling_param_top_p"),
        min_p=number(inputs, "sampling_param_min_p"),
        repetition_penalty=number(inputs, "sampling_param_repetition_penalty"),
        presence_penalty=number(inputs, "sampling_param_presence_penalty"),
        frequency_penalty=number(inputs, "sampling_param_frequency_penalty"),
        seed=whole(inputs, "sampling_param_seed"),
        ignore_eos=flag(inputs, "sampling_param_ignore_eos"),
        stop_token_ids=ids(inputs, "sampling_param_stop_token_ids"),
        bad=words(inputs, "sampling_param_bad"),
        logprobs=whole(inputs, "sampling_param_logprobs"),
        prompt_logprobs=whole(inputs, "sampling_param_prompt_logprobs"),
        lora=_lora(inputs),
        guide=_guide(inputs),
    )


def _lora(inputs: Inputs) -> Lora | None:
    name, path, source = text(inputs, "lora_name"), text(inputs, "lora_path"), text(inputs, "lora_ckpt_source")
    number = whole(inputs, "lora_id")
    if (name, path, number, source) == (None, None, None, None):
        return None
    if name is None or (path is None) != (number is None) or (source is not None and path is None):
        raise BadRequestError(
            "lora_name: send it alone for an adapter of this package, or with lora_id and lora_path (and "
            "lora_ckpt_source) for one that lies on the server"
        )
    if source not in (None, "hf", "nemo"):
        raise BadRequestError(f"lora_ckpt_source: {source!r} is not known; send hf or nemo")
    return Lora(name, number, path, source or "hf")


def _guide(inputs: Inputs) -> Guide | None:
    kind, guide = text(inputs, "guided_decoding_guide_type"), text(inputs, "guided_decoding_guide") or ""
    if kind is None:
        if guide:
            raise BadRequestError("guided_decoding_guide: its type is missing; send guided_decoding_guide_type with it")
        return None
    if kind not in _GUIDES:
        raise BadRequestError(f"guided_decoding_guide_type: {kind!r} is not known; send one of {', '.join(_GUIDES)}")
    if (kind == "json") == bool(guide):
        what = "json takes no guide; leave it out" if guide else f"{kind} needs one; send it as text"
        raise BadRequestError(f"guided_decoding_guide: {what}")
    if kind == "json_schema":
        try:
            schema = json.loads(guide)
        except ValueError as error:
            raise BadRequestError(f"guided_decoding_guide: not valid JSON ({error}); send a JSON schema") from error
        if not isinstance(schema, dict):
            raise BadRequestError("guided_decoding_guide: not a JSON object; send a JSON schema")
    return Guide(kind, guide)


def _choices(inputs: Inputs) -> int:
    count = whole(inputs, "sampling_param_n")
    if count is None:
        return 1
    if not 1 <= count <= _MAX_CHOICES:
        raise BadRequestError(f"sampling_param_n: {count} is out of range; ask for 1 to {_MAX_CHOICES} answers")
    return count


def _check_streaming(request: Generate, limits: Limits) -> None:
    if not request.streaming:
        return
    if not limits.streaming:
        raise BadRequestError("streaming: this model was built without it (serving.streaming: false); send false")
    if request.choices > 1:
        raise BadRequestError("sampling_param_n: several answers cannot be streamed; send 1, or streaming false")
