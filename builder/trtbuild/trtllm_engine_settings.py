"""The target and the runtime of a recipe for TensorRT engines: values, their origins, the spec, and the engine step."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from trtbuild.build_flags import flag_table
from trtbuild.errors import CompatibilityError, Problem
from trtbuild.model import ModelFacts
from trtbuild.plan import Choice
from trtbuild.recipe import Recipe
from trtbuild.releases import Flow, Release, containers, find_release, newest
from trtbuild.setting_values import Settings
from trtbuild.settings import FROM_GPU_MEMORY, check_capacity, take_limits
from trtbuild.support import quant_algo, sm_version
from trtbuild.trtllm_build import BUILT, DRAFT, EngineSpec, Limits, arguments, choose
from trtbuild.trtllm_build_extra import extra_flags
from trtbuild.trtllm_engine_drafts import (
    DRAFT_TARGET,
    decoding_parameters,
    draft_parameters,
    draft_spec,
    shared_fraction,
    take_speculative,
    with_drafts,
)
from trtbuild.trtllm_engine_lora import cache_parameters, lora, lora_parameters, take_lora
from trtbuild.trtllm_instances import counted

KIND = "trtllm-engine"
FLOW: Flow = "engine"
DTYPE = "bfloat16"  # of what is not quantized: the compress step casts to it
TOKENIZER_INFO = "xgrammar_tokenizer_info.json"  # in the engine directory, for guided decoding
_PACKAGE = "/package"  # where the server sees the package
_USUAL_TOKENS = 8192  # the default of --max_num_tokens in every release line (_compat/build_flags.toml)
# A window of all layers alike, which TensorRT-LLM's own converters leave to the server as well.
_ONE_WINDOW = ("mistral", "mixtral", "phi3")
_NO_GPU = 90  # for drafting a plan that is refused for want of a GPU


def planned_release(recipe: Recipe) -> Release:
    """The release that a plan is drawn up for: where the recipe names none that builds engines, the newest one."""
    found = wanted_release(recipe)
    return newest(FLOW) if isinstance(found, Problem) else found


def wanted_release(recipe: Recipe) -> Release | Problem:
    """The release that the recipe means, if it builds engines and trtbuild knows its flags.

    One that no known container has is taken on the user's word: `build.sh` must then be told an image.
    """
    runtime, at = recipe.runtime, "runtime.version"
    found = find_release(runtime.version, allow_unknown=runtime.allow_unknown_version, flow=FLOW)
    if isinstance(found, Problem):
        return found
    usual = newest(FLOW).version
    if FLOW not in found.line.flows:
        message = f"TensorRT-LLM {found.version} builds no engines, the last that did is 1.3.0rc20"
        return Problem(at, message, f"use {usual}, or runtime.kind: trtllm")
    try:
        flag_table(found.version)
    except CompatibilityError as error:
        return Problem(at, error.message, f"use {usual}, or runtime.kind: trtllm where it has an LLM API")
    if found.container is None and not runtime.allow_unknown_version:
        message = f"trtbuild knows no Triton container with TensorRT-LLM {found.version}"
        hint = f"use {usual}, or set runtime.allow_unknown_version: true and name an image to engine/build.sh"
        return Problem(at, f"{message}, and engines are built and served in one", hint)
    return found


def ranks(recipe: Recipe) -> int:
    """How many GPUs one engine takes."""
    return recipe.runtime.tensor_parallel_size * recipe.runtime.pipeline_parallel_size


def take_engine(settings: Settings, facts: ModelFacts) -> None:
    """The target and the runtime, for TensorRT engines."""
    release = planned_release(settings.recipe)
    sm = sm_version(settings.recipe.target.gpu or "")
    settings.take("target.gpu", note=f"SM{sm}" if sm else "")
    settings.take("target.count", *counted(settings.recipe, ranks(settings.recipe)))
    settings.take("runtime.kind")
    settings.put("runtime.version", release.version, "default: the newest with a container", note=_where(release))
    settings.take("runtime.build_in")
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        settings.take(f"runtime.{name}")
    take_limits(settings, facts, _USUAL_TOKENS, "default of trtllm-build")
    _kv_cache(settings, facts)
    if settings.given("runtime.cuda_graph_config.enabled"):
        settings.take("runtime.cuda_graph_config.enabled")
    if settings.given("runtime.guided_decoding_backend"):
        settings.take("runtime.guided_decoding_backend")
    take_speculative(settings, facts)
    take_lora(settings)
    settings.take("runtime.extra")


def _where(release: Release) -> str:
    flags = flag_table(release.version).note(release.version)
    if release.container is None:
        return f"no Triton container has it; {flags}"
    tags = [container.tag for container in containers() if container.tensorrt_llm == release.version]
    tag = release.container.tag
    newest_tag = "" if tag == tags[0] else f", newest container {tags[0]}"
    return f"container {tag}{newest_tag}; {flags}"


def _kv_cache(settings: Settings, facts: ModelFacts) -> None:
    for name in ("free_gpu_memory_fraction", "tokens_per_block", "enable_block_reuse"):
        settings.take(f"runtime.kv_cache.{name}")
    settings.take("runtime.kv_cache.max_tokens", None, FROM_GPU_MEMORY)
    check_capacity(settings)
    if settings.given("runtime.kv_cache.host_cache_size"):
        settings.take("runtime.kv_cache.host_cache_size")
    window = (facts.sliding_window,) if facts.model_type in _ONE_WINDOW and short_window(settings, facts) else None
    if window or settings.given("runtime.kv_cache.max_attention_window"):
        settings.take("runtime.kv_cache.max_attention_window", window, "model: its sliding window")


def short_window(settings: Settings, facts: ModelFacts) -> bool:
    """Whether a request may grow longer than the model's attention window."""
    return facts.sliding_window is not None and facts.sliding_window < settings["runtime.max_seq_len"]


