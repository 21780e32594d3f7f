"""What both flows of TensorRT-LLM refuse alike: settings of the embedded engine, GPUs, layers left out in part."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from trtbuild.compress_settings import fitting_group_sizes
from trtbuild.errors import Problem
from trtbuild.format_support import Part, nearest, refused_experts, refused_flow, refused_gpu
from trtbuild.model import ModelFacts
from trtbuild.recipe import Recipe
from trtbuild.releases import Flow, Line
from trtbuild.setting_values import Settings
from trtbuild.support import QUANT_ALGO, group_sizes, sm_version, unknown_gpu
from trtbuild.trtllm_instances import count_refusals
from trtbuild.trtllm_parallel import divides_heads

_EMBEDDED_ONLY = "only the embedded runtime has it"
# What each speculative method reads of its section.
SPECULATIVE_FIELDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "ngram": ("max_draft_len",),
    "draft_target": ("draft", "max_draft_len", "draft_kv_cache_share"),
    "eagle3": ("draft", "max_draft_len"),
    "mtp": ("max_draft_len",),
    "medusa": ("draft", "choices"),
    "eagle": ("draft", "choices"),
    "redrafter": ("draft",),
    "lookahead": ("max_window_size", "max_ngram_size", "max_verification_set_size"),
}
_ADAPTER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_JOINED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)


def embedded_only(recipe: Recipe) -> Iterable[Problem]:
    """What the embedded engine alone has."""
    for name in ("device", "compute_dtype", "weights"):
        value = getattr(recipe.runtime, name)
        if value != "auto":
            yield Problem(f"runtime.{name}", f"{value}: {_EMBEDDED_ONLY}", "use auto")


def unread_speculative(recipe: Recipe, fields: Mapping[str, tuple[str, ...]] = SPECULATIVE_FIELDS) -> Iterable[Problem]:
    """Fields of the section that say nothing about its method; `fields` are what each method reads.

    `train` is judged where its own values are, and so are the layers that a draft is to be trained on.
    """
    section, silent = recipe.speculative, type(recipe.speculative)()
    judged = ("method", "train", *(("eagle3_layers_to_capture",) if section.train is not None else ()))
    for name in type(section).model_fields:
        value = getattr(section, name)
        if name in judged or value == getattr(silent, name) or name in fields[section.method]:
            continue
        why = "of no use without a speculative.method" if section.method == "none" else f"{section.method} has none"
        yield Problem(f"speculative.{name}", f"{value}: {why}", "remove it")


def group_refusals(settings: Settings, facts: ModelFacts) -> Iterable[Problem]:
    """INT4 groups that the kernels do not take."""
    group, named = settings["compress.group_size"], settings.recipe.compress.formats
    each = [set(taken) for name in named if (taken := group_sizes(QUANT_ALGO[name] or ""))]
    allowed = sorted(set.intersection(*each)) if each else []
    if allowed and group is not None and group not in allowed:
        sizes = " or ".join(map(str, allowed))
        message = f"{group}: TensorRT-LLM's INT4 kernels take groups of {sizes} only"
        fitting = [size for size in allowed if size in fitting_group_sizes(facts)]
        none_fits = "neither divides every layer" if len(allowed) > 1 else "it does not divide every layer"
        hint = f"use {' or '.join(map(str, fitting))}" if fitting else f"{none_fits}: use another format"
        yield Problem("compress.group_size", message, f"{hint}, such as fp8" if not fitting else hint)


def block_refusals(settings: Settings) -> Iterable[Problem]:
    """Blocks of the KV cache that the kernels do not take.

    NVIDIA/TensorRT-LLM cpp/tensorrt_llm/kernels/kvCacheUtils.h @0ccf9032, which its own attention kernels go by.
    """
    size = settings["runtime.kv_cache.tokens_per_block"]
    if size & (size - 1) and settings.recipe.runtime.attn_backend in (None, "TRTLLM"):
        message = f"{size}: TensorRT-LLM's blocks hold a power of two of tokens"
        yield Problem("runtime.kv_cache.tokens_per_block", message, f"use {1 << (size.bit_length() - 1)}")


def excluded_in_part(patterns: Sequence[str], facts: ModelFacts) -> Iterable[Problem]:
    """Projections that TensorRT-LLM joins must be quantized together; by the names that most decoders give them."""
    for layer, names in itertools.product(range(facts.num_layers if patterns else 0), _JOINED):
        modules = [f"model.layers.{layer}.{name}" for name in names]
        left = [name for name in modules if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        if left and len(left) < len(modules):
            rest = next(name for name in modules if name not in left)
            message = f"names {left[0]}, but not {rest}: TensorRT-LLM joins them into one layer"
            yield Problem("compress.exclude", message, "name all of them or none")
            return


def gpu_refusals(recipe: Recipe, flow: Flow, line: Line, ranks: int) -> Iterable[Problem]:
    """Too few GPUs, an unknown one, or formats that it or the flow does not run; `ranks` are those of one engine."""
    yield from count_refusals(recipe, ranks)
    sm = sm_version(recipe.target.gpu) if recipe.target.gpu is not None else None
    if recipe.target.gpu is not None and sm is None:
        yield unknown_gpu(recipe.target.gpu)
    yield from _format_refusals(recipe, flow, line, sm)


def _format_refusals(recipe: Recipe, flow: Flow, line: Line, sm: int | None) -> Iterable[Problem]:
    """Formats that the flow does not load, or the GPU does not run, with the nearest that both do."""
    for field, part, name in _parts(recipe):
        why = refused_flow(part, name, flow, line)
        if why is not None:
            message = f"{name}: {why}"
        elif sm is not None and (why := refused_gpu(part, name, flow, line, sm)) is not None:
            message = f"{name} does not run on {recipe.target.gpu} (SM{sm}): {why}"
        else:
            continue
        yield Problem(f"compress.{field}", message, f"use {nearest(part, name, flow, line, sm) or 'another GPU'}")


def expert_refusals(recipe: Recipe, flow: Flow, facts: ModelFacts) -> Iterable[Problem]:
    """Mixtures of experts in a format that the flow loads for other layers only."""
    if not facts.num_experts or in_part(recipe):
        return
    for name in recipe.compress.formats:
        why = refused_experts(name, flow)
        if why is not None:
            yield Problem("compress.format", f"{name}: {why}", "use fp8 or none")


def in_part(recipe: Recipe) -> bool:
    """Whether a format is for some layers only; which they are shows in the checkpoint."""
    return bool(recipe.compress.exclude or recipe.compress.overrides or recipe.compress.format == "auto")


def _parts(recipe: Recipe) -> list[tuple[str, Part, str]]:
    """The recipe's formats: field, part of the table, name."""
    parts: list[tuple[str, Part, str]] = [("kv_cache", "kv_cache", recipe.compress.kv_cache)]
    return [("format", "weights", name) for name in recipe.compress.formats or ("none",)] + parts


