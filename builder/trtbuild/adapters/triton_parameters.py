"""The parameters of TensorRT-LLM's own `tensorrt_llm` model: what each is called, how it is written, what it may hold.

Keys, defaults and what counts as unset, from NVIDIA/TensorRT-LLM triton_backend/: all_models/inflight_batcher_llm/
tensorrt_llm/config.pbtxt @2a9abd95 and @0c8de69a; inflight_batcher_llm/src/model_instance_state.cc @0c8de69a and
model_state.cc @5cdd6921 (the C++ backend); all_models/inflight_batcher_llm/tensorrt_llm/1/model.py @0d5352f5 (python).
An absent parameter is unset in both. Three are read by the C++ backend without a fallback
(`getGuidedDecodingConfigFromParams`): they must be there, and empty is unset.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from trtbuild.errors import Problem

EXECUTOR_WORKER = "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker"
_NOT_PARAMETERS = ("backend", "tensor_parallel_size", "pipeline_parallel_size")
MAY_BE_EMPTY = ("tokenizer_dir", "guided_decoding_backend", "xgrammar_tokenizer_info_path")
MANDATORY = ("gpt_model_type", "gpt_model_path", *MAY_BE_EMPTY)

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class EngineParameters:
    """What TensorRT-LLM reads from the configuration of `tensorrt_llm`; None is unset, and upstream's default holds.

    `backend` is ``tensorrtllm`` (C++) or ``python`` (the container's own model.py over the same executor). The fields
    after `pipeline_parallel_size` are parameters under their own names. Memory is in bytes, times are in milliseconds.
    `gpu_device_ids` and `participant_ids` hold one group of ids for each model instance.
    """

    gpt_model_path: str
    backend: Literal["tensorrtllm", "python"] = "tensorrtllm"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    max_beam_width: int = 1
    FORCE_CPU_ONLY_INPUT_TENSORS: str = "no"
    gpt_model_type: Literal["inflight_fused_batching", "V1"] = "inflight_fused_batching"
    encoder_model_path: str | None = None
    max_tokens_in_paged_kv_cache: int | None = None
    max_attention_window_size: tuple[int, ...] | None = None
    sink_token_length: int | None = None
    batch_scheduler_policy: Literal["guaranteed_no_evict", "max_utilization"] = "guaranteed_no_evict"
    kv_cache_free_gpu_mem_fraction: float | None = None
    cross_kv_cache_fraction: float | None = None
    kv_cache_host_memory_bytes: int = 0
    kv_cache_onboard_blocks: bool = True
    # Upstream's template leaves the prompt in whole answers and, by the executor, not in streamed ones.
    exclude_input_in_output: bool = True
    cancellation_check_period_ms: int = 100
    stats_check_period_ms: int = 100
    iter_stats_max_iterations: int = 1000
    request_stats_max_iterations: int = 0
    enable_kv_cache_reuse: bool = True
    normalize_log_probs: bool = True
    enable_chunked_context: bool = False
    gpu_device_ids: Groups | None = None
    participant_ids: Groups | None = None
    num_nodes: int = 1
    lora_cache_optimal_adapter_size: int = 8
    lora_cache_max_adapter_size: int = 64
    lora_cache_gpu_memory_fraction: float = 0.05
    lora_cache_host_memory_bytes: int = 1 << 30
    lora_prefetch_dir: str | None = None
    decoding_mode: str | None = None
    executor_worker_path: str = EXECUTOR_WORKER
    lookahead_window_size: int | None = None
    lookahead_ngram_size: int | None = None
    lookahead_verification_set_size: int | None = None
    medusa_choices: Groups | None = None
    eagle_choices: Groups | None = None
    gpu_weights_percent: float = 1.0
    enable_context_fmha_fp32_acc: bool = False
    multi_block_mode: bool = True
    cuda_graph_mode: bool = False
    cuda_graph_cache_size: int = 0
    speculative_decoding_fast_logits: bool | None = None
    tokenizer_dir: str | None = None
    guided_decoding_backend: Literal["xgrammar"] | None = None
    xgrammar_tokenizer_info_path: str | None = None

    @property
    def world_size(self) -> int:
        """How many GPUs one engine takes."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def written(self) -> dict[str, str]:
        """The parameters of config.pbtxt, in upstream's order."""
        values = {name: getattr(self, name) for name in KEYS}
        return {name: _text(name, value) for name, value in values.items() if value is not None or name in MAY_BE_EMPTY}

    def unset(self) -> list[str]:
        """The parameters that are left out."""
        return [name for name in KEYS if getattr(self, name) is None and name not in MAY_BE_EMPTY]


KEYS = (
    *("max_beam_width", "FORCE_CPU_ONLY_INPUT_TENSORS", "gpt_model_type", "gpt_model_path"),
    *(
        field.name
        for field in fields(EngineParameters)
        if field.name
        not in (
            *(*_NOT_PARAMETERS, "max_beam_width", "FORCE_CPU_ONLY_INPUT_TENSORS"),
            *("gpt_model_type", "gpt_model_path"),
        )
    ),
)


def from_runtime(runtime: Mapping[str, Any], gpt_model_path: str, **more: Any) -> EngineParameters:
    """The parameters that follow from a recipe's runtime section, whose names are the LLM API's.

    Args:
        runtime: ``tensor_parallel_size``, ``pipeline_parallel_size``, ``capacity_scheduler_policy``,
            ``enable_chunked_prefill`` and ``kv_cache`` with ``max_tokens``, ``free_gpu_memory_fraction`` and
            ``enable_block_reuse``.
        gpt_model_path: the engine directory as the server sees it, absolute.
        **more: further fields of `EngineParameters`.
    """
    cache = runtime["kv_cache"]
    values: dict[str, Any] = {
        "gpt_model_path": gpt_model_path,
        "tensor_parallel_size": runtime["tensor_parallel_size"],
        "pipeline_parallel_size": runtime["pipeline_parallel_size"],
        "batch_scheduler_policy": runtime["capacity_scheduler_policy"].lower(),
        "enable_chunked_context": runtime["enable_chunked_prefill"],
        "max_tokens_in_paged_kv_cache": cache["max_tokens"],
        "kv_cache_free_gpu_mem_fraction": cache["free_gpu_memory_fraction"],
        "enable_kv_cache_reuse": cache["enable_block_reuse"],
    }
    return EngineParameters(**values | more)


def _text(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if name in ("medusa_choices", "eagle_choices"):
        return ", ".join("{" + ", ".join(map(str, path)) + "}" for path in value)
    if name in ("gpu_device_ids", "participant_ids"):
        return ";".join(",".join(map(str, group)) for group in value)
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)


# What a parameter may hold: a pattern, and how to say it.
_COUNT = (r"\d+", "a whole number from 0")
_SIZE = (r"[1-9]\d*", "a whole number above 0")
_SHARE = (r"0?\.\d*[1-9]\d*|1(\.0*)?|\d(\.\d+)?e-\d+", "a number above 0, at most 1")
_BOOLEAN = (r"[Tt]rue|TRUE|1|[Ff]alse|FALSE|0", "true or false")
_PATH = (r"\S.*", "a path")
_IDS = (r"\d+(,\d+)*(;\d+(,\d+)*)*", "ids such as 0,1;2,3: commas in a group, semicolons between model instances")
_PATHS = (r"\{\d+(, ?\d+)*\}(, ?\{\d+(, ?\d+)*\})*", "paths such as {0, 0}, {0, 1}")
_MODES = ("top_k", "top_p", "top_k_top_p", "beam_search", "medusa", "redrafter", "lookahead", "eagle")
_ALLOWED: dict[str, tuple[str, str]] = {
    "max_beam_width": _SIZE,
    "FORCE_CPU_ONLY_INPUT_TENSORS": ("no|yes", "no or yes"),
    "gpt_model_type": ("inflight_fused_batching|inflight_batching|V1|v1", "inflight_fused_batching or V1"),
    "gpt_model_path": _PATH,
    "encoder_model_path": _PATH,
    "max_tokens_in_paged_kv_cache": _SIZE,
    "max_attention_window_size": (r"\d+(,\d+)*", "whole numbers with commas, repeated over the layers"),
    "sink_token_length": _COUNT,
    "batch_scheduler_policy": ("guaranteed_no_evict|max_utilization", "guaranteed_no_evict or max_utilization"),
    "kv_cache_free_gpu_mem_fraction": _SHARE,
    "cross_kv_cache_fraction": _SHARE,
    "kv_cache_host_memory_bytes": _COUNT,
    "kv_cache_onboard_blocks": _BOOLEAN,
    "exclude_input_in_output": _BOOLEAN,
    "cancellation_check_period_ms": _SIZE,
    "stats_check_period_ms": _SIZE,
    "iter_stats_max_iterations": _COUNT,
    "request_stats_max_iterations": _COUNT,
    "enable_kv_cache_reuse": _BOOLEAN,
    "normalize_log_probs": _BOOLEAN,
    "enable_chunked_context": _BOOLEAN,
    "gpu_device_ids": _IDS,
    "participant_ids": _IDS,
    "num_nodes": _SIZE,
    "lora_cache_optimal_adapter_size": _SIZE,
    "lora_cache_max_adapter_size": _SIZE,
    "lora_cache_gpu_memory_fraction": _SHARE,
    "lora_cache_host_memory_bytes": _COUNT,
    "lora_prefetch_dir": _PATH,
    "decoding_mode": ("|".join(_MODES), f"one of {', '.join(_MODES)}"),
    "executor_worker_path": _PATH,
    "lookahead_window_size": _SIZE,
    "lookahead_ngram_size": _SIZE,
    "lookahead_verification_set_size": _SIZE,
    "medusa_choices": _PATHS,
    "eagle_choices": _PATHS,
    "gpu_weights_percent": (r"0(\.\d+)?|1(\.0*)?|\.\d+", "a number from 0 to 1"),
    "enable_context_fmha_fp32_acc": _BOOLEAN,
    "multi_block_mode": _BOOLEAN,
    "cuda_graph_mode": _BOOLEAN,
    "cuda_graph_cache_size": _COUNT,
    "speculative_decoding_fast_logits": _BOOLEAN,
    "tokenizer_dir": _PATH,
    "guided_decoding_backend": ("xgrammar", "xgrammar"),
    "xgrammar_tokenizer_info_path": _PATH,
}
_GUIDED_NEED = ("xgrammar_tokenizer_info_path", "tokenizer_dir")
_LOOKAHEAD = ("lookahead_window_size", "lookahead_ngram_size", "lookahead_verification_set_size")


def parameter_problems(given: Mapping[str, str], where: str) -> list[Problem]:
    """Every parameter of a `tensorrt_llm` configuration that upstream would refuse, ignore or take otherwise.

    Args:
        given: the parameters by key; those of trtbuild itself are not among them.
        where: the configuration's name, for the sentences.
    """
    problems = [_unknown(name, where) for name in given if name not in _ALLOWED]
    problems += [
        Problem(where, f"parameter {name} is missing", f"write {_ALLOWED[name][1]}")
        for name in MANDATORY
        if name not in given
    ]
    for name, text in given.items():
        if name not in _ALLOWED or (not text and name in MAY_BE_EMPTY):
            continue
        pattern, allowed = _ALLOWED[name]
        if not text:
            problems.append(Problem(where, f"parameter {name} is empty", f"write {allowed}, or leave it out"))
        elif not re.fullmatch(pattern, text):
            problems.append(Problem(where, f"parameter {name} is {text!r}", f"allowed is {allowed}"))
    return problems + [Problem(where, *fault) for fault in _combinations(given)]


def device_problems(given: Mapping[str, str], where: str, world_size: int) -> list[Problem]:
    """Groups of GPU ids that do not give each of an engine's `world_size` ranks a GPU."""
    text = given.get("gpu_device_ids", "")
    return [
        Problem(
            where,
            f"gpu_device_ids gives {len(group.split(','))} GPUs in {group!r}, and the engine has {world_size} ranks",
            f"name {world_size}: tensor times pipeline parallel size",
        )
        for group in text.split(";")
        if re.fullmatch(_IDS[0], text) and len(group.split(",")) != world_size
    ]


def _unknown(name: str, where: str) -> Problem:
    close = difflib.get_close_matches(name, _ALLOWED, n=1)
    hint = f"did you mean {close[0]}?" if close else "remove it"
    return Problem(where, f"parameter {name} is none of TensorRT-LLM's and would be ignored", hint)


def _combinations(given: Mapping[str, str]) -> list[tuple[str, str]]:
    """Parameters that need or contradict each other."""
    faults = []
    if given.get("gpt_model_path", "/")[:1] != "/":
        message = f"gpt_model_path is {given['gpt_model_path']!r}, and a server looks for it from where it was started"
        faults.append((message, "write an absolute path, such as /package/engine"))
    mode = given.get("decoding_mode")
    present = [name for name in _LOOKAHEAD if given.get(name)]
    if (mode == "lookahead" or present) and len(present) < len(_LOOKAHEAD):
        missing = ", ".join(name for name in _LOOKAHEAD if name not in present)
        faults.append((f"lookahead decoding lacks {missing}", "write all three, or none with another decoding_mode"))
    if present and mode != "lookahead":
        faults.append((f"{present[0]} is set and decoding_mode is {mode}", "write decoding_mode: lookahead"))
    for name in ("medusa_choices", "eagle_choices"):
        wanted = name.removesuffix("_choices")
        if given.get(name) and mode != wanted:
            faults.append((f"{name} is set and decoding_mode is {mode}", f"write decoding_mode: {wanted}"))
    if given.get("max_beam_width", "1") != "1" and mode in ("top_k", "top_p", "top_k_top_p"):
        faults.append((f"max_beam_width is {given['max_beam_width']} and decoding_mode is {mode}", "use beam_search"))
    if given.get("guided_decoding_backend") and not any(given.get(name) for name in _GUIDED_NEED):
        message = "guided_decoding_backend is set without the tokenizer that it needs, and would be ignored"
        faults.append((message, "write xgrammar_tokenizer_info_path (C++ backend) or tokenizer_dir (python)"))
    for group in given.get("gpu_device_ids", "").split(";"):
        ids = group.split(",")
        if len(set(ids)) != len(ids):
            faults.append((f"gpu_device_ids names a GPU twice in {group!r}", "each rank has a GPU of its own"))
    return faults
