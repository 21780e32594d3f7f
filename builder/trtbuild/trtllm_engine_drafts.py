"""Speculation with TensorRT engines: values, what the engines are built for, what the server reads, what is refused.

Methods and what they need, from NVIDIA/TensorRT-LLM: docs/source/legacy/advanced/speculative-decoding.md @28af34e8,
examples/lookahead/README.md @7ed07f06 (the longest draft of three sizes; GPUs and formats), tensorrt_llm/builder.py
@14e801da (what a mode adds to the limits; bounds of EAGLE).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from trtbuild.compat import facts as table
from trtbuild.draft import DRAFT_ROLE, HEADS, HEADS_ROLE, MEDUSA_ROLE, Draft
from trtbuild.errors import CompatibilityError, Problem
from trtbuild.model import ModelFacts
from trtbuild.setting_values import Settings
from trtbuild.support import quant_algo, refused_architecture, speculative_method
from trtbuild.trtllm_build import EngineSpec, Limits, Speculation, arguments, choose
from trtbuild.trtllm_common import draft_refusals
from trtbuild.trtllm_medusa import MEDUSA_CLASS, medusa_heads, medusa_parameters, medusa_refusals, take_medusa

DRAFT_TARGET = "draft_target"
_LOOKAHEAD = ("max_window_size", "max_ngram_size", "max_verification_set_size")
_LOOKAHEAD_SIZES = (7, 7, 7)  # upstream's example
_LOOKAHEAD_FORMATS, _LOOKAHEAD_FROM = ("none", "fp8"), 80
_USUAL_DRAFT = 5
_LEAST_SHARE = 0.05
_EAGLE_BATCH, _EAGLE_DRAFT = 512, 256
_DECODING_MODE = {"medusa": "medusa", "eagle": "eagle", "redrafter": "redrafter", "lookahead": "lookahead"}
_AT = "speculative.method"


def take_speculative(settings: Settings, facts: ModelFacts) -> None:
    """The values of the section, besides the method itself."""
    section = settings.recipe.speculative
    if section.method in (DRAFT_TARGET, *HEADS):
        settings.take("speculative.draft")
    if section.method == DRAFT_TARGET:
        settings.take("speculative.max_draft_len", _USUAL_DRAFT)
        share, origin = _share(settings.draft, facts)
        settings.take("speculative.draft_kv_cache_share", share, origin)
    elif (alone := medusa_heads(settings)) is not None:
        take_medusa(settings, alone)
    elif section.method in HEADS:
        heads = settings.draft.heads if settings.draft else None
        settings.put(
            "speculative.max_draft_len", heads.max_draft_len if heads else None, "the checkpoint with the heads"
        )
        if section.choices is not None:
            settings.take("speculative.choices")
    elif section.method == "lookahead":
        for name, usual in zip(_LOOKAHEAD, _LOOKAHEAD_SIZES, strict=True):
            settings.take(f"speculative.{name}", usual)
        settings.put("speculative.max_draft_len", _lookahead_len(settings), "follows from the three sizes")


def _share(draft: Draft | None, facts: ModelFacts) -> tuple[float | None, str]:
    """Both engines hold the same tokens: the memory is divided by what a token takes in each."""
    if draft is None or draft.facts is None:
        return None, "default"
    ours, theirs = facts.kv_elements_per_token, draft.facts.kv_elements_per_token
    return max(round(theirs / (ours + theirs), 3), _LEAST_SHARE), "models: by bytes a token"


def _lookahead_len(settings: Settings) -> int:
    window, ngram, verified = (settings[f"speculative.{name}"] for name in _LOOKAHEAD)
    return int((0 if ngram == 1 else ngram - 2) + (window - 1 + verified) * (ngram - 1))


def speculation(settings: Settings) -> Speculation | None:
    """What the engine of the model itself is built for."""
    method = settings.recipe.speculative.method
    mode = None if method == "none" else speculative_method(method).engine
    if mode is None:
        return None
    heads = settings.draft.heads if settings.draft else None
    longest = settings["speculative.max_draft_len"] or 1
    return Speculation(mode=mode, max_draft_len=longest, more_len=heads.more_len if heads else 0)


def with_drafts(spec: EngineSpec, settings: Settings) -> EngineSpec:
    """`spec` with what the speculative method changes in it.

    Every round of drafts sends the answer so far as a prompt: prompts may grow to the longest sequence. A checkpoint
    with heads has a class of its own.
    """
    made = replace(spec, speculation=speculation(settings))
    if settings.recipe.speculative.method == DRAFT_TARGET:
        return replace(made, limits=replace(spec.limits, max_input_len=spec.limits.max_seq_len - 1))
    if medusa_heads(settings) is not None:
        return replace(made, architecture=MEDUSA_CLASS)
    heads = settings.draft.heads if settings.draft else None
    return made if heads is None else replace(made, architecture=heads.architecture)


def draft_spec(spec: EngineSpec, settings: Settings) -> EngineSpec | None:
    """The draft model's engine: the same GPUs, requests and lengths as the model's own."""
    facts = settings.draft.facts if settings.draft else None
    if settings.recipe.speculative.method != DRAFT_TARGET or facts is None:
        return None
    quantized = facts.quantization.parameters if facts.quantization else {}
    limits = spec.limits
    return EngineSpec(
        version=spec.version,
        architecture=facts.architecture,
        format=_algo(quantized.get("quant_algo")),
        kv_cache=_algo(quantized.get("kv_cache_quant_algo")),
        gpu=spec.gpu,
        tp_size=spec.tp_size,
        pp_size=spec.pp_size,
        limits=Limits(
            max_batch_size=limits.max_batch_size,
            max_seq_len=limits.max_seq_len,
            max_num_tokens=limits.max_num_tokens,
            max_input_len=limits.max_seq_len - 1,
            tokens_per_block=limits.tokens_per_block,
        ),
        experts=bool(facts.num_experts),
    )


def _algo(name: Any) -> str | None:
    return None if name in (None, "NO_QUANT") else str(name)


def draft_parameters(engine: dict[str, Any], spec: EngineSpec, settings: Settings) -> dict[str, Any]:
    """What the engine step makes besides: the draft's engine directory, the checkpoint with the heads, or heads."""
    heads, made = settings.draft.heads if settings.draft else None, draft_spec(spec, settings)
    if made is not None:
        names = ("runtime", "version", "container", "image", "world_size", "dtype", "trust_remote_code")
        return {
            "draft": {name: engine[name] for name in names}
            | {"spec": asdict(made), "arguments": list(_arguments(made))}
        }
    return medusa_parameters(settings) if heads is None else {"heads": asdict(heads), "dtype": heads.dtype}


