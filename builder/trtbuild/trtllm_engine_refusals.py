"""What a recipe may say that a TensorRT engine does not do: in a release, for a model, on a GPU."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from trtbuild.build_flags import flag_table
from trtbuild.compat import facts as table
from trtbuild.errors import CompatibilityError, Problem
from trtbuild.llm_keys import LLM_ARGUMENT
from trtbuild.model import ModelFacts
from trtbuild.model_classes import version_with
from trtbuild.recipe import Recipe
from trtbuild.setting_values import Settings, recipe_value
from trtbuild.support import QUANT_ALGO, refused_architecture, refused_in_line
from trtbuild.trtllm_build import choose
from trtbuild.trtllm_build_extra import extra_problems
from trtbuild.trtllm_common import (
    block_refusals,
    embedded_only,
    excluded_in_part,
    expert_refusals,
    gpu_refusals,
    group_refusals,
    unread_speculative,
)
from trtbuild.trtllm_deploy import deploy_refusals
from trtbuild.trtllm_engine_drafts import draft_spec, speculative_refusals, speculative_warnings
from trtbuild.trtllm_engine_lora import lora_refusals, lora_warnings
from trtbuild.trtllm_engine_settings import (
    FLOW,
    engine_spec,
    planned_release,
    ranks,
    server_parameters,
    short_window,
    wanted_release,
)
from trtbuild.trtllm_instances import idle_gpus, instance_mistakes
from trtbuild.trtllm_parallel import parallel_refusals

_PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
# Parameters of the backend that older lines lack, by what of a recipe needs them.
_ASKED_IN = {
    "guided_decoding_backend": "runtime.guided_decoding_backend",
    "lookahead_window_size": "speculative.method",
    "lora_prefetch_dir": "model.adapters",
}
_LAYOUTS = ("ensemble", "tokens")
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
        flag_table(planned_release(recipe).version),
        sparse=compress.sparsity == "2:4",
        fp8_attention=compress.format == "fp8" and compress.kv_cache == "fp8",
    )
    if recipe.target.gpu is None:
        message = "is missing, and an engine is built for one GPU architecture"
        problems.append(Problem("target.gpu", message, "name the GPU that will serve, such as H100"))
    return [*problems, *instance_mistakes(settings, ranks(recipe)), *_several(recipe)]


def _several(recipe: Recipe) -> Iterable[Problem]:
    """Several instances of an engine, and what cannot start or place them."""
    serving, count = recipe.serving, len(recipe.serving.gpu_device_ids)
    if count > 1 and serving.communication_mode == "leader":
        message = f"leader: {count} instances of an engine (serving.gpu_device_ids) have no common leader"
        yield Problem("serving.communication_mode", message, "use orchestrator, or remove it")
    drafts = recipe.speculative.method == "draft_target"
    if drafts and ranks(recipe) > 1 and serving.communication_mode == "leader":
        message = f"leader: the engines of model and draft have {ranks(recipe)} ranks each and no common leader"
        yield Problem("serving.communication_mode", message, "use orchestrator, or remove it")
    if drafts and recipe.serving.layout == "tokens":
        message = "tokens: drafts are proposed and verified by tensorrt_llm_bls, which this layout has not"
        yield Problem("serving.layout", message, "use ensemble, or remove speculative")
    if count > 1 and serving.backend == "python":
        # NVIDIA/TensorRT-LLM triton_backend/all_models/inflight_batcher_llm/tensorrt_llm/1/model.py @0d5352f5,
        # `get_parallel_config`: one list of ids, divided at commas alone.
        message = f"names GPUs for {count} instances, and the container's python model reads one list of ids"
        yield Problem("serving.gpu_device_ids", message, "name one group, or use serving.backend: tensorrtllm")


def engine_refusals(settings: Settings, facts: ModelFacts) -> list[Problem]:
    """Every demand that cannot be met, with what to do instead."""
    recipe = settings.recipe
    wanted = wanted_release(recipe)
    problems = [wanted] if isinstance(wanted, Problem) else []
    problems += embedded_only(recipe)
    problems += _package(settings)
    problems += _fields(settings)
    problems += _guide(recipe)
    problems += _model(settings, facts)
    problems += group_refusals(settings, facts)
    problems += block_refusals(settings)
    problems += excluded_in_part(settings["compress.exclude"], facts)
    problems += gpu_refusals(recipe, FLOW, planned_release(recipe).line, ranks(recipe))
    problems += parallel_refusals(settings, facts)
    problems += expert_refusals(recipe, FLOW, facts)
    problems += _int8_cache(settings)
    problems += _pipeline(recipe, facts)
    problems += _stages(settings, facts)
    problems += lora_refusals(settings, facts)
    problems += unread_speculative(recipe)
    problems += speculative_refusals(settings, facts)
    problems += deploy_refusals(settings)
    problems += _older(settings, facts)
    return problems if problems or engine_mistakes(settings) else _arguments(settings, facts)


def engine_warnings(settings: Settings, facts: ModelFacts) -> list[str]:
    """What is allowed and may still surprise."""
    release = planned_release(settings.recipe)
    version, line, flags = release.version, release.line, flag_table(release.version)
    warnings = idle_gpus(settings.recipe, ranks(settings.recipe))
    if not release.known:
        warnings.append(
            f"TensorRT-LLM {version} is in no table of trtbuild; {flags.note(version)}; classes, formats and the "
            f"backend's parameters are those of {line.name}"
        )
    elif version not in flags.releases:
        warnings.append(flags.note(version))
    if release.container is None:
        warnings.append(
            f"no Triton container with TensorRT-LLM {version} is known: engine/build.sh must be told one (--image), "
            "and there are no deployment files"
        )
    if line.unread is not None:
        warnings.append(f"TensorRT-LLM {version}: {line.unread}")
    if short_window(settings, facts) and not settings.has("runtime.kv_cache.max_attention_window"):
        warnings.append(
            f"the model has an attention window of {facts.sliding_window} tokens, which the server must be told: if it "
            "applies, set runtime.kv_cache.max_attention_window, one number a layer, repeated over the layers"
        )
    return [*warnings, *speculative_warnings(settings, facts), *lora_warnings(settings, facts)]


def _package(settings: Settings) -> Iterable[Problem]:
    """How engines are served, and what comes with them."""
    recipe = settings.recipe
    if settings.given("serving.layout") and recipe.serving.layout not in _LAYOUTS:
        message = f"{recipe.serving.layout}: TensorRT engines are served by the five models of layout ensemble"
        yield Problem("serving.layout", message, "use ensemble, tokens (the engine's model alone), or remove it")
    for name in ("max_output_tokens", "default_max_tokens"):
        if recipe.serving.layout == "tokens" and settings.given(f"serving.{name}"):
            message = "nothing of layout tokens heeds it: every request says request_output_len"
            yield Problem(f"serving.{name}", message, "remove it, or use layout ensemble")


def _fields(settings: Settings) -> Iterable[Problem]:
    """Fields of the LLM API that engines do not have."""
    names = table("engine_names")
    known = {path for part in ("build", "checkpoint", "triton") for path in names[part]} | {"model.trust_remote_code"}
    for path in LLM_ARGUMENT:
        if not settings.given(path):
            continue
        if path not in known:
            yield Problem(path, "TensorRT engines have no counterpart of it", "remove it, or use runtime.kind: trtllm")
        elif path in NOT_WRITTEN and recipe_value(settings.recipe, path) != 1:
            yield Problem(path, NOT_WRITTEN[path], "remove it, or use runtime.kind: trtllm")


def _older(settings: Settings, facts: ModelFacts) -> Iterable[Problem]:
    """What the backend of an older release line would pass over in silence."""
    release = planned_release(settings.recipe)
    if release.line.older is None:
        return
    needed = server_parameters(settings, facts)["more"]
    for parameter, path in _ASKED_IN.items():
        if parameter in needed and parameter in release.line.older.absent_parameters:
            message = f"the backend of TensorRT-LLM {release.version} has no parameter {parameter}"
            yield Problem(path, message, "remove it, or use a later runtime.version")


def _guide(recipe: Recipe) -> Iterable[Problem]:
    backend = recipe.runtime.guided_decoding_backend
    if backend not in (None, "xgrammar"):
        message = f"{backend}: the backends of TensorRT engines know xgrammar alone"
        yield Problem("runtime.guided_decoding_backend", message, "use xgrammar, or runtime.kind: trtllm")


def _model(settings: Settings, facts: ModelFacts) -> Iterable[Problem]:
    """Classes that upstream lists for engines of the release and that the conversion knows."""
    reason, converted = refused_architecture(facts.architecture), table("architectures")[FLOW]["converted"]
    if reason is None and converted.get(facts.architecture) != facts.model_type:
        listed = ", ".join(sorted(converted))
        reason = f"{facts.architecture} ({facts.model_type}) has no conversion here; convertible are {listed}"
    if reason is not None:
        others = "embedded" if version_with(facts.architecture) is None else "trtllm or embedded"
        yield Problem("model.path", reason, f"use runtime.kind: {others}, or another model")
        return
    line, formats = planned_release(settings.recipe).line, settings.recipe.compress.formats
    for name in formats or ("none",):
        refused = refused_in_line(line, facts.architecture, QUANT_ALGO[name])
        if refused is not None:
            yield Problem("model.path", *refused)


def _pipeline(recipe: Recipe, facts: ModelFacts) -> Iterable[Problem]:
    size, at = recipe.runtime.pipeline_parallel_size, "runtime.pipeline_parallel_size"
    if size == 1:
        return
    if facts.architecture in table("architectures")[FLOW]["one_stage"]:
        message = f"{size}: TensorRT-LLM cannot split {facts.architecture} over pipeline stages"
        yield Problem(at, message, "use 1, and tensor_parallel_size")


def _int8_cache(settings: Settings) -> Iterable[Problem]:
    """What attention over a paged context does, which does not work with an INT8 cache (`trtllm_build`)."""
    if settings["compress.kv_cache"] != "int8":
        return
    for path in ("runtime.kv_cache.enable_block_reuse", "runtime.enable_chunked_prefill"):
        if settings[path]:
            message = "true: attention over a paged context, which it needs, does not work with an INT8 KV cache"
            yield Problem(path, message, "set it to false, or use compress.kv_cache: fp8")


def _stages(settings: Settings, facts: ModelFacts) -> Iterable[Problem]:
    """TensorRT-LLM names layers by their place in a stage: stages leave out the same ones, by their usual names."""
    size, patterns = settings.recipe.runtime.pipeline_parallel_size, settings["compress.exclude"]
    if size == 1 or not patterns:
        return
    # The first stages take what is left over: NVIDIA/TensorRT-LLM, tensorrt_llm/mapping.py @05ebebb2c1d3, pp_layers.
    each, more = divmod(facts.num_layers, size)
    left: dict[tuple[int, str], set[bool]] = {}
    for stage in range(size):
        first = stage * each + min(stage, more)
        for local in range(each + (stage < more)):
            for name in _PROJECTIONS:
                module = f"model.layers.{first + local}.{name}"
                out = any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns)
                left.setdefault((local, name), set()).add(out)
    if any(len(answers) > 1 for answers in left.values()):
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
