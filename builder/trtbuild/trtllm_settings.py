"""The target and the runtime of a recipe for TensorRT-LLM's LLM API: values, their origins, and the engine step."""

from __future__ import annotations

from typing import Any

from trtbuild.errors import Problem
from trtbuild.llm_keys import LLM_ARGUMENT
from trtbuild.llm_schema import Schema, load_schema
from trtbuild.llm_speculation import speculation_parameters, take_speculation
from trtbuild.model import ModelFacts
from trtbuild.recipe import Recipe
from trtbuild.releases import Flow, Release, containers, find_release, newest
from trtbuild.setting_values import Settings, recipe_value
from trtbuild.settings import FROM_GPU_MEMORY, check_capacity, take_limits
from trtbuild.trtllm_common import adapter_names

FLOW: Flow = "llm-api"
_PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size")
_OPTIONAL = (
    *("context_chunking_policy", "attn_backend", "guided_decoding_backend", "stream_interval", "return_perf_metrics"),
    "enable_iter_perf_stats",
)
_USUAL_TOKENS = 8192  # what releases that have a default of their own take
_GRAPHS = ("batch_sizes", "max_batch_size", "enable_padding")
_LORA = ("max_lora_rank", "lora_target_modules", "max_loras", "max_cpu_loras")
# What the plan works out itself and therefore always says to TensorRT-LLM.
_WORKED_OUT = ("runtime.max_num_tokens", "runtime.max_seq_len", "serving.max_input_tokens")


def planned_release(recipe: Recipe) -> Release:
    """The release that a plan is drawn up for: where the recipe names none that has the LLM API, the newest one."""
    found = wanted_release(recipe)
    return newest(FLOW) if isinstance(found, Problem) else found


def wanted_release(recipe: Recipe) -> Release | Problem:
    """The release that the recipe means, if it has an LLM API."""
    runtime = recipe.runtime
    found = find_release(runtime.version, allow_unknown=runtime.allow_unknown_version, flow=FLOW)
    if isinstance(found, Problem):
        return found
    usual = newest(FLOW).version
    if FLOW not in found.line.flows:
        message = f"TensorRT-LLM {found.version} has no LLM API that trtbuild writes arguments for, engines only"
        return Problem("runtime.version", message, f"use {usual}, or runtime.kind: trtllm-engine")
    return found


def release_schema(release: Release) -> Schema:
    """The argument schema of a planned release, which always has one."""
    if release.line.schema is None:
        raise ValueError(f"{release.version} has no schema")
    return load_schema(release.line.schema)


def world_size(recipe: Recipe) -> int:
    """How many GPUs one engine takes."""
    runtime = recipe.runtime
    return runtime.tensor_parallel_size * runtime.pipeline_parallel_size * runtime.context_parallel_size


def take_trtllm(settings: Settings, facts: ModelFacts) -> None:
    """The target and the runtime, for the LLM API."""
    release = planned_release(settings.recipe)
    schema = release_schema(release)
    settings.take("target.gpu")
    settings.take("target.count", world_size(settings.recipe), "tensor x pipeline x context parallel")
    settings.take("runtime.kind")
    settings.put("runtime.version", release.version, "default: the newest with a container", note=_where(release))
    for name in _PARALLEL:
        settings.take(f"runtime.{name}")
    if facts.num_experts or settings.given("runtime.moe_expert_parallel_size"):
        _vendor(settings, schema, "runtime.moe_expert_parallel_size")
    settings.take("runtime.enable_attention_dp")
    usual = schema.root["max_num_tokens"].default
    if isinstance(usual, int):
        take_limits(settings, facts, usual, f"default of TensorRT-LLM {release.version}")
    else:
        take_limits(settings, facts, _USUAL_TOKENS, "default")
    for name in _OPTIONAL:
        _vendor(settings, schema, f"runtime.{name}")
    if facts.num_experts or settings.given("runtime.moe_config.backend"):
        _vendor(settings, schema, "runtime.moe_config.backend")
    if settings.take("runtime.cuda_graph_config.enabled"):
        for name in _GRAPHS:
            _vendor(settings, schema, f"runtime.cuda_graph_config.{name}")
    _adapters(settings, schema)
    _kv_cache(settings, schema)
    take_speculation(settings, schema, release.version)
    settings.take("runtime.extra")


