"""What the two layouts call a request's inputs, of which type they are, and which layout a served model has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trtbuild.errors import RequestError

LLM, ENSEMBLE = "llm", "ensemble"
# Not a layout of its own: the model `tensorrt_llm` of layout ensemble, which takes and gives token ids.
ENGINE = "engine"
# Types on the wire of what a caller may send; everything else is an output or unknown.
_TYPES = {bool: "BOOL", int: "INT32", float: "FP32", str: "BYTES"}
_EXACT_TYPES = {"sampling_param_seed": "UINT64", "seed": "UINT64", "lora_id": "UINT64", "lora_task_id": "UINT64"}
_FLOATS = (
    *("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("length_penalty", "embedding_bias_weights"),
)
# The inputs of layout ensemble that a caller may name: those of TensorRT-LLM's inflight_batcher_llm repository.
_ENSEMBLE_INPUTS = (
    *("text_input", "messages", "max_tokens", "bad_words", "stop_words", "exclude_input_in_output", "end_id", "pad_id"),
    *("top_k", "top_p", "temperature", "length_penalty", "repetition_penalty", "min_tokens", "presence_penalty"),
    *("frequency_penalty", "seed", "return_log_probs", "return_context_logits", "return_generation_logits"),
    *("return_perf_metrics", "return_num_input_tokens", "return_num_output_tokens", "num_return_sequences"),
    *("beam_width", "embedding_bias_words", "embedding_bias_weights", "lora_task_id", "num_draft_tokens"),
    *("use_draft_logits", "guided_decoding_guide_type", "guided_decoding_guide", "request_id"),
)
# What layout llm calls otherwise.
_ENSEMBLE_NAMES = {
    "stop": "stop_words",
    "bad": "bad_words",
    "return_cumulative_logprob": "return_log_probs",
    "sampling_param_exclude_input_from_output": "exclude_input_in_output",
}


# What this client asks of layout ensemble besides, to count tokens.
COUNTS = frozenset(("return_num_input_tokens", "return_num_output_tokens"))


def request_inputs(
    prompt: str | Sequence[Mapping[str, Any]] | None, *, streaming: bool, layout: str = LLM, **inputs: Any
) -> dict[str, Any]:
    """The inputs of one request by their names on the wire, with every short report switched on.

    The engine's model gets ``input_ids`` and ``max_tokens`` alone.

    Raises:
        RequestError: the layout has no such input.
    """
    if layout == ENGINE:
        ids, limit = list(inputs["input_ids"]), inputs["max_tokens"]
        return {"input_ids": ids, "input_lengths": len(ids), "request_output_len": limit, "streaming": streaming}
    if layout == ENSEMBLE:
        sent: dict[str, Any] = dict.fromkeys(sorted(COUNTS), True) | {"stream": streaming}
        named = {_ensemble_name(name): value for name, value in inputs.items() if value is not None}
    else:
        sent = {"return_finish_reason": True, "return_stop_reason": True, "streaming": streaming}
        named = {_llm_name(name): value for name, value in inputs.items() if value is not None}
    if isinstance(prompt, str):
        sent["text_input"] = prompt
    elif prompt is not None:
        sent["messages"] = json.dumps(list(prompt), ensure_ascii=False)
    return sent | named


def wire_type(name: str, values: Sequence[Any]) -> str:
    """The KServe type of an input.

    Raises:
        RequestError: its value has none.
    """
    if name in _EXACT_TYPES:
        return _EXACT_TYPES[name]
    if name.removeprefix("sampling_param_") in _FLOATS:
        return "FP32"
    if not values:
        return "INT32"
    kind = _TYPES.get(type(values[0]))
    if kind is None:
        raise RequestError(f"{name}: {values[0]!r} is neither a truth value, a number nor text")
    return kind


def layout_of(input_names: Sequence[str]) -> str | None:
    """The layout of a model that takes text, by its inputs; None for a model that does not."""
    if "sampling_param_max_tokens" in input_names:
        return LLM
    return ENSEMBLE if "max_tokens" in input_names else None


def _llm_name(name: str) -> str:
    exact = ("text_input", "messages", "input_ids", "streaming", "streaming_cumulative", "image_url", "request_id")
    as_it_is = name in exact or name.startswith(("sampling_param_", "return_", "guided_decoding_", "lora_"))
    return name if as_it_is else f"sampling_param_{name}"


def _ensemble_name(name: str) -> str:
    known = _ENSEMBLE_NAMES.get(name, name.removeprefix("sampling_param_"))
    if known not in _ENSEMBLE_INPUTS:
        raise RequestError(f"{name}: the models of layout ensemble have no such input", "see their config.pbtxt")
    return known
