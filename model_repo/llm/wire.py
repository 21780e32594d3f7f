"""The tensors of the `llm` layout: their names and types, how one is read, how one is made.

Names and types are those of TensorRT-LLM's `llmapi` model repository, with the additions that its clients lack (chat
messages, token ids, more sampling parameters, log-probabilities).
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Inputs: TypeAlias = Mapping[str, Array]
PREFIX = "sampling_param_"

# What every input holds; a request gives one element unless the type is a list.
INPUTS: dict[str, str] = {
    "text_input": "TYPE_STRING",
    "messages": "TYPE_STRING",
    "input_ids": "TYPE_INT32",
    "streaming": "TYPE_BOOL",
    "streaming_cumulative": "TYPE_BOOL",
    "stop": "TYPE_BOOL",
    "sampling_param_best_of": "TYPE_INT32",
    "sampling_param_n": "TYPE_INT32",
    "sampling_param_temperature": "TYPE_FP32",
    "sampling_param_top_k": "TYPE_INT32",
    "sampling_param_top_p": "TYPE_FP32",
    "sampling_param_min_p": "TYPE_FP32",
    "sampling_param_frequency_penalty": "TYPE_FP32",
    "sampling_param_presence_penalty": "TYPE_FP32",
    "sampling_param_repetition_penalty": "TYPE_FP32",
    "sampling_param_max_tokens": "TYPE_INT32",
    "sampling_param_min_tokens": "TYPE_INT32",
    "sampling_param_stop": "TYPE_STRING",
    "sampling_param_stop_token_ids": "TYPE_INT32",
    "sampling_param_bad": "TYPE_STRING",
    "sampling_param_ignore_eos": "TYPE_BOOL",
    "sampling_param_seed": "TYPE_UINT64",
    "sampling_param_logprobs": "TYPE_INT32",
    "sampling_param_prompt_logprobs": "TYPE_INT32",
    "sampling_param_exclude_input_from_output": "TYPE_BOOL",
    "sampling_param_return_perf_metrics": "TYPE_BOOL",
    "sampling_param_logits_post_processor_name": "TYPE_STRING",
    "return_finish_reason": "TYPE_BOOL",
    "return_stop_reason": "TYPE_BOOL",
    "return_cumulative_logprob": "TYPE_BOOL",
    "guided_decoding_guide_type": "TYPE_STRING",
    "guided_decoding_guide": "TYPE_STRING",
    "image_url": "TYPE_STRING",
    "lora_id": "TYPE_UINT64",
    "lora_name": "TYPE_STRING",
    "lora_path": "TYPE_STRING",
    "lora_ckpt_source": "TYPE_STRING",
}
OUTPUTS: dict[str, str] = {
    "text_output": "TYPE_STRING",
    "output_ids": "TYPE_INT32",
    "finish_reason": "TYPE_STRING",
    "stop_reason": "TYPE_STRING",
    "cumulative_logprob": "TYPE_FP32",
    "logprobs": "TYPE_STRING",
    "prompt_logprobs": "TYPE_STRING",
    "num_input_tokens": "TYPE_INT32",
    "num_output_tokens": "TYPE_INT32",
    "kv_cache_reused_block": "TYPE_INT32",
    "kv_cache_missed_block": "TYPE_INT32",
    "kv_cache_alloc_new_blocks": "TYPE_INT32",
    "kv_cache_alloc_total_blocks": "TYPE_INT32",
    "kv_cache_hit_rate": "TYPE_FP32",
    "arrival_time_ns": "TYPE_INT64",
    "first_scheduled_time_ns": "TYPE_INT64",
    "first_token_time_ns": "TYPE_INT64",
    "last_token_time_ns": "TYPE_INT64",
    "acceptance_rate": "TYPE_FP32",
    "total_accepted_draft_tokens": "TYPE_INT32",
    "total_draft_tokens": "TYPE_INT32",
}
_DTYPES: dict[str, Any] = {
    "TYPE_STRING": np.object_,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_FP32": np.float32,
    "TYPE_UINT8": np.uint8,
    "TYPE_BOOL": np.bool_,
}


class BadRequestError(Exception):
    """A request that cannot be served; the text says which input, what is allowed and what to change."""


def flag(inputs: Inputs, name: str, *, default: bool = False) -> bool:
    """The one truth value of an input.

    Raises:
        BadRequestError: it has more or fewer elements.
    """
    value = _one(inputs, name)
    return default if value is None else bool(value)


def whole(inputs: Inputs, name: str) -> int | None:
    """The one whole number of an input, None where it is not given.

    Raises:
        BadRequestError: it has more or fewer elements.
    """
    value = _one(inputs, name)
    return None if value is None else int(value)


def refuse_misnamed(parameters: str) -> None:
    """Refuse what was meant as an input: Triton's HTTP `generate` makes parameters of names that it does not know.

    Args:
        parameters: the request's parameters as JSON, as Triton's python backend gives them.

    Raises:
        BadRequestError: one is spelled like an input, or like one without its prefix; a gateway's own are left alone.
    """
    known = {name.removeprefix(PREFIX): name for name in INPUTS}
    for name in json.loads(parameters or "{}"):
        meant = difflib.get_close_matches(name.removeprefix(PREFIX), known, n=1, cutoff=0.8)
        if meant or name.startswith(PREFIX):
            hint = f"did you mean {known[meant[0]]}?" if meant else "see the model's metadata for those it has"
            raise BadRequestError(f"{name}: this model has no such input; {hint}")


def tensors(
    values: Mapping[str, Sequence[Any]], wanted: frozenset[str], declared: Mapping[str, str] = OUTPUTS
) -> list[tuple[str, Array]]:
    """The values that were asked for as arrays of their `declared` types; text becomes UTF-8."""
    made = []
    for name, items in values.items():
        if name not in wanted:
            continue
        dtype = _DTYPES[declared[name]]
        encoded = [item.encode("utf-8", "replace") for item in items] if dtype is np.object_ else items
        made.append((name, np.array(encoded, dtype=dtype)))
    return made


def logprob_json(token_id: int, logprob: float, rank: int, top: Sequence[tuple[int, float]]) -> str:
    """One token's log-probability as JSON; JSON knows no infinity, so an impossible token has null."""
    entry: dict[str, Any] = {"token_id": token_id, "logprob": _finite(logprob), "rank": rank}
    if top:
        entry["top"] = [{"token_id": other, "logprob": _finite(value)} for other, value in top]
    return json.dumps(entry)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _one(inputs: Inputs, name: str) -> Any:
    array = inputs.get(name)
    if array is None:
        return None
    if array.size != 1:
        raise BadRequestError(f"{name}: {array.size} elements are given; send exactly one")
    return array.reshape(-1)[0]


