"""A request of the model `tensorrt_llm`, read from its tensors and checked for the embedded engine."""

from __future__ import annotations

from dataclasses import dataclass

from model_repo.ensemble.tensors import filled, one_prompt
from model_repo.ensemble.words import unpack
from model_repo.llm.contract import Sampling
from model_repo.llm.wire import BadRequestError, Inputs, flag, ids, number, whole

_NO_ENCODER = "the embedded engine runs decoder-only models"
_NO_TABLE = "the embedded engine takes no prompt embedding table"
_NO_LORA = "this package was built without LoRA adapters"
_NO_LOOKAHEAD = "the embedded engine has no lookahead decoding"
_NO_DRAFT = "the embedded engine verifies no draft tokens in this version"
_NO_RETENTION = "the embedded engine keeps cache blocks by use, not by priority"
_NO_GUIDE = "the embedded engine does no guided decoding"
_NO_BEAMS = "the embedded engine has no beam search"
_NO_DECAY = "the embedded engine keeps top_p as it is"
# Inputs that hold something are refused; upstream's ensemble and clients send some of them empty.
REFUSED: dict[str, str] = {
    "encoder_input_features": _NO_ENCODER,
    "encoder_output_lengths": _NO_ENCODER,
    "cross_attention_mask": _NO_ENCODER,
    "skip_cross_attn_blocks": _NO_ENCODER,
    "draft_input_ids": _NO_DRAFT,
    "draft_logits": _NO_DRAFT,
    "draft_acceptance_threshold": _NO_DRAFT,
    "embedding_bias": "the embedded engine adds nothing to logits by token",
    "runtime_top_p_min": _NO_DECAY,
    "runtime_top_p_decay": _NO_DECAY,
    "runtime_top_p_reset_ids": _NO_DECAY,
    "prompt_embedding_table": _NO_TABLE,
    "prompt_table_extra_ids": _NO_TABLE,
    "prompt_vocab_size": _NO_TABLE,
    "mrope_rotary_cos_sin": "the embedded engine computes rotary positions itself",
    "mrope_position_deltas": "the embedded engine computes rotary positions itself",
    "lora_task_id": _NO_LORA,
    "lora_weights": _NO_LORA,
    "lora_config": _NO_LORA,
    "context_phase_params": "the embedded engine does prompt and answer in one place",
    "retention_token_range_starts": _NO_RETENTION,
    "retention_token_range_ends": _NO_RETENTION,
    "retention_token_range_priorities": _NO_RETENTION,
    "retention_token_range_durations_ms": _NO_RETENTION,
    "retention_decode_priority": _NO_RETENTION,
    "retention_decode_duration_ms": _NO_RETENTION,
    "guided_decoding_guide_type": _NO_GUIDE,
    "guided_decoding_guide": _NO_GUIDE,
    "lookahead_window_size": _NO_LOOKAHEAD,
    "lookahead_ngram_size": _NO_LOOKAHEAD,
    "lookahead_verification_set_size": _NO_LOOKAHEAD,
}
# Each of these has one value that asks for nothing; clients send it as their default.
_ONLY: dict[str, tuple[float, str]] = {
    "beam_width": (1, _NO_BEAMS),
    "num_return_sequences": (1, "one answer a request is served; send a request for each, with other seeds"),
    "len_penalty": (1.0, _NO_BEAMS),
    "beam_search_diversity_rate": (0.0, _NO_BEAMS),
    "early_stopping": (0, _NO_BEAMS),
    "return_context_logits": (0, "the embedded engine returns log-probabilities, not logits"),
    "return_generation_logits": (0, "the embedded engine returns log-probabilities, not logits"),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for, in tokens, and what the configuration decides for all."""

    max_seq_len: int
    max_input_tokens: int
    max_output_tokens: int
    streaming: bool
    exclude_input_in_output: bool


@dataclass(frozen=True, slots=True)
class Inflight:
    """A request for tokens. `end_id` is the caller's own end token, None where the model's end an answer."""

    input_ids: tuple[int, ...]
    sampling: Sampling
    bad_words: tuple[tuple[int, ...], ...]
    end_id: int | None
    streaming: bool
    echo: bool
    return_log_probs: bool
    return_perf_metrics: bool
    return_num_input_tokens: bool
    return_num_output_tokens: bool


def parse(inputs: Inputs, limits: Limits, end_ids: tuple[int, ...]) -> Inflight:
    """The request that these tensors describe; `end_ids` are the model's own.

    Raises:
        BadRequestError: an input is malformed, too long, or asks for what the embedded engine does not do.
    """
    one_prompt(inputs)
    _refuse(inputs)
    streaming = flag(inputs, "streaming")
    if streaming and not limits.streaming:
        raise BadRequestError("streaming: this model was built without it (serving.streaming: false); send false")
    prompt = _prompt(inputs, limits)
    room = min(limits.max_output_tokens, limits.max_seq_len - len(prompt))
    wanted = whole(inputs, "request_output_len")
    if wanted is None or not 1 <= wanted <= room:
        raise BadRequestError(
            f"request_output_len: {wanted} after a prompt of {len(prompt)} tokens is out of range; ask for 1 to {room}"
        )
    own_end = whole(inputs, "end_id")
    end_id = None if own_end in end_ids else own_end
    return_log_probs = flag(inputs, "return_log_probs")
    return Inflight(
        input_ids=prompt,
        sampling=_sampling(inputs, wanted, end_id, logprobs=0 if return_log_probs else None),
        bad_words=unpack(inputs, "bad_words_list"),
        end_id=end_id,
        streaming=streaming,
        echo=not flag(inputs, "exclude_input_in_output", default=limits.exclude_input_in_output),
        return_log_probs=return_log_probs,
        return_perf_metrics=flag(inputs, "return_perf_metrics"),
        return_num_input_tokens=flag(inputs, "return_num_input_tokens"),
        return_num_output_tokens=flag(inputs, "return_num_output_tokens"),
    )


def _refuse(inputs: Inputs) -> None:
    for name, why in REFUSED.items():
        if filled(inputs.get(name)):
            raise BadRequestError(f"{name}: {why}; send the request without it")
    for name, (only, why) in _ONLY.items():
        value = number(inputs, name)
        if value is not None and value != only:
            raise BadRequestError(f"{name}: {why}; send {only:g} or leave it out")


def _prompt(inputs: Inputs, limits: Limits) -> tuple[int, ...]:
    """The first `input_lengths` tokens of `input_ids`."""
    tokens = ids(inputs, "input_ids")
    length = whole(inputs, "input_lengths")
    if length is None or not 1 <= length <= len(tokens):
        raise BadRequestError(f"input_lengths: {length} for {len(tokens)} input_ids; it says how many of them are read")
    if length > limits.max_input_tokens:
        raise BadRequestError(
            f"the prompt has {length} tokens and this model takes at most {limits.max_input_tokens}; shorten it"
        )
    return tokens[:length]


def _sampling(inputs: Inputs, room: int, end_id: int | None, *, logprobs: int | None) -> Sampling:
    top_p = number(inputs, "runtime_top_p")
    return Sampling(
        max_tokens=room,
        min_tokens=whole(inputs, "min_tokens") or 0,
        temperature=number(inputs, "temperature"),
        top_k=whole(inputs, "runtime_top_k"),
        # 0 means "not used" in upstream's clients (tensorrt_llm/1/model.py `get_sampling_config_from_request`).
        top_p=None if top_p == 0 else top_p,
        repetition_penalty=number(inputs, "repetition_penalty"),
        presence_penalty=number(inputs, "presence_penalty"),
        frequency_penalty=number(inputs, "frequency_penalty"),
        seed=whole(inputs, "seed"),
        # A caller's own end token takes the place of the model's; -1 is none at all.
        ignore_eos=end_id is not None,
        stop_token_ids=() if end_id is None or end_id == -1 else (end_id,),
        stop_words=unpack(inputs, "stop_words_list"),
        logprobs=logprobs,
    )
