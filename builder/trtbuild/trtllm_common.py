"""What both flows of TensorRT-LLM refuse alike: settings of the embedded engine, GPUs, layers left out in part."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Sequence

from trtbuild.errors import Problem
from trtbuild.model import ModelFacts
from trtbuild.recipe import Recipe
from trtbuild.releases import Line
from trtbuild.settings import Settings, fitting_group_sizes
from trtbuild.support import QUANT_ALGO, group_sizes, refused_format, sm_version, unknown_gpu

_EMBEDDED_ONLY = "only the embedded runtime has it"
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


def group_refusals(settings: Settings, facts: ModelFacts) -> Iterable[Problem]:
    """INT4 groups that the kernels do not take."""
    group, allowed = settings["compress.group_size"], group_sizes("W4A16_AWQ")
    if settings["compress.format"] == "int4_awq" and group is not None and group not in allowed:
        sizes = " or ".join(map(str, allowed))
        message = f"{group}: TensorRT-LLM's INT4 kernels take groups of {sizes} only"
        fitting = [size for size in allowed if size in fitting_group_sizes(facts)]
        hint = f"use {' or '.join(map(str, fitting))}" if fitting else "neither divides every layer: use another format"
        yield Problem("compress.group_size", message, f"{hint}, such as fp8" if not fitting else hint)


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


def instance_mistakes(recipe: Recipe, ranks: int) -> Iterable[Problem]:
    """Each model instance needs one GPU a rank; instances may share GPUs, ranks may not."""
    for place, group in enumerate(recipe.serving.gpu_device_ids):
        at = f"serving.gpu_device_ids.{place}"
        if len(group) != ranks:
            message = f"names {len(group)} GPUs, and one engine takes {ranks} (tensor x pipeline x context parallel)"
            yield Problem(at, message, f"name {ranks}")
        elif len(set(group)) != len(group):
            yield Problem(at, f"{list(group)} names a GPU twice", "give each rank a GPU of its own")


def gpu_refusals(recipe: Recipe, line: Line, needed: int) -> Iterable[Problem]:
    """Too few GPUs, an unknown one, or one that does not run the format; `needed` is the number of ranks."""
    count = recipe.target.count
    if count is not None and count < needed:
        message = f"{count} GPUs, but tensor x pipeline x context parallel need {needed}"
        yield Problem("target.count", message, f"use {needed}, or lower the parallel sizes")
    if recipe.target.gpu is None:
        return
    sm = sm_version(recipe.target.gpu)
    if sm is None:
        yield unknown_gpu(recipe.target.gpu)
        return
    at = f"{recipe.target.gpu} (SM{sm})"
    why = refused_format(line, QUANT_ALGO[recipe.compress.format], sm)
    if why is not None:
        yield Problem("compress.format", f"{recipe.compress.format} does not run on {at}: {why}", "use another format")
    if recipe.compress.kv_cache != "none":
        why = refused_format(line, f"kv:{recipe.compress.kv_cache.upper()}", sm)
        if why is not None:
            message = f"{recipe.compress.kv_cache} does not run on {at}: {why}"
            yield Problem("compress.kv_cache", message, "use none")
