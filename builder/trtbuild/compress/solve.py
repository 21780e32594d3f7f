"""Prune and round the linear layers of a decoder layer by what they do to its outputs: SparseGPT, GPTQ, or both.

As in the papers' code, a decoder layer gets what its finished predecessors give, pruned and rounded, and the Hessians
of one decoder layer are taken together, before any of its own weights change.

Both at once: SparseGPT chooses the zeros, the weights that stay are fitted, then GPTQ rounds them and holds the zeros.
To round, the fitted weights are as good a target as the original ones: at the minimum of a quadratic form, the errors
against both differ by a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from trtbuild.compress.columns import Grid, inverse_factor, prune_by_magnitude, sweep
from trtbuild.compress.hessians import Hessian, collect
from trtbuild.compress.least_squares import refit

_TINY = 1e-30  # keeps a layer whose output is zero from dividing by it


@dataclass(frozen=True, slots=True)
class Task:
    """What happens to weights.

    Args:
        prune: To 2:4.
        hold: Weights that are zero stay zero.
        grid_of: What a layer's weights are rounded to, for its present weights; None for no rounding.
    """

    prune: bool
    hold: bool = False
    grid_of: Callable[[nn.Module], Grid] | None = None


@dataclass(slots=True)
class Solved:
    """What came of it.

    Args:
        idle: Layers that no token reached: pruned by magnitude, rounded to the nearest.
        errors: For every other layer the squared error of its output, relative to the squared output.
    """

    idle: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)


def solve(layers: Mapping[str, nn.Module], run: Callable[[], None], task: Task) -> Solved:
    """Change the weights of `layers` in place.

    Args:
        layers: Linear layers by name.
        run: Puts the calibration text through them.
        task: What to do.
    """
    solved = Solved()
    with torch.no_grad():
        found = collect(layers, run)
        solved.idle = sorted(layers.keys() - {name for hessian in found for name in hessian.layers})
        while found:
            _solve_shared(found.pop(0), layers, task, solved)
        for name in solved.idle:
            _without_tokens(layers[name], task)
    return solved


def _solve_shared(hessian: Hessian, layers: Mapping[str, nn.Module], task: Task, solved: Solved) -> None:
    """Change the layers of one Hessian, which is spoiled."""
    if hessian.matrix is None:
        solved.idle += hessian.layers
        return
    dead = hessian.matrix.diagonal() == 0
    if task.prune:
        hessian.matrix.diagonal().masked_fill_(dead, 1.0)
    factor = inverse_factor(hessian.matrix)
    for name in hessian.layers:
        module = layers[name]
        weight = module.weight.data.float().clone()
        if task.prune:
            weight[:, dead] = 0.0
            cost = _prune(module, weight, factor, hessian.matrix, task)
        else:
            grid = task.grid_of(module) if task.grid_of is not None else None
            cost = sweep(weight, factor, grid=grid, hold=task.hold)
        module.weight.data.copy_(weight)
        solved.errors[name] = cost * hessian.tokens / 2 / max(float(hessian.outputs[name]), _TINY)


def _prune(module: nn.Module, weight: torch.Tensor, factor: torch.Tensor, hessian: torch.Tensor, task: Task) -> float:
    """Prune `weight` in place, and round it where the task says so; return the cost of both."""
    original = weight.clone()
    sweep(weight, factor, prune=True)
    refit(weight, original, hessian)
    cost = _cost(weight, original, hessian)
    if task.grid_of is not None:
        module.weight.data.copy_(weight)
        cost += sweep(weight, factor, grid=task.grid_of(module), hold=True)
    return cost


def _cost(weight: torch.Tensor, original: torch.Tensor, hessian: torch.Tensor) -> float:
    change = weight - original
    return float((change @ hessian).mul_(change).sum(dtype=torch.float64))


def _without_tokens(module: nn.Module, task: Task) -> None:
    if task.prune:
        prune_by_magnitude(module.weight.data)
    if task.grid_of is not None:
        weight, grid = module.weight.data, task.grid_of(module)
        for column in range(weight.shape[1]):
            weight[:, column] = grid.rounded(weight[:, column].float(), column)
