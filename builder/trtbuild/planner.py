"""`make_plan`: from a recipe, model facts and tool versions to a complete plan. Pure, like everything it calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trtbuild import mixed_settings, trtllm_deploy, trtllm_engine_settings, trtllm_settings
from trtbuild.comparison import compare
from trtbuild.compress_settings import is_compressed, sparsity_warnings
from trtbuild.draft import Draft
from trtbuild.embedded_settings import embedded_files, take_embedded
from trtbuild.embedded_speculation import embedded_draft_files, speculation_parameters, speculation_warnings
from trtbuild.errors import CompatibilityError, Problem, RecipeError
from trtbuild.llm_speculation import llm_draft_files
from trtbuild.memory_settings import memory_mistakes, peak_bytes
from trtbuild.model import ModelFacts
from trtbuild.plan import Plan, Source, Step
from trtbuild.recipe_fields import SELF
from trtbuild.recipe_file import LoadedRecipe
from trtbuild.refusals import model_refusals, recipe_refusals
from trtbuild.setting_values import Settings
from trtbuild.settings import resolve
from trtbuild.training_settings import draft_steps
from trtbuild.trtllm_common import adapter_names
from trtbuild.trtllm_engine_drafts import draft_files
from trtbuild.trtllm_engine_lora import ADAPTERS
from trtbuild.trtllm_engine_refusals import engine_mistakes, engine_warnings
from trtbuild.trtllm_refusals import trtllm_mistakes, trtllm_warnings
from trtbuild.trtllm_settings import take_trtllm
from trtbuild.weight_formats import KV_CACHE_BITS

_EVALUATION_LENGTH = 512
_KV_BYTES = {"embedded": 4, "trtllm": 2, "trtllm-engine": 2}  # the embedded engine computes in float32 on a CPU
_EMBEDDED, _TRTLLM, _ENGINE = "embedded", "trtllm", "trtllm-engine"
_TAKE = {_EMBEDDED: take_embedded, _TRTLLM: take_trtllm, _ENGINE: trtllm_engine_settings.take_engine}
_FILES = {_EMBEDDED: embedded_files, _TRTLLM: trtllm_deploy.deploy_files, _ENGINE: trtllm_deploy.deploy_files}
_MISTAKES = {_TRTLLM: trtllm_mistakes, _ENGINE: engine_mistakes}


def _no_problems(_: Plan) -> Sequence[Problem]:
    return ()


def make_plan(
    loaded: LoadedRecipe,
    facts: ModelFacts,
    source: Source,
    tools: Mapping[str, Mapping[str, str | None]],
    *,
    check: Callable[[Plan], Sequence[Problem]] = _no_problems,
    draft: Draft | None = None,
) -> Plan:
    """The plan of one recipe for one model.

    Args:
        loaded: the recipe as written.
        facts: what the checkpoint's files say.
        source: where the checkpoint lies.
        tools: for each kind of step, the versions that decide its bytes.
        check: what else is wrong with the recipe, seen from the drafted plan: its files, its deployment.
        draft: what the files of ``speculative.draft`` say, where the runtime takes one.

    Raises:
        RecipeError: every mistake in the recipe, and every demand that cannot be met, together.
        CompatibilityError: without mistakes, every demand that this runtime, model or version of trtbuild cannot meet.
    """
    settings = Settings(loaded.recipe, loaded.document, loaded.overridden, draft=draft)
    kind = loaded.recipe.runtime.kind
    resolve(settings, facts, _TAKE[kind], _FILES[kind])
    plan = _draft(settings, facts, source, tools)
    mistakes = [
        *settings.problems,
        *memory_mistakes(settings, facts),
        *mixed_settings.mixed_mistakes(settings, facts),
        *(_MISTAKES[kind](settings) if kind in _MISTAKES else ()),
        *check(plan),
    ]
    refused = [*recipe_refusals(settings, facts), *model_refusals(facts, loaded.recipe)]
    if mistakes:
        raise RecipeError([*mistakes, *refused])
    if refused:
        raise CompatibilityError("\n".join(str(problem) for problem in refused))
    return plan


def _draft(
    settings: Settings, facts: ModelFacts, source: Source, tools: Mapping[str, Mapping[str, str | None]]
) -> Plan:
    """The plan as the settings say it, which holds only if nothing is wrong with them."""
    return Plan(
        source=source,
        facts=facts,
        values=tuple(settings.values),
        steps=_steps(settings, facts, tools),
        gates={
            name: settings[f"quality.{name}"]
            for name in ("max_perplexity_ratio", "max_kl_divergence", "min_top1_agreement")
        },
        estimates=_estimates(settings, facts),
        warnings=_warnings(settings, facts),
        comparison=None if _kind(settings) == _EMBEDDED else compare(settings, facts),
        arguments=trtllm_engine_settings.build_choices(settings, facts) if _kind(settings) == _ENGINE else (),
        draft_arguments=trtllm_engine_settings.draft_choices(settings, facts) if _kind(settings) == _ENGINE else (),
    )


def _steps(settings: Settings, facts: ModelFacts, tools: Mapping[str, Mapping[str, str | None]]) -> tuple[Step, ...]:
    compress = _compress_parameters(settings)
    compressed = is_compressed(settings)
    engine = _engine_parameters(settings, facts)
    evaluate = {name: _numerics(settings, name) for name in ("device", "compute_dtype", "weights")} | {
        "kv_cache_dtype": _kv_cache_dtype(settings),
        "tokens": settings["quality.tokens"],
        "length": _evaluation_length(settings),
        "trust_remote_code": settings["model.trust_remote_code"],
        "calibration_column": settings["compress.calibration.column"] if compressed else None,
    }
    if compressed and settings["compress.calibration.split"] is not None:
        evaluate["calibration_split"] = settings["compress.calibration.split"]
    evaluate |= _joined_scales(settings, facts)
    drafts = draft_steps(settings, facts, tools, _numerics(settings, "device"))
    inputs, convert = ("compress", *(step.kind for step in drafts)), _kind(settings) == _ENGINE
    return (
        Step("fetch", {}, (), {}),
        Step("compress", compress, ("fetch",), tools["compress" if compressed else "copy"], _compress_files(settings)),
        *drafts,
        Step("engine", engine, inputs, tools["convert" if convert else "engine"], _engine_files(settings)),
        Step("repository", _repository_parameters(settings, facts), (), tools["repository"]),
        Step("deploy", _deploy_parameters(settings, facts), ("engine",), tools["deploy"]),
        # Limits of the engine do not change a logit: the evaluation follows the checkpoint and the numerics alone.
        Step("evaluate", evaluate, ("fetch", "compress"), tools["evaluate"], _evaluate_files(settings)),
    )


def _joined_scales(settings: Settings, facts: ModelFacts) -> dict[str, Any]:
    """How the runtime changes FP8 scales at load, which quality is measured with; `runtime/joined.py` has the sources.

    TensorRT engines leave gate and up apart where `use_fused_mlp` is off, and where the activation is Gemma's
    (NVIDIA/TensorRT-LLM, tensorrt_llm/models/modeling_utils.py @34a267279384, fuse_gate_mlp: silu and gelu alone).
    """
    kind, cache = _kind(settings), settings["compress.kv_cache"] != "none"
    fp8 = "fp8" in settings.recipe.compress.formats
    if kind == _ENGINE and not fp8 and cache:
        return {"joined_scales": {"layers": False, "gate_up": False, "kv_cache": True, "intermediate": "float32"}}
    if not fp8 or kind == _EMBEDDED:
        return {}
    if kind == _TRTLLM:
        return {"joined_scales": {"gate_up": True, "kv_cache": False, "intermediate": "bfloat16"}}
    fused = settings.recipe.runtime.extra.get("use_fused_mlp") != "disable"
    gate_up = fused and not facts.architecture.startswith("Gemma")
    return {"joined_scales": {"gate_up": gate_up, "kv_cache": True, "intermediate": "float32"}}


def _compress_parameters(settings: Settings) -> dict[str, Any]:
    names = ("format", "group_size", "kv_cache", "sparsity", "sparsity_method", "exclude")
    parameters = {name: settings[f"compress.{name}"] for name in names}
    parameters["exclude"] = list(parameters["exclude"])
    parameters["trust_remote_code"] = settings["model.trust_remote_code"]
    parameters |= mixed_settings.compress_parameters(settings)
    if is_compressed(settings):
        parameters["device"] = _numerics(settings, "device")
        calibration = ("column", "split", "count", "length", "packing", "seed")
        parameters["calibration"] = {name: settings[f"compress.calibration.{name}"] for name in calibration}
        if settings["compress.calibration.data"] == SELF:
            parameters["calibration"]["data"] = SELF
    return parameters


def _compress_files(settings: Settings) -> dict[str, str]:
    return _files(data=_calibration_data(settings), tokenizer=settings["model.tokenizer"])


def _evaluate_files(settings: Settings) -> dict[str, str]:
    """Held-out text, and the calibration text that it must not be."""
    return _files(data=settings["quality.data"], calibration=_calibration_data(settings))


def _calibration_data(settings: Settings) -> str | None:
    """The user's own calibration text, where there is some."""
    data = settings["compress.calibration.data"] if is_compressed(settings) else None
    return None if data == SELF else data