def _where(release: Release) -> str:
    """Which container has the release, and how much is known of its arguments."""
    if release.container is None:
        return f"no Triton container has it; {release.schema_note}"
    tags = [container.tag for container in containers() if container.tensorrt_llm == release.version]
    named = "" if release.container.tag == tags[0] else f"container {release.container.tag}, "
    return f"{named}newest container {tags[0]}; {release.schema_note}"


def _vendor(settings: Settings, schema: Schema, path: str) -> None:
    """A setting whose default, if the recipe is silent, is the vendor's: shown, and left to TensorRT-LLM."""
    entry = schema.field_at(LLM_ARGUMENT[path])
    default = None if entry is None else entry.default
    version = planned_release(settings.recipe).version
    settings.take(path, default, f"default of TensorRT-LLM {version}" if entry else f"TensorRT-LLM {version} has none")


def _adapters(settings: Settings, schema: Schema) -> None:
    adapters = settings.recipe.model.adapters
    if adapters:
        settings.take("model.adapters")
    if adapters or any(settings.given(f"runtime.lora_config.{name}") for name in _LORA):
        for name in _LORA:
            _vendor(settings, schema, f"runtime.lora_config.{name}")


def _kv_cache(settings: Settings, schema: Schema) -> None:
    for name in ("free_gpu_memory_fraction", "tokens_per_block", "enable_block_reuse"):
        settings.take(f"runtime.kv_cache.{name}")
    settings.take("runtime.kv_cache.max_tokens", None, FROM_GPU_MEMORY)
    check_capacity(settings)
    for name in ("host_cache_size", "max_attention_window"):
        _vendor(settings, schema, f"runtime.kv_cache.{name}")


def engine_parameters(settings: Settings) -> dict[str, Any]:
    """What decides the engine directory: the release, its schema, and every value that is said to TensorRT-LLM."""
    release = planned_release(settings.recipe)
    header = release_schema(release).header
    return {
        "runtime": "trtllm",
        "version": release.version,
        "container": release.container.tag if release.container else None,
        "schema": {"name": header.name, "commit": header.commit, "proven": release.proven},
        "world_size": world_size(settings.recipe),
        "values": {path: settings[path] for path in LLM_ARGUMENT if _is_said(settings, path)},
        "extra": dict(settings.recipe.runtime.extra),
        "adapters": sorted(adapter_names(settings.recipe)),
        **speculation_parameters(settings, release_schema(release)),
    }


def server_parameters(settings: Settings) -> dict[str, Any]:
    """What only this runtime's repository has; the container's own model files read the LLM arguments from it."""
    groups = settings["serving.gpu_device_ids"]
    parameters: dict[str, Any] = {}
    if groups:
        parameters["instance_count"] = len(groups)
        parameters["gpu_device_ids"] = ";".join(",".join(map(str, group)) for group in groups)
    if settings["serving.model_py"] == "upstream":
        parameters |= {"model_py": "upstream", "llm_args": engine_parameters(settings)}
    return parameters


def _is_said(settings: Settings, path: str) -> bool:
    """Whether a value goes into the arguments: not where the recipe leaves it to TensorRT-LLM."""
    if not settings.has(path) or settings[path] in (None, (), []):
        return False
    return path in _WORKED_OUT or _stated(settings, path)


def _stated(settings: Settings, path: str) -> bool:
    """Whether the recipe has a value; trtbuild's own default is left out where no argument takes it."""
    value = recipe_value(settings.recipe, path)
    schema = release_schema(planned_release(settings.recipe))
    return value is not None and (settings.given(path) or schema.has(LLM_ARGUMENT[path]))