def _arguments(spec: EngineSpec) -> tuple[str, ...]:
    """The argument list, or none where the plan is about to be refused for it."""
    try:
        return arguments(choose(spec), "CHECKPOINT", "ENGINE")
    except CompatibilityError:
        return ()


def draft_files(settings: Settings) -> dict[str, str]:
    """The directory that the engine step reads, by its role."""
    section = settings.recipe.speculative
    if section.draft is None or section.method not in (DRAFT_TARGET, *HEADS):
        return {}
    heads = HEADS_ROLE if medusa_heads(settings) is None else MEDUSA_ROLE
    return {DRAFT_ROLE if section.method == DRAFT_TARGET else heads: section.draft}


def decoding_parameters(settings: Settings) -> dict[str, Any]:
    """What the server of the model itself reads."""
    section = settings.recipe.speculative
    mode = _DECODING_MODE.get(section.method)
    more: dict[str, Any] = {} if mode is None else {"decoding_mode": mode}
    if section.method == "lookahead":
        more |= {
            theirs: settings[f"speculative.{ours}"]
            for ours, theirs in zip(
                _LOOKAHEAD,
                ("lookahead_window_size", "lookahead_ngram_size", "lookahead_verification_set_size"),
                strict=True,
            )
        }
    if settings.has("speculative.choices"):
        more[f"{section.method}_choices"] = settings["speculative.choices"]
    return more


def shared_fraction(settings: Settings) -> tuple[float, float]:
    """The shares of the free GPU memory that the caches of model and draft take; 0 where there is no draft.

    They add up to the recipe's, since nothing says which of the two engines looks for free memory first.
    """
    whole = settings["runtime.kv_cache.free_gpu_memory_fraction"]
    if settings.recipe.speculative.method != DRAFT_TARGET:
        return whole, 0.0
    share = settings["speculative.draft_kv_cache_share"] or _LEAST_SHARE
    return round(whole * (1 - share), 4), round(whole * share, 4)


def speculative_refusals(settings: Settings, facts: ModelFacts) -> Iterable[Problem]:
    """Methods and combinations that do not exist, and drafts that do not fit the model."""
    recipe = settings.recipe
    method = recipe.speculative.method
    if method == "none":
        return
    if speculative_method(method).engine is None:
        yield Problem(_AT, f"{method}: trtllm-build has no such mode", "use none, or runtime.kind: trtllm")
        return
    if recipe.runtime.pipeline_parallel_size > 1:
        stages = recipe.runtime.pipeline_parallel_size
        message = f"speculative decoding does not run with pipeline_parallel_size {stages}"
        yield Problem(_AT, message, "use tensor_parallel_size instead, or no speculation")
    if recipe.runtime.guided_decoding_backend is not None and method != DRAFT_TARGET:
        message = f"{method}: drafts do not follow a grammar"
        yield Problem(_AT, message, "use none, or remove runtime.guided_decoding_backend")
    if method in (DRAFT_TARGET, *HEADS) and recipe.speculative.draft is None and recipe.speculative.train is None:
        what = "a draft model" if method == DRAFT_TARGET else "TensorRT-LLM's checkpoint of model and heads"
        yield Problem("speculative.draft", f"is missing, and {method} needs {what}", "name its directory")
    if method == DRAFT_TARGET:
        yield from _draft_target(settings, facts)
    elif method == "lookahead":
        yield from _lookahead(settings)
    elif method in HEADS:
        yield from _heads(settings, facts)
        yield from medusa_refusals(settings, facts)


