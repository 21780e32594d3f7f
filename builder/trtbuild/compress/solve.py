"""Prune and round the linear layers of a decoder layer by what they do to its outputs (SparseGPT, GPTQ, or both at once).

As in the papers' code, a decoder layer gets what its finished predecessors give, pruned and rounded, and the Hessians of
one decoder layer are taken together, before any of its own weights change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trtbuild.compress.columns import Grid, inverse_factor, prune_by_magnitude, sweep
from trtbuild.compress.hessians import Hessian, collect


@dataclass(slots=True)
class Solved:
    """What came of it.

    Args:
        idle: Layers that no token reached: pruned by magnitude, rounded to the nearest.
        errors: For every other layer the squared error of its output, relative to the squared output.
    """

    idle: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)


def solve(
    layers: Mapping[str, nn.Module],
    run: Callable[[], None],
    *,
    prune: bool,
    hold: bool = False,
    grid_of: Callable[[nn.Module], Grid] | None = None,
) -> Solved:
    """Change the weights of `layers` in place.

    Args:
        layers: Linear layers by name.
        run: Puts the calibration text through them.
        prune: To 2:4.
        hold: Weights that are zero stay zero.
        grid_of: What a layer's weights are rounded to; None for no rounding.
    """
    solved = Solved()
    with torch.no_grad():
        found = collect(layers, run)
        solved.idle = sorted(layers.keys() - {name for hessian in found for name in hessian.layers})
        while found:
            _solve_shared(found.pop(0), layers, solved, prune=prune, hold=hold, grid_of=grid_of)
        for name in solved.idle:
            _without_tokens(layers[name], prune=prune, grid_of=grid_of)
    return solved


def _solve_shared(
    hessian: Hessian, layers: Mapping[str, nn.Module], solved: Solved, *, prune: bool, hold: bool, grid_of: Any
) -> None:
    """Change the layers of one Hessian, which is gone afterwards."""
    if hessian.matrix is None:
        solved.idle += hessian.layers
        return
    dead = hessian.matrix.diagonal() == 0
    hessian.matrix.diagonal().masked_fill_(dead, 1.0 if prune else 0.0)
    factor = inverse_factor(hessian.matrix)
    hessian.matrix = None
    for name in hessian.layers:
        module = layers[name]
        weight = module.weight.data.float().clone()
        if prune:
            weight[:, dead] = 0.0
        grid = grid_of(module) if grid_of is not None else None
        cost = sweep(weight, factor, prune=prune, grid=grid, hold=hold)
        module.weight.data.copy_(weight)
        solved.errors[name] = cost * hessian.tokens / 2 / max(float(hessian.outputs[name]), 1e-30)


def _without_tokens(module: nn.Module, *, prune: bool, grid_of: Any) -> None:
    if prune:
        prune_by_magnitude(module.weight.data)
    if grid_of is not None:
        weight, grid = module.weight.data, grid_of(module)
        for column in range(weight.shape[1]):
            weight[:, column] = grid.rounded(weight[:, column].float(), column)