def _adapter_files(settings: Settings) -> dict[str, str]:
    """The directories of LoRA adapters, by the name that clients send."""
    return {} if _kind(settings) == _EMBEDDED else adapter_names(settings.recipe)


def _engine_files(settings: Settings) -> dict[str, str]:
    """What the engine step reads of the user's besides the checkpoint."""
    drafts = {_ENGINE: draft_files, _TRTLLM: llm_draft_files, _EMBEDDED: embedded_draft_files}[_kind(settings)]
    return _adapter_files(settings) | drafts(settings)


def _kind(settings: Settings) -> str:
    return settings.recipe.runtime.kind


def _numerics(settings: Settings, name: str) -> str:
    """How the embedded engine computes; packages of other runtimes are calibrated and measured as it likes best."""
    return settings[f"runtime.{name}"] if _kind(settings) == _EMBEDDED else "auto"


def _kv_cache_dtype(settings: Settings) -> str:
    return "auto" if settings["compress.kv_cache"] == "none" else str(settings["compress.kv_cache"])


def _evaluation_length(settings: Settings) -> int:
    """Tokens predicted in a window: what a served request can hold too, so that both measure the same windows."""
    return min(_EVALUATION_LENGTH, settings["serving.max_input_tokens"] - 1, settings["runtime.max_seq_len"] - 2)