def engine_spec(settings: Settings, facts: ModelFacts) -> EngineSpec:
    """What the engine is built for."""
    recipe, kv_cache = settings.recipe, settings["compress.kv_cache"]
    spec = EngineSpec(
        version=settings["runtime.version"],
        architecture=facts.architecture,
        format=quant_algo(recipe.compress.formats),
        kv_cache=None if kv_cache == "none" else kv_cache.upper(),
        gpu=sm_version(recipe.target.gpu or "") or _NO_GPU,
        tp_size=recipe.runtime.tensor_parallel_size,
        pp_size=recipe.runtime.pipeline_parallel_size,
        limits=Limits(
            max_batch_size=settings["runtime.max_batch_size"],
            max_seq_len=settings["runtime.max_seq_len"],
            max_num_tokens=settings["runtime.max_num_tokens"],
            max_input_len=settings["serving.max_input_tokens"],
            tokens_per_block=settings["runtime.kv_cache.tokens_per_block"],
        ),
        experts=bool(facts.num_experts),
        sparse=settings["compress.sparsity"] == "2:4",
        lora=lora(settings),
        extra=extra_flags(recipe.runtime.extra),
    )
    return with_drafts(spec, settings)


def engine_parameters(settings: Settings, facts: ModelFacts) -> dict[str, Any]:
    """What decides the engine directory: the release, its container, and everything that the engine is built for."""
    spec, container = engine_spec(settings, facts), planned_release(settings.recipe).container
    engine = {
        "runtime": KIND,
        "version": spec.version,
        "container": container.tag if container else None,
        "image": container.image if container else None,
        "world_size": spec.world_size,
        "dtype": DTYPE,
        "trust_remote_code": settings["model.trust_remote_code"],
        "spec": asdict(spec) | {"extra": {flag: list(values) for flag, values in spec.extra.items()}},
        "arguments": list(arguments(_choices(spec), "CHECKPOINT", "ENGINE")),
    }
    if settings.has("runtime.guided_decoding_backend"):
        engine["tokenizer_info"] = TOKENIZER_INFO
    engine |= lora_parameters(settings, facts)
    return engine | draft_parameters(engine, spec, settings)


