"""What a recipe may say, or a model may be, that this version of trtbuild cannot execute: refused, never ignored."""

from __future__ import annotations

from collections.abc import Iterable

from trtbuild import compat
from trtbuild.embedded_speculation import speculation_refusals
from trtbuild.errors import Problem
from trtbuild.format_support import needs_gpu, refused_embedded
from trtbuild.llm_keys import LLM_ARGUMENT
from trtbuild.model import ModelFacts
from trtbuild.recipe import Recipe
from trtbuild.setting_values import Settings, recipe_value
from trtbuild.training_settings import training_refusals
from trtbuild.trtllm_engine_refusals import NOT_WRITTEN, engine_refusals
from trtbuild.trtllm_refusals import trtllm_refusals

_NOT_HERE = "cannot be done by this version of trtbuild"
_ONE_DEVICE = "the embedded runtime runs on one device"
_ENGINES = "only TensorRT engines are served without text"
_TRTLLM_ONLY = "only the trtllm runtime has it"
_VENDOR_ONLY = "only the runtimes trtllm and trtllm-engine have it"
# Fields that not every runtime has.
_ONLY = {
    "runtime.build_in": ("trtllm-engine",),
    "serving.model_py": ("trtllm",),
    "serving.gpu_device_ids": ("trtllm", "trtllm-engine"),
    "serving.backend": ("trtllm-engine",),
    "serving.communication_mode": ("trtllm-engine",),
}
# What the embedded runtime does itself, or refuses with a sentence of its own.
_OWN = frozenset(
    {
        *("model.trust_remote_code", "serving.max_input_tokens", "compress.kv_cache"),
        *(f"runtime.{name}_parallel_size" for name in ("tensor", "pipeline")),
        *(f"runtime.max_{name}" for name in ("batch_size", "num_tokens", "seq_len")),
        *("runtime.enable_chunked_prefill", "runtime.capacity_scheduler_policy", "runtime.kv_cache.max_tokens"),
        *(
            f"runtime.kv_cache.{name}"
            for name in ("free_gpu_memory_fraction", "tokens_per_block", "enable_block_reuse")
        ),
    }
)


def embedded_takes(path: str) -> bool:
    """Whether the embedded runtime heeds a field of the recipe; fields of no LLM argument are for all."""
    return path not in LLM_ARGUMENT or path in _OWN


def recipe_refusals(settings: Settings, facts: ModelFacts) -> list[Problem]:
    """Every demand of the recipe that its runtime cannot meet, with the value to use instead."""
    recipe = settings.recipe
    refusals = {"embedded": lambda: _embedded(settings, facts), "trtllm": lambda: trtllm_refusals(settings, facts)}
    ours = refusals.get(recipe.runtime.kind, lambda: engine_refusals(settings, facts))()
    return [*ours, *_of_others(settings), *training_refusals(settings, facts)]


def _of_others(settings: Settings) -> list[Problem]:
    """Fields that other runtimes have."""
    kind, problems = settings.recipe.runtime.kind, []
    for path, kinds in _ONLY.items():
        value = recipe_value(settings.recipe, path)
        if kind not in kinds and value not in (None, (), "trtbuild", "auto"):
            shown = [list(group) for group in value] if isinstance(value, tuple) else value
            runtimes = "the runtime" if len(kinds) == 1 else "the runtimes"
            message = f"{shown}: only {runtimes} {' and '.join(kinds)} ha{'s' if len(kinds) == 1 else 've'} it"
            problems.append(Problem(path, message, "remove it"))
    return problems


