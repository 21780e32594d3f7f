"""What a recipe may say that a TensorRT engine does not do: in a release, for a model, on a GPU."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from trtbuild.compat import facts as table
from trtbuild.errors import CompatibilityError, Problem
from trtbuild.llm_keys import LLM_ARGUMENT
from trtbuild.model import ModelFacts
from trtbuild.recipe import Recipe
from trtbuild.settings import Settings
from trtbuild.support import refused_architecture
from trtbuild.trtllm_build import choose, release_line
from trtbuild.trtllm_build_extra import extra_problems
from trtbuild.trtllm_common import (
    embedded_only,
    excluded_in_part,
    gpu_refusals,
    group_refusals,
    unread_speculative,
)
from trtbuild.trtllm_engine_drafts import draft_spec, speculative_refusals, speculative_warnings
from trtbuild.trtllm_engine_lora import lora_refusals, lora_warnings
from trtbuild.trtllm_engine_settings import (
    FLOW,
    KIND,
    engine_spec,
    planned_release,
    ranks,
    short_window,
    wanted_release,
)
from trtbuild.trtllm_parallel import parallel_refusals

_PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_DEPLOY_FILES = ("launch",)
# What the recipe can say, the engine flow has under another name, and this version of trtbuild does not write.
NOT_WRITTEN = {
    "runtime.context_parallel_size": "the conversion divides models over tensor and pipeline ranks only",
    "runtime.moe_expert_parallel_size": "the conversion divides experts by tensor ranks only",
}


def engine_mistakes(settings: Settings) -> list[Problem]:
    """What is wrong with the recipe itself: ``runtime.extra`` against the flags and the rest of the recipe."""
    recipe, compress = settings.recipe, settings.recipe.compress
    problems = extra_problems(
        recipe.runtime.extra,
        release_line(planned_release(recipe).version),
        sparse=compress.sparsity == "2:4",
        fp8_attention=compress.format == "fp8" and compress.kv_cache == "fp8",
    )
    if recipe.target.gpu is None:
        message = "is missing, and an engine is built for one GPU architecture"
        problems.append(Problem("target.gpu", message, "name the GPU that will serve, such as H100"))
    return problems


def engine_refusals(settings: Settings, facts: ModelFacts) -> list[Problem]:
    """Every demand that cannot be met, with what to do instead."""
    recipe = settings.recipe
    wanted = wanted_release(recipe)
    problems = [wanted] if isinstance(wanted, Problem) else []
    problems += embedded_only(recipe)
    problems += _package(settings)
    problems += _fields(settings)
    problems += _guide(recipe)
    problems += _model(facts)
    problems += group_refusals(settings, facts)
    problems += excluded_in_part(settings["compress.exclude"], facts)
    problems += gpu_refusals(recipe, planned_release(recipe).line, ranks(recipe))
    problems += parallel_refusals(settings, facts)
    problems += _pipeline(recipe, facts)
    problems += _stages(settings, facts)
    problems += lora_refusals(settings, facts)
    problems += unread_speculative(recipe)
    problems += speculative_refusals(settings, facts)
    return problems or _arguments(settings, facts)


def engine_warnings(settings: Settings, facts: ModelFacts) -> list[str]:
    """What is allowed and may still surprise."""
    line = release_line(planned_release(settings.recipe).version)
    warnings = []
    if not line["proven"]:
        commits = ", ".join(source.rpartition("@")[2][:8] for source in line["sources"])
        warnings.append(
            f"the flags of trtllm-build were read at {commits}, not proven identical to {settings['runtime.version']}"
        )
    if short_window(settings, facts) and not settings.has("runtime.kv_cache.max_attention_window"):
        warnings.append(
            f"the model has an attention window of {facts.sliding_window} tokens, which the server must be told: if it "
            "applies, set runtime.kv_cache.max_attention_window, one number a layer, repeated over the layers"
        )
    return [*warnings, *speculative_warnings(settings, facts), *lora_warnings(settings, facts)]


def _package(settings: Settings) -> Iterable[Problem]:
    """How engines are served, and what comes with them."""
    recipe = settings.recipe
    if settings.given("serving.layout") and recipe.serving.layout != "ensemble":
        message = f"{recipe.serving.layout}: TensorRT engines are served by the five models of layout ensemble"
        yield Problem("serving.layout", message, "use ensemble, or remove it")
    others = [name for name in recipe.deploy.files if name not in _DEPLOY_FILES]
    if settings.given("deploy.files") and others:
        message = f"{', '.join(others)}: this version of trtbuild writes a launch script alone for {KIND}"
        yield Problem("deploy.files", message, "use [launch], or remove it")


def _fields(settings: Settings) -> Iterable[Problem]:
    """Fields of the LLM API that engines do not have."""
    names = table("engine_names")
    known = {path for part in ("build", "checkpoint", "triton") for path in names[part]} | {"model.trust_remote_code"}
    for path in LLM_ARGUMENT:
        if not settings.given(path):
            continue
        if path not in known:
            yield Problem(path, "TensorRT engines have no counterpart of it", "remove it, or use runtime.kind: trtllm")
        elif path in NOT_WRITTEN:
            yield Problem(path, NOT_WRITTEN[path], "remove it, or use runtime.kind: trtllm")


def _guide(recipe: Recipe) -> Iterable[Problem]:
    backend = recipe.runtime.guided_decoding_backend
    if backend not in (None, "xgrammar"):
        message = f"{backend}: the backends of TensorRT engines know xgrammar alone"
        yield Problem("runtime.guided_decoding_backend", message, "use xgrammar, or runtime.kind: trtllm")


def _model(facts: ModelFacts) -> Iterable[Problem]:
    """Classes that upstream lists for engines and that the conversion knows."""
    reason, converted = refused_architecture(FLOW, facts.architecture), table("architectures")[FLOW]["converted"]
    if reason is None and converted.get(facts.architecture) != facts.model_type:
        listed = ", ".join(sorted(converted))
        reason = f"{facts.architecture} ({facts.model_type}) has no conversion here; convertible are {listed}"
    if reason is not None:
        yield Problem("model.path", reason, "use runtime.kind: trtllm or embedded, or another model")


def _pipeline(recipe: Recipe, facts: ModelFacts) -> Iterable[Problem]:
    size, at = recipe.runtime.pipeline_parallel_size, "runtime.pipeline_parallel_size"
    if size == 1:
        return
    if facts.architecture in table("architectures")[FLOW]["one_stage"]:
        message = f"{size}: TensorRT-LLM cannot split {facts.architecture} over pipeline stages"
        yield Problem(at, message, "use 1, and tensor_parallel_size")
    elif size <= facts.num_layers and facts.num_layers % size:
        fitting = [str(number) for number in range(1, facts.num_layers + 1) if not facts.num_layers % number]
        message = f"{size} does not divide the model's {facts.num_layers} layers"
        yield Problem(at, message, f"use one of {', '.join(fitting)}")


def _stages(settings: Settings, facts: ModelFacts) -> Iterable[Problem]:
    """TensorRT-LLM names layers by their place in a stage: stages leave out the same ones, by their usual names."""
    size, patterns = settings.recipe.runtime.pipeline_parallel_size, settings["compress.exclude"]
    if size == 1 or not patterns or facts.num_layers % size:
        return
    each = facts.num_layers // size
    left = [
        {
            (layer % each, name)
            for layer in range(stage * each, (stage + 1) * each)
            for name in _PROJECTIONS
            if any(fnmatch.fnmatchcase(f"model.layers.{layer}.{name}", pattern) for pattern in patterns)
        }
        for stage in range(size)
    ]
    if any(stage != left[0] for stage in left):
        message = f"leaves out other layers in some of {size} pipeline stages, which TensorRT-LLM cannot be told"
        yield Problem("compress.exclude", message, "name the same places of every stage, or use one stage")


def _arguments(settings: Settings, facts: ModelFacts) -> list[Problem]:
    """What the choice of the arguments itself finds; asked last, since it needs a sound recipe."""
    spec = engine_spec(settings, facts)
    problems = []
    for at, one in (("runtime", spec), ("speculative.draft", draft_spec(spec, settings))):
        try:
            if one is not None:
                choose(one)
        except CompatibilityError as error:
            problems.append(Problem(at, error.message, error.hint))
    return problems