def _draft_target(settings: Settings, facts: ModelFacts) -> Iterable[Problem]:
    if not settings["runtime.kv_cache.enable_block_reuse"]:
        message = "false: every round of drafts would compute the whole prompt again"
        yield Problem("runtime.kv_cache.enable_block_reuse", message, "remove it, or use speculative.method: none")
    if settings["compress.kv_cache"] == "fp8" and settings.recipe.compress.formats != ("fp8",):
        message = (
            "fp8 without FP8 weights: trtllm-build turns attention over a paged context off, and drafts are verified "
            "by it"
        )
        yield Problem("compress.kv_cache", message, "use none, or compress.format: fp8")
    draft = settings.draft.facts if settings.draft else None
    if draft is None:
        return
    name = draft.architecture
    reason, converted = refused_architecture(name), table("architectures")["engine"]["converted"]
    if reason is None and converted.get(name) != draft.model_type:
        reason = f"{name} ({draft.model_type}) has no conversion here"
    yield from draft_refusals(settings, facts, draft, reason)


def _lookahead(settings: Settings) -> Iterable[Problem]:
    others = [name for name in settings.recipe.compress.formats if name not in _LOOKAHEAD_FORMATS]
    if others:
        message = f"lookahead: upstream lists it for bf16, fp16 and FP8 only, not for {', '.join(others)}"
        yield Problem(_AT, message, "use another compress.format or no speculation")
    if settings["speculative.max_draft_len"] < 1:
        at = "speculative.max_ngram_size"
        yield Problem(at, "1: nothing would be looked ahead", "use 2 or more")


def _heads(settings: Settings, facts: ModelFacts) -> Iterable[Problem]:
    """The checkpoint with the heads is built as it is: everything that the recipe says of it must be so."""
    heads, method = settings.draft.heads if settings.draft else None, settings.recipe.speculative.method
    if heads is None:
        return
    kv_cache = settings["compress.kv_cache"]
    said = {
        "tensor_parallel_size": (heads.tp_size, settings.recipe.runtime.tensor_parallel_size),
        "pipeline_parallel_size": (heads.pp_size, settings.recipe.runtime.pipeline_parallel_size),
        "compress.format": (heads.format, quant_algo(settings.recipe.compress.formats)),
        "compress.kv_cache": (heads.kv_cache, None if kv_cache == "none" else kv_cache.upper()),
        "the model's hidden size": (heads.hidden_size, facts.hidden_size),
        "the model's number of layers": (heads.num_layers, facts.num_layers),
    }
    for what, (theirs, ours) in said.items():
        if theirs != ours:
            message = f"was converted with {theirs or 'none'}, and {what} is {ours or 'none'}"
            yield Problem("speculative.draft", message, "make the recipe and the converted checkpoint agree")
    choices, longest = settings.recipe.speculative.choices, heads.max_draft_len
    if choices is not None and not 0 < len(choices) <= longest:
        message = f"{len(choices)} paths, and the heads were converted for a max_draft_len of {longest}"
        yield Problem("speculative.choices", message, f"name 1 to {longest}")
    if choices is not None and not all(choices):
        yield Problem("speculative.choices", "holds an empty path", "name at least one draft in each")
    if method == "eagle" and settings["runtime.max_batch_size"] > _EAGLE_BATCH:
        message = f"{settings['runtime.max_batch_size']}: EAGLE takes at most {_EAGLE_BATCH}"
        yield Problem("runtime.max_batch_size", message, f"use {_EAGLE_BATCH}")
    if method == "eagle" and longest > _EAGLE_DRAFT:
        message = f"was converted for drafts of {longest} tokens, EAGLE takes at most {_EAGLE_DRAFT}"
        yield Problem("speculative.draft", message, "convert it again")


def speculative_warnings(settings: Settings, facts: ModelFacts) -> list[str]:
    """What is allowed and may still surprise."""
    method, draft = settings.recipe.speculative.method, settings.draft.facts if settings.draft else None
    warnings = []
    if draft is not None and draft.vocab_size != facts.vocab_size:
        warnings.append(
            f"the draft's vocabulary has {draft.vocab_size} entries and the model's {facts.vocab_size}: requests with "
            "use_draft_logits will fail, others are answered"
        )
    if settings.draft is not None and settings.draft.heads is not None:
        warnings.append(
            "the engine is built from the checkpoint with the heads; quality is measured on the checkpoint that "
            "trtbuild makes of model.path"
        )
    if method in ("medusa", "eagle"):
        warnings.append(f"{method} answers as without drafts for greedy requests; sampled ones follow its own rule")
    return warnings
