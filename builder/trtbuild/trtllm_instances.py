"""Instances of a model on the GPUs of one host: which GPUs they name, what they share, and which stay idle."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from trtbuild.errors import Problem
from trtbuild.recipe import Recipe
from trtbuild.setting_values import Settings

_AT, _FRACTION = "serving.gpu_device_ids", "runtime.kv_cache.free_gpu_memory_fraction"
# What the memory of several caches leaves for weights that come later and for activations.
_MOST_TOGETHER = 0.95


def parallel_words(recipe: Recipe) -> str:
    """What makes the ranks of one instance."""
    context = "" if recipe.runtime.kind == "trtllm-engine" else " x context"
    return f"tensor x pipeline{context} parallel"


def gpus_used(recipe: Recipe, ranks: int) -> int:
    """How many GPUs serve: those that instances name, else one for each rank."""
    return len({gpu for group in recipe.serving.gpu_device_ids for gpu in group}) or ranks


def counted(recipe: Recipe, ranks: int) -> tuple[int, str]:
    """How many GPUs a target has where the recipe does not say it, and why; those that are named lie below that."""
    named = [gpu for group in recipe.serving.gpu_device_ids for gpu in group]
    return (max(named) + 1, "serving.gpu_device_ids") if named else (ranks, parallel_words(recipe))


def instance_mistakes(settings: Settings, ranks: int) -> Iterable[Problem]:
    """Each model instance needs one GPU a rank; instances may share GPUs, ranks may not."""
    recipe = settings.recipe
    groups, count = recipe.serving.gpu_device_ids, recipe.target.count
    for place, group in enumerate(groups):
        at = f"{_AT}.{place}"
        if len(group) != ranks:
            message = f"names {len(group)} GPUs, and one engine takes {ranks} ({parallel_words(recipe)})"
            yield Problem(at, message, f"name {ranks}")
        elif len(set(group)) != len(group):
            yield Problem(at, f"{list(group)} names a GPU twice", "give each rank a GPU of its own")
        elif count is not None and max(group) >= count:
            message = f"names GPU {max(group)}, and target.count {count} leaves 0 to {count - 1}"
            yield Problem(at, message, "name GPUs that are there, or raise target.count")
    yield from _sharing(settings)


def _sharing(settings: Settings) -> Iterable[Problem]:
    """Caches of instances on one GPU: each takes its share of the memory that is free when it starts.

    Nothing says in which order they start, so that together they must fit. A number of tokens limits a cache besides.
    """
    gpu, most = shared(settings.recipe.serving.gpu_device_ids)
    share = settings[_FRACTION]
    if most * share <= 1 or settings["runtime.kv_cache.max_tokens"] is not None:
        return
    message = (
        f"{most} instances share GPU {gpu}, and each takes {share} of the memory that is free when it starts "
        f"({_FRACTION}): together more than there is"
    )
    yield Problem(_AT, message, f"use {_FRACTION}: {fitting(most)} at most, or set runtime.kv_cache.max_tokens")


def shared(groups: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The GPU that most instances use, and how many do; one where instances name none."""
    uses = Counter(gpu for group in groups for gpu in set(group))
    return uses.most_common(1)[0] if uses else (0, 1)


def fitting(instances: int) -> float:
    """The share of the free memory that each of these instances may take on one GPU."""
    return math.floor(100 * _MOST_TOGETHER / instances) / 100


def count_refusals(recipe: Recipe, ranks: int) -> Iterable[Problem]:
    """Fewer GPUs than serve."""
    count, needed = recipe.target.count, gpus_used(recipe, ranks)
    if count is not None and count < needed:
        what = "the instances of serving.gpu_device_ids" if recipe.serving.gpu_device_ids else parallel_words(recipe)
        message = f"{count} GPUs, but {what} need {needed}"
        yield Problem("target.count", message, f"use {needed}, or lower the parallel sizes")


def idle_gpus(recipe: Recipe, ranks: int) -> list[str]:
    """What a plan says of GPUs that nothing runs on."""
    count, used = recipe.target.count, gpus_used(recipe, ranks)
    if count is None or count <= used:
        return []
    more = "" if recipe.serving.gpu_device_ids else "; serving.gpu_device_ids starts an instance on each group of GPUs"
    return [f"target.count is {count}, and the package runs on {used} of them: {count - used} stay idle{more}"]