def _embedded(settings: Settings, facts: ModelFacts) -> list[Problem]:
    recipe, runtime = settings.recipe, settings.recipe.runtime
    demands: list[tuple[str, object, object, str]] = [
        ("runtime.version", runtime.version, None, "the embedded runtime has trtbuild's own version"),
        ("runtime.tensor_parallel_size", runtime.tensor_parallel_size, 1, _ONE_DEVICE),
        ("runtime.pipeline_parallel_size", runtime.pipeline_parallel_size, 1, _ONE_DEVICE),
        ("runtime.extra", dict(runtime.extra), {}, "the embedded runtime has no further keys"),
        ("model.adapters", recipe.model.adapters, (), _NOT_HERE),
        ("serving.layout", "llm" if recipe.serving.layout == "ensemble" else recipe.serving.layout, "llm", _ENGINES),
        ("runtime.allow_unknown_version", runtime.allow_unknown_version, False, _VENDOR_ONLY),
        ("target.count", recipe.target.count if (recipe.target.count or 0) > 1 else 1, 1, _ONE_DEVICE),
    ]
    silent = Recipe.model_validate({"schema_version": 1, "model": {"path": "."}, "runtime": {"kind": "embedded"}})
    demands += [
        (path, recipe_value(recipe, path), recipe_value(silent, path), _whose(path))
        for path in LLM_ARGUMENT
        if path not in _OWN
    ]
    refused = [
        Problem(path, f"{_show(value)}: {why}", f"use {_show(only)}" if only else "remove it")
        for path, value, only, why in demands
        if value != only
    ]
    return [*refused, *_formats(recipe), *speculation_refusals(settings, facts)]


def _formats(recipe: Recipe) -> Iterable[Problem]:
    """The embedded engine computes every format of weights, and KV caches that hold them."""
    compress = recipe.compress
    why = refused_embedded(compress.kv_cache)
    if why is not None:
        yield Problem("compress.kv_cache", f"{compress.kv_cache}: {why}", "use fp8")
    searched = [name for name in compress.formats if needs_gpu(name)]
    if searched and recipe.runtime.device == "cpu":
        message = f"{searched[0]}: ModelOpt searches it on NVIDIA GPUs alone, and runtime.device is cpu"
        yield Problem("compress.format", message, "use nvfp4, or another device")


def _whose(path: str) -> str:
    """Which runtimes have a field that this one has not."""
    names = compat.facts("engine_names")
    engines_too = path not in NOT_WRITTEN and any(path in names[part] for part in ("build", "checkpoint", "triton"))
    return _VENDOR_ONLY if engines_too else _TRTLLM_ONLY


def _show(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (tuple, dict)) else str(value)


def model_refusals(facts: ModelFacts, recipe: Recipe) -> list[Problem]:
    """What about the model itself cannot be compressed or served."""
    problems = []
    if facts.remote_code and not recipe.model.trust_remote_code:
        message = "the checkpoint carries Python code (auto_map in config.json)"
        problems.append(Problem("model.path", message, "read it, then set model.trust_remote_code: true"))
    if facts.quantization is not None:
        message = f"the checkpoint is already quantized ({_describe(facts)})"
        problems.append(
            Problem("model.path", message, "give the original bf16 or fp16 checkpoint; trtbuild quantizes it")
        )
    if not facts.has_tokenizer and recipe.model.tokenizer is None:
        problems.append(
            Problem("model.path", "the checkpoint has no tokenizer", "add its files or set model.tokenizer")
        )
    reason = compat.refusal(facts.model_type)
    known = compat.causal_lm_class(facts.model_type)
    if reason is not None:
        problems.append(
            Problem("model.path", f"{facts.architecture} ({facts.model_type}): {reason}", "use another model")
        )
    elif known is None and not facts.remote_code:
        near = compat.nearest_model_types(facts.model_type)
        hint = f"did you mean {', '.join(near)}?" if near else "use a decoder-only model that Transformers knows"
        problems.append(
            Problem("model.path", f"Transformers knows no causal language model of type {facts.model_type!r}", hint)
        )
    elif known is not None and known != facts.architecture:
        message = f"{facts.architecture} is not the causal language model of type {facts.model_type}, which is {known}"
        problems.append(Problem("model.path", message, f"give a checkpoint whose architectures name {known}"))
    return problems


def _describe(facts: ModelFacts) -> str:
    quantization = facts.quantization
    if quantization is None:
        return ""
    wanted = (
        "quant_algo",
        "bits",
        "w_bit",
        "group_size",
        "q_group_size",
        "kv_cache_quant_algo",
        "format",
        "tensor",
        "dtype",
    )
    shown = [
        f"{name}={quantization.parameters[name]}" for name in wanted if quantization.parameters.get(name) is not None
    ]
    return ", ".join([quantization.method, *shown])
