"""The tensors of the `ensemble` layout that trtbuild's own code answers: names, types, one prompt a request.

Names and types are those of TensorRT-LLM's `inflight_batcher_llm` model repository (NVIDIA/TensorRT-LLM,
triton_backend/all_models/inflight_batcher_llm, config.pbtxt of each model @2a9abd95, @08dc37e3, @0193dbd4). They have a
batch dimension in front: every tensor of one prompt has one row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model_repo.llm.wire import Array, BadRequestError, Inputs

PERF_METRICS: dict[str, str] = {
    "kv_cache_alloc_new_blocks": "TYPE_INT32",
    "kv_cache_reused_blocks": "TYPE_INT32",
    "kv_cache_alloc_total_blocks": "TYPE_INT32",
    "arrival_time_ns": "TYPE_INT64",
    "first_scheduled_time_ns": "TYPE_INT64",
    "first_token_time_ns": "TYPE_INT64",
    "last_token_time_ns": "TYPE_INT64",
    "acceptance_rate": "TYPE_FP32",
    "total_accepted_draft_tokens": "TYPE_INT32",
    "total_draft_tokens": "TYPE_INT32",
}
# What every model from the engine to the client hands on unchanged.
PASSED_ON: dict[str, str] = {
    "cum_log_probs": "TYPE_FP32",
    "output_log_probs": "TYPE_FP32",
    "context_logits": "TYPE_FP32",
    "generation_logits": "TYPE_FP32",
    "batch_index": "TYPE_INT32",
    "sequence_index": "TYPE_INT32",
    **PERF_METRICS,
    "num_input_tokens": "TYPE_INT32",
    "num_output_tokens": "TYPE_INT32",
}
ENGINE_OUTPUTS: dict[str, str] = {
    "output_ids": "TYPE_INT32",
    "sequence_length": "TYPE_INT32",
    "context_phase_params": "TYPE_UINT8",
    "context_ids": "TYPE_INT32",
    "finished": "TYPE_BOOL",
    **PASSED_ON,
}
CLIENT_OUTPUTS: dict[str, str] = {"text_output": "TYPE_STRING", **PASSED_ON}


def one_prompt(inputs: Inputs) -> None:
    """Refuse a batch of prompts in one request.

    Raises:
        BadRequestError: an input has not exactly one row.
    """
    for name, array in inputs.items():
        if array.ndim and array.shape[0] != 1:
            raise BadRequestError(
                f"{name}: a batch of {array.shape[0]} prompts in one request is not served; send a request for each "
                "prompt: they are batched in flight"
            )


def renamed(inputs: Inputs, names: Mapping[str, str]) -> dict[str, Array]:
    """The inputs under other names; those that `names` does not list stay away."""
    return {names[name]: array for name, array in inputs.items() if name in names}


def filled(array: Any) -> bool:
    """Whether an input was given and holds anything: in an ensemble, what nobody gave comes as an empty tensor."""
    return array is not None and array.size > 0