def adapter_names(recipe: Recipe) -> dict[str, str]:
    """Adapters by the name that clients send: the last part of the path, and its place in the recipe."""
    return {PurePosixPath(path).name: path for path in recipe.model.adapters}


def adapter_refusals(recipe: Recipe, *, always: bool = False) -> Iterable[Problem]:
    """Adapters without usable names, modules or rank; `always` also where there are none: clients may send them."""
    lora, adapters = recipe.runtime.lora_config, recipe.model.adapters
    if not adapters and not always:
        return
    names = [PurePosixPath(path).name for path in adapters]
    for path, name in zip(adapters, names, strict=True):
        if not _ADAPTER.fullmatch(name):
            message = f"{path}: {name!r} is no name that clients could send"
            yield Problem(
                "model.adapters", message, "name the adapter's directory itself, in letters, digits, . _ and -"
            )
    for name in sorted({name for name in names if names.count(name) > 1}):
        message = f"two adapters are called {name}; clients ask for an adapter by its directory's name"
        yield Problem("model.adapters", message, "rename one directory")
    if not lora.lora_target_modules:
        message = "is empty; without it TensorRT-LLM keeps room for every module"
        yield Problem("runtime.lora_config.lora_target_modules", message, "name the adapters' modules, such as attn_q")
    if lora.max_lora_rank is None:
        message = "is not set; an adapter of a higher rank than the default would be refused at its first request"
        yield Problem("runtime.lora_config.max_lora_rank", message, "set the adapters' highest rank")


def draft_refusals(
    settings: Settings, facts: ModelFacts, draft: ModelFacts, unrunnable: str | None
) -> Iterable[Problem]:
    """A draft model that does not fit the model; `unrunnable` is why the runtime has no such class, if it has none."""
    at, other = "speculative.draft", "use another draft model"
    if unrunnable is not None:
        yield Problem(at, unrunnable, other)
    if draft.remote_code and not settings.recipe.model.trust_remote_code:
        yield Problem(at, "the checkpoint carries Python code (auto_map in config.json)", other)
    longest, tensor = settings["runtime.max_seq_len"], settings.recipe.runtime.tensor_parallel_size
    if draft.context_length < longest:
        message = f"knows {draft.context_length} positions, and runtime.max_seq_len is {longest}"
        yield Problem(at, message, f"use runtime.max_seq_len: {draft.context_length}, or another draft model")
    if tensor > 1 and not divides_heads(draft, tensor):
        message = f"cannot be divided over the {tensor} ranks of the model"
        yield Problem(at, message, "use another tensor_parallel_size or another draft model")
    if draft.parameters >= facts.parameters:
        message = f"has {draft.parameters} parameters, no fewer than the model's {facts.parameters}"
        yield Problem(at, message, "use a smaller model: drafts that cost as much as answers save nothing")