def _choices(spec: EngineSpec) -> tuple[Choice, ...]:
    """The arguments, or none where the plan is about to be refused for them."""
    try:
        return choose(spec)
    except CompatibilityError:
        return ()


def build_choices(settings: Settings, facts: ModelFacts) -> tuple[Choice, ...]:
    """Every argument of trtllm-build with its reason, for the plan."""
    return _choices(engine_spec(settings, facts))


def draft_choices(settings: Settings, facts: ModelFacts) -> tuple[Choice, ...]:
    """The same for the engine of a draft model; none without one."""
    spec = draft_spec(engine_spec(settings, facts), settings)
    return () if spec is None else _choices(spec)


def server_parameters(settings: Settings, facts: ModelFacts) -> dict[str, Any]:
    """What TensorRT-LLM's own backends read, in the recipe's words; `more` has their names."""
    cache = {name: settings[f"runtime.kv_cache.{name}"] for name in ("max_tokens", "enable_block_reuse")}
    cache["free_gpu_memory_fraction"] = shared_fraction(settings)[0]
    optional = {
        "runtime.kv_cache.host_cache_size": "kv_cache_host_memory_bytes",
        "runtime.kv_cache.max_attention_window": "max_attention_window_size",
        "runtime.cuda_graph_config.enabled": "cuda_graph_mode",
    }
    more = {theirs: settings[ours] for ours, theirs in optional.items() if settings.has(ours)}
    more["backend"] = settings["serving.backend"]
    if settings["serving.gpu_device_ids"]:
        more["gpu_device_ids"] = settings["serving.gpu_device_ids"]
    if settings.has("runtime.guided_decoding_backend"):
        more |= {
            "guided_decoding_backend": settings["runtime.guided_decoding_backend"],
            # The C++ backend reads the file, the container's python model the tokenizer itself.
            "xgrammar_tokenizer_info_path": f"{_PACKAGE}/engine/{TOKENIZER_INFO}",
            "tokenizer_dir": f"{_PACKAGE}/engine",
        }
    more |= decoding_parameters(settings) | cache_parameters(settings, facts, _PACKAGE)
    names = ("tensor_parallel_size", "pipeline_parallel_size", "capacity_scheduler_policy", "enable_chunked_prefill")
    return {
        "gpt_model_path": f"{_PACKAGE}/engine/{BUILT}",
        "runtime": {name: settings[f"runtime.{name}"] for name in names} | {"kv_cache": cache},
        "more": {name: _lists(value) for name, value in more.items()},
    }


def draft_server_parameters(settings: Settings, facts: ModelFacts) -> dict[str, Any]:
    """What the repository and the start script have besides, where a draft model proposes tokens."""
    if settings.recipe.speculative.method != DRAFT_TARGET:
        return {}
    engine = server_parameters(settings, facts)
    cache = engine["runtime"]["kv_cache"] | {"free_gpu_memory_fraction": shared_fraction(settings)[1]}
    return {
        "draft": engine
        | {
            "gpt_model_path": f"{_PACKAGE}/engine/{DRAFT}/{BUILT}",
            "runtime": engine["runtime"] | {"kv_cache": cache},
        },
        "draft_tokens": settings["speculative.max_draft_len"],
    }


def older_line(settings: Settings) -> dict[str, Any]:
    """What the repository has besides, where the release line has another backend than the newest."""
    line = planned_release(settings.recipe).line
    return {} if line.older is None else {"engine_line": line.name}


def _lists(value: Any) -> Any:
    """Tuples as a plan writes them."""
    return [_lists(item) for item in value] if isinstance(value, tuple) else value