def number(inputs: Inputs, name: str) -> float | None:
    """The one number of an input, None where it is not given.

    Raises:
        BadRequestError: it has more or fewer elements.
    """
    value = _one(inputs, name)
    return None if value is None else float(value)


def ids(inputs: Inputs, name: str) -> tuple[int, ...]:
    """All whole numbers of an input; none where it is not given."""
    array = inputs.get(name)
    return () if array is None else tuple(array.reshape(-1).tolist())


def text(inputs: Inputs, name: str) -> str | None:
    """The one text of an input, None where it is not given.

    Raises:
        BadRequestError: it has more or fewer elements, or is not UTF-8.
    """
    value = _one(inputs, name)
    return None if value is None else _decoded(value, name)


def words(inputs: Inputs, name: str) -> tuple[str, ...]:
    """All texts of an input; none where it is not given.

    Raises:
        BadRequestError: one of them is empty or not UTF-8.
    """
    array = inputs.get(name)
    if array is None:
        return ()
    found = tuple(_decoded(value, f"{name}[{place}]") for place, value in enumerate(array.reshape(-1)))
    if "" in found:
        raise BadRequestError(f"{name}[{found.index('')}]: an empty string matches everywhere; leave it out")
    return found


def _decoded(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    try:
        return bytes(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequestError(f"{where}: byte {error.start} is not valid UTF-8; send UTF-8 text") from error


def messages(inputs: Inputs) -> list[dict[str, Any]] | None:
    """The chat messages of a request, None where there are none; text parts of one message are joined.

    Raises:
        BadRequestError: they are no JSON list of messages with a role and text.
    """
    value = text(inputs, "messages")
    if value is None:
        return None
    shape = 'send a JSON list such as [{"role": "user", "content": "..."}]'
    try:
        found = json.loads(value)
    except ValueError as error:
        raise BadRequestError(f"messages: not valid JSON ({error}); {shape}") from error
    if not isinstance(found, list) or not found:
        raise BadRequestError(f"messages: not a list with at least one message; {shape}")
    return [_message(message, f"messages[{place}]", shape) for place, message in enumerate(found)]


def _message(message: Any, where: str, shape: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRequestError(f"{where}: not an object with a role; {shape}")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{place}]") for place, part in enumerate(content))
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise BadRequestError(f"{where}.content: neither text nor a list of text parts; {shape}")
    return {**message, "content": content}


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise BadRequestError(f'{where}: this model reads text only; send {{"type": "text", "text": "..."}}')