def _files(**paths: str | None) -> dict[str, str]:
    return {role: path for role, path in paths.items() if path is not None}


def _engine_parameters(settings: Settings, facts: ModelFacts) -> dict[str, Any]:
    if _kind(settings) == _TRTLLM:
        return trtllm_settings.engine_parameters(settings)
    if _kind(settings) == _ENGINE:
        return trtllm_engine_settings.engine_parameters(settings, facts)
    return _embedded_parameters(settings)


def _embedded_parameters(settings: Settings) -> dict[str, Any]:
    """The contents of ``engine.json``."""
    names = (
        *("max_batch_size", "max_num_tokens", "max_seq_len", "capacity_scheduler_policy", "enable_chunked_prefill"),
        *("device", "compute_dtype", "weights"),
    )
    cache = ("tokens_per_block", "max_tokens", "free_gpu_memory_fraction", "enable_block_reuse")
    kv_cache = {name: settings[f"runtime.kv_cache.{name}"] for name in cache}
    kv_cache["dtype"] = _kv_cache_dtype(settings)
    return (
        {
            "schema_version": 1,
            "runtime": settings["runtime.kind"],
            "kv_cache": kv_cache,
            "trust_remote_code": settings["model.trust_remote_code"],
        }
        | {name: settings[f"runtime.{name}"] for name in names}
        | speculation_parameters(settings)
    )


def _repository_parameters(settings: Settings, facts: ModelFacts) -> dict[str, Any]:
    names = ("layout", "model_name", "streaming", "max_input_tokens", "max_output_tokens", "default_max_tokens")
    parameters = {name: settings[f"serving.{name}"] for name in names} | {
        "runtime": settings["runtime.kind"],
        "max_seq_len": settings["runtime.max_seq_len"],
        "trust_remote_code": settings["model.trust_remote_code"],
    }
    if _kind(settings) == _ENGINE:
        parameters["engine"] = trtllm_engine_settings.server_parameters(settings, facts)
        parameters |= trtllm_engine_settings.draft_server_parameters(settings, facts)
        parameters |= trtllm_engine_settings.older_line(settings)
        parameters |= {"lora_adapters_dir": ADAPTERS} if settings.recipe.model.adapters else {}
    if settings["serving.layout"] != "llm":
        parameters["max_batch_size"] = settings["runtime.max_batch_size"]
    if _kind(settings) == _TRTLLM:
        parameters |= trtllm_settings.server_parameters(settings)
    adapters = _adapter_files(settings) if _kind(settings) == _TRTLLM else {}
    return parameters | ({"lora_adapters": {name: f"adapters/{name}" for name in adapters}} if adapters else {})


def _deploy_parameters(settings: Settings, facts: ModelFacts) -> dict[str, Any]:
    more = {} if _kind(settings) == _EMBEDDED else trtllm_deploy.deploy_parameters(settings, facts)
    return more | {
        "image": settings["deploy.image"],
        "labels": dict(settings["deploy.labels"]),
        "files": list(settings["deploy.files"]),
        "model_name": settings["serving.model_name"],
        "runtime": settings["runtime.kind"],
    }


def _estimates(settings: Settings, facts: ModelFacts) -> dict[str, int]:
    """Sizes in bytes that follow from the facts: the checkpoint's file, the memory to make it, and the KV cache."""
    bits = mixed_settings.planned_bits(settings)
    rest = facts.parameters - facts.linear_parameters
    bits_in_cache = KV_CACHE_BITS.get(settings["compress.kv_cache"], 8 * _KV_BYTES[_kind(settings)])
    per_token = int(facts.kv_bytes_per_token(1) * bits_in_cache / 8)
    estimates = {
        "checkpoint_bytes": int(facts.linear_parameters * bits / 8) + 2 * rest,
        "compress_peak_memory_bytes": peak_bytes(settings, facts),
        "kv_bytes_per_token": per_token,
    }
    if settings["runtime.kv_cache.max_tokens"] is not None:
        estimates["kv_cache_bytes"] = per_token * settings["runtime.kv_cache.max_tokens"]
    return estimates


def _warnings(settings: Settings, facts: ModelFacts) -> tuple[str, ...]:
    warnings = [*mixed_settings.warnings(settings), *sparsity_warnings(settings)]
    if not facts.has_chat_template:
        warnings.append("the checkpoint has no chat template: requests with `messages` will be refused")
    if _kind(settings) == _EMBEDDED:
        warnings += speculation_warnings(settings)
    if _kind(settings) == _TRTLLM:
        warnings += trtllm_warnings(settings, facts)
    if _kind(settings) == _ENGINE:
        warnings += engine_warnings(settings, facts)
    return tuple(warnings)
