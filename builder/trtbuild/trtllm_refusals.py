"""What a recipe may say that TensorRT-LLM's LLM API does not do: in a release, for a model, on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from trtbuild.compat import facts as compat
from trtbuild.errors import Problem
from trtbuild.llm_keys import LLM_ARGUMENT, RESERVED, leaves
from trtbuild.llm_schema import Schema
from trtbuild.llm_speculation_refusals import (
    section_mistakes,
    speculation_refusals,
    speculation_warnings,
    with_section,
)
from trtbuild.llm_validate import validate
from trtbuild.model import ModelFacts
from trtbuild.model_classes import class_list, refused_class, version_with
from trtbuild.recipe import Recipe
from trtbuild.releases import Release
from trtbuild.setting_values import Settings
from trtbuild.trtllm_common import (
    adapter_refusals,
    block_refusals,
    embedded_only,
    excluded_in_part,
    expert_refusals,
    gpu_refusals,
    group_refusals,
    in_part,
)
from trtbuild.trtllm_deploy import deploy_refusals, hosts
from trtbuild.trtllm_instances import idle_gpus, instance_mistakes
from trtbuild.trtllm_parallel import parallel_refusals
from trtbuild.trtllm_settings import FLOW, planned_release, release_schema, wanted_release, world_size
from trtbuild.weight_formats import takes_group


def trtllm_mistakes(settings: Settings) -> list[Problem]:
    """What is wrong with the recipe itself: ``runtime.extra`` against the schema and the rest of the recipe."""
    recipe = settings.recipe
    schema = release_schema(planned_release(recipe))
    extra = dict(recipe.runtime.extra)
    problems = [problem for path, _ in leaves(extra) for problem in _contradiction(path)]
    problems += section_mistakes(settings, schema)
    problems += validate(with_section(settings, schema), schema, at="runtime.extra", partial=True)
    graph = recipe.runtime.cuda_graph_config
    given = [name for name in ("batch_sizes", "max_batch_size", "enable_padding") if getattr(graph, name) is not None]
    if not graph.enabled and given:
        at = f"runtime.cuda_graph_config.{given[0]}"
        problems.append(Problem(at, "is set while cuda_graph_config.enabled is false", "remove one of the two"))
    if graph.batch_sizes is not None and graph.max_batch_size is not None:
        # Releases differ in which pairs they take (TorchLlmArgs.validate_cuda_graph_config).
        message = f"{graph.max_batch_size} is set together with batch_sizes, which says it too"
        problems.append(Problem("runtime.cuda_graph_config.max_batch_size", message, "remove one of the two"))
    return [*problems, *instance_mistakes(settings, world_size(recipe)), *_hosts(recipe)]


def _hosts(recipe: Recipe) -> Iterable[Problem]:
    """Instances with GPUs of their own are started by one server, on one host."""
    if recipe.serving.gpu_device_ids and hosts(recipe) > 1:
        message = f"instances run on one host, and runtime.extra.gpus_per_node spreads the ranks over {hosts(recipe)}"
        yield Problem("serving.gpu_device_ids", message, "remove one of the two")


def _contradiction(path: str) -> Iterable[Problem]:
    """A key of ``runtime.extra`` that the package or another field of the recipe decides."""
    at = f"runtime.extra.{path}"
    for reserved, why in RESERVED.items():
        if path == reserved or path.startswith(f"{reserved}."):
            yield Problem(at, why, "remove it")
    for field, argument in LLM_ARGUMENT.items():
        if path == argument or argument.startswith(f"{path}.") or _switches(field, path):
            yield Problem(at, f"the recipe says it in {field}", "set it there")
            return  # a whole section contradicts many fields: one sentence is enough


def _switches(field: str, path: str) -> bool:
    """Whether `path` is the section that a switch of the recipe turns off as a whole; keys inside may be added."""
    return field.endswith(".enabled") and path == LLM_ARGUMENT[field]


def trtllm_refusals(settings: Settings, facts: ModelFacts) -> list[Problem]:
    """Every demand that cannot be met, with what to do instead."""
    recipe = settings.recipe
    wanted = wanted_release(recipe)
    release = planned_release(recipe)
    schema = release_schema(release)
    problems = [wanted] if isinstance(wanted, Problem) else []
    problems += _elsewhere(settings)
    problems += _fields(settings, schema)
    problems += _model(release, facts)
    problems += _format(settings, facts)
    problems += block_refusals(settings)
    problems += gpu_refusals(recipe, FLOW, release.line, world_size(recipe))
    problems += parallel_refusals(settings, facts)
    problems += speculation_refusals(settings, facts, release, schema)
    problems += adapter_refusals(recipe)
    problems += expert_refusals(recipe, FLOW, facts)
    problems += _joined_rows(recipe, facts)
    problems += _experts(recipe, facts)
    return problems


def _joined_rows(recipe: Recipe, facts: ModelFacts) -> Iterable[Problem]:
    """INT4 where TensorRT-LLM would not load it; `adapters/trtllm_fused.py` has the sources."""
    name = next(filter(takes_group, recipe.compress.formats), None)
    if name is None or in_part(recipe):
        return
    if facts.architecture == "Phi3ForCausalLM":
        message = f"{name}: TensorRT-LLM cuts Phi-3's joined projections as if a row of codes held one output, not two"
        yield Problem("compress.format", message, "use fp8 or none")


def trtllm_warnings(settings: Settings, facts: ModelFacts) -> list[str]:
    """What is allowed and may still surprise."""
    recipe, release = settings.recipe, planned_release(settings.recipe)
    warnings = idle_gpus(recipe, world_size(recipe))
    if not release.known:
        warnings.append(f"TensorRT-LLM {release.version} is in no table of trtbuild; {release.schema_note}")
    elif not release.proven:
        warnings.append(f"the arguments were checked against another version; {release.schema_note}")
    note = class_list(release).note(release.version)
    if note:
        warnings.append(f"the model's class was accepted {note}")
    if recipe.target.gpu is None:
        warnings.append("without target.gpu nothing says whether the GPU runs the format")
    if recipe.compress.sparsity == "2:4":
        warnings.append("2:4 brings the LLM API no speed: its PyTorch backend multiplies the weights as dense ones")
    if recipe.compress.kv_cache != "none":
        # NVIDIA/TensorRT-LLM, tensorrt_llm/_torch/modules/linear.py @ed53795b, FP8QDQLinearMethod: off by default.
        sets = "deploy/launch.sh sets it" if "launch" in settings["deploy.files"] else "set it: no launch script does"
        warnings.append(
            "TensorRT-LLM takes 1 for k_scale and v_scale unless the server's environment has TRTLLM_LOAD_KV_SCALES=1 "
            f"({sets}); quality is measured with the checkpoint's scales"
        )
    if recipe.compress.kv_cache == "nvfp4" and release.line.name not in ("1.3", "1.4"):
        # The same file, NVFP4LinearMethod; ModelOpt 0.47 writes the largest magnitude / 448.
        warnings.append(
            f"TensorRT-LLM {release.version} takes the scales of an NVFP4 KV cache for a sixth of what they are"
        )
    if "fp8_block" in recipe.compress.formats:
        warnings.append("TensorRT-LLM rounds inputs of fp8_block to FP8, 128 at a time; quality is measured without")
    warnings += _untested(recipe)
    warnings += speculation_warnings(settings, facts, release, release_schema(release))
    return warnings


def _untested(recipe: Recipe) -> list[str]:
    """Combinations that upstream calls untested (docs/source/features/feature-combination-matrix.md @01edceae)."""
    runtime = recipe.runtime
    pairs = [
        (
            runtime.enable_chunked_prefill and runtime.pipeline_parallel_size > 1,
            "chunked prefill",
            "pipeline parallelism",
        ),
        (bool(recipe.model.adapters) and runtime.enable_attention_dp, "LoRA", "attention data parallelism"),
        (bool(recipe.model.adapters) and runtime.moe_expert_parallel_size is not None, "LoRA", "expert parallelism"),
        (bool(recipe.model.adapters) and runtime.context_parallel_size > 1, "LoRA", "context parallelism"),
        (bool(recipe.model.adapters) and runtime.guided_decoding_backend is not None, "LoRA", "guided decoding"),
        (bool(recipe.model.adapters) and "speculative_config" in runtime.extra, "LoRA", "speculative decoding"),
    ]
    return [f"TensorRT-LLM calls {one} with {other} untested" for both, one, other in pairs if both]


def _elsewhere(settings: Settings) -> Iterable[Problem]:
    """What other runtimes do, or nothing yet."""
    recipe = settings.recipe
    yield from deploy_refusals(settings)
    yield from embedded_only(recipe)
    if recipe.serving.layout != "llm":
        yield Problem("serving.layout", f"{recipe.serving.layout}: the LLM API is served by one model", "use llm")


def _fields(settings: Settings, schema: Schema) -> Iterable[Problem]:
    """Every field that the recipe states must be an argument of this release, with a value that it takes."""
    for path, argument in LLM_ARGUMENT.items():
        if not settings.given(path) or not settings.has(path) or path in {"compress.kv_cache", _GRAPHS_SWITCH}:
            continue
        for found in validate(_nested(argument, settings[path]), schema, partial=True):
            place = found.path.removeprefix(argument)
            yield Problem(f"{path}{place}", found.message, found.hint)


_GRAPHS_SWITCH = "runtime.cuda_graph_config.enabled"


def _nested(path: str, value: Any) -> dict[str, Any]:
    """A document with one value at a dotted path."""
    first, _, rest = path.partition(".")
    return {first: _nested(rest, value) if rest else value}


def _experts(recipe: Recipe, facts: ModelFacts) -> Iterable[Problem]:
    """Settings of experts, which say nothing about a model without any."""
    if facts.num_experts:
        return
    backend = recipe.runtime.moe_config.backend
    message = f"is set, but {facts.architecture} has no experts"
    if backend is not None:
        yield Problem("runtime.moe_config.backend", f"{backend} {message}", "remove it")
    if recipe.runtime.extra.get("moe_config"):
        yield Problem("runtime.extra.moe_config", message, "remove it")


def _model(release: Release, facts: ModelFacts) -> Iterable[Problem]:
    reason = refused_class(release, facts.architecture)
    if reason is not None:
        other = version_with(facts.architecture)
        newer = f"runtime.version: {other}, " if other else ""
        engines = compat("architectures")["engine"]["converted"].get(facts.architecture) == facts.model_type
        others = "trtllm-engine or embedded" if engines else "embedded"
        yield Problem("model.path", reason, f"use {newer}runtime.kind: {others}, or another model")


def _format(settings: Settings, facts: ModelFacts) -> Iterable[Problem]:
    """What TensorRT-LLM's loader and kernels take of what `compress` can make."""
    yield from group_refusals(settings, facts)
    if not settings.recipe.compress.formats and settings["compress.kv_cache"] != "none":
        message = (
            "TensorRT-LLM takes no checkpoint with KV scales whose weights are not quantized (quant_algo is required)"
        )
        yield Problem("compress.kv_cache", message, "set compress.format too, or use none")
    yield from excluded_in_part(settings["compress.exclude"], facts)
