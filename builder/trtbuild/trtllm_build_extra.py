"""``runtime.extra`` of a recipe for TensorRT engines: flags of ``trtllm-build`` that no field of the recipe decides."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from trtbuild.build_flags import Flag, FlagTable, elsewhere
from trtbuild.errors import Problem
from trtbuild.llm_schema import load_schema, schema_names

_SCRIPT = ("the build script says it", "remove it")
_DRAFTS = ("speculative.method says it", "set it there")
_ADAPTERS = ("model.adapters says it", "set it there")
_PACKED = ("in-flight batching needs it as it is", "remove it")
_CHECKPOINT = ("the converted checkpoint says it", "remove it")
_DIVISION = ("the parallel sizes say it", "remove it")
_NO_ENGINE = ("the engine could not be served", "remove it")
# Flags that the recipe or the package decides: why, and what to do.
_RESERVED: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(("checkpoint_dir", "output_dir", "input_timing_cache", "output_timing_cache"), _SCRIPT),
        **dict.fromkeys(("model_config", "build_config", "model_cls_file", "model_cls_name"), _CHECKPOINT),
        **dict.fromkeys(("workers", "auto_parallel", "gpus_per_node", "cluster_key"), _DIVISION),
        **dict.fromkeys(("dry_run", "strip_plan"), _NO_ENGINE),
        "monitor_memory": _SCRIPT,
        "max_batch_size": ("the recipe says it in runtime.max_batch_size", "set it there"),
        "max_seq_len": ("the recipe says it in runtime.max_seq_len", "set it there"),
        "max_num_tokens": ("the recipe says it in runtime.max_num_tokens", "set it there"),
        "max_input_len": ("the recipe says it in serving.max_input_tokens", "set it there"),
        "tokens_per_block": ("the recipe says it in runtime.kv_cache.tokens_per_block", "set it there"),
        "weight_sparsity": ("the recipe says it in compress.sparsity", "set it there"),
        "max_beam_width": ("the package's models answer with one beam", "remove it"),
        **dict.fromkeys(("speculative_decoding_mode", "max_draft_len"), _DRAFTS),
        **dict.fromkeys(("lora_dir", "lora_ckpt_source", "lora_target_modules"), _ADAPTERS),
        **dict.fromkeys(("max_lora_rank", "lora_plugin", "dora_plugin"), _ADAPTERS),
        **dict.fromkeys(("kv_cache_type", "paged_kv_cache", "context_fmha"), _PACKED),
        **dict.fromkeys(("remove_input_padding", "use_paged_context_fmha", "streamingllm"), _PACKED),
    }
)


def extra_problems(extra: Mapping[str, Any], table: FlagTable, *, sparse: bool, fp8_attention: bool) -> list[Problem]:
    """What is wrong with every flag that the user chose.

    Args:
        extra: flags without dashes and their values, as the recipe has them.
        table: the flags of the release line.
        sparse: whether the weights are 2:4 sparse.
        fp8_attention: whether weights and KV cache let attention over the prompt run in FP8.
    """
    problems: list[Problem] = []
    for name, value in extra.items():
        problems += _flag(name, value, table)
    if sparse and extra.get("gemm_plugin", "disable") != "disable":
        message = f"{extra['gemm_plugin']}: the plugin would bypass the kernels that use 2:4 weights"
        problems.append(Problem("runtime.extra.gemm_plugin", message, "remove it, or set compress.sparsity: none"))
    if not fp8_attention and extra.get("use_fp8_context_fmha") == "enable":
        message = "takes effect only with FP8 weights and an FP8 KV cache"
        problems.append(Problem("runtime.extra.use_fp8_context_fmha", message, "remove it, or set both to fp8"))
    return problems


def extra_flags(extra: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The flags as words of a command line; a switch has none. `extra_problems` found nothing."""
    return {name: () if value is True else (str(value),) for name, value in extra.items()}


def _flag(name: str, value: Any, table: FlagTable) -> Iterable[Problem]:
    at, flag = f"runtime.extra.{name}", table.flags.get(name)
    if name in _RESERVED:
        yield Problem(at, *_RESERVED[name])
    elif flag is None:
        others = elsewhere(name, table)
        if not others and any(load_schema(schema).has(name) for schema in schema_names()):
            yield Problem(
                at, "is an argument of the LLM API, not a flag of trtllm-build", "remove it; kind trtllm has it"
            )
            return
        near = difflib.get_close_matches(
            name.lstrip("-"), [known for known in table.flags if known not in _RESERVED], n=1
        )
        hint = f"did you mean {near[0]}?" if near else "remove it; its flags are those of upstream's commands/build.py"
        yield Problem(at, f"is no flag of trtllm-build {table.name}{others}", hint)
    else:
        wanted = _wanted(flag, value)
        if wanted is not None:
            yield Problem(at, f"{value!r} is not allowed by trtllm-build {table.name}", f"write {wanted}")


def _wanted(flag: Flag, value: Any) -> str | None:
    """What may stand there instead of `value`, or None where it may stand."""
    if flag.kind == "switch":
        return None if value is True else "true, or leave it out"
    if flag.kind == "choice":
        return None if value in flag.allowed else f"one of {', '.join(flag.allowed)}"
    if flag.kind == "number":
        return (
            None if isinstance(value, int) and not isinstance(value, bool) and value > 0 else "a whole number above 0"
        )
    return None if isinstance(value, str) and value else "a word"
