"""Prune and round a weight column by column, each error made up for by the columns that follow.

SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1 and section 3.5) and GPTQ (Frantar et al. 2022,
arXiv 2210.17323, algorithm 1) are one sweep: a column gets its final values, and what that costs in the layer's output
is taken off the columns behind it by the inverse Hessian of the layer's inputs. Columns inside a block are updated at
once, those behind it when the block is done.

Every operation and its order is that of NVIDIA/Model-Optimizer, modelopt/torch/quantization/utils/calib_utils.py
@0.47.0, so that rounding alone gives ModelOpt's bits; it rounds the whole matrix for every column, we the column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trtbuild.errors import ToolError

BLOCK = 128
GROUP = 4  # neighbouring weights along the input, of which two stay
DAMPING = 0.01  # of the mean of the Hessian's diagonal; both papers' value
_SMALLEST_RANGE = 1.0 / (1 << 24)  # ModelOpt takes what is smaller for zero
_LARGEST_CODE, _SMALLEST_CODE = 7.0, -8.0  # of a signed number of 4 bits


@dataclass(frozen=True, slots=True)
class Grid:
    """Codes of 4 bits with one scale for each group of neighbouring inputs.

    Args:
        ranges: The largest absolute value that a group holds [out, in / size]; its code is 7.
        size: Inputs in a group.
    """

    ranges: torch.Tensor
    size: int

    def rounded(self, values: torch.Tensor, column: int) -> torch.Tensor:
        """`values` [out] of an input column on the grid."""
        ranges = self.ranges[:, column // self.size]
        empty = ranges <= _SMALLEST_RANGE
        scale = torch.full_like(ranges, _LARGEST_CODE) / ranges  # torch takes 7.0 / ranges for 7.0 * (1 / ranges)
        codes = torch.clamp((values * scale.masked_fill(empty, 0.0)).round_(), _SMALLEST_CODE, _LARGEST_CODE)
        return codes / scale.masked_fill(empty, 1.0)


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of a damped Hessian [in, in], which is overwritten.

    Damping grows tenfold, up to the mean of the diagonal itself, where the matrix is not positive definite in float32.

    Raises:
        ToolError: No damping helps: the Hessian holds what is not finite.
    """
    diagonal = hessian.diagonal()
    original = diagonal.clone()
    mean = original.mean()
    damping = DAMPING
    while damping <= 1:
        diagonal.copy_(original + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed) and bool(torch.isfinite(upper.diagonal()).all()):
                return upper
        damping *= 10
    raise ToolError("the Hessian of a layer's inputs cannot be inverted", "calibrate with other text")


def sweep(
    weight: torch.Tensor, factor: torch.Tensor, *, prune: bool = False, grid: Grid | None = None, hold: bool = False
) -> float:
    """Give every column of `weight` [out, in] its final values, in place; return what that costs in the output.

    The cost is the sum over outputs of e^T H e, e being the change of an output's weights.

    Args:
        weight: float32.
        factor: Of the inverse Hessian, upper triangular [in, in].
        prune: Set two of four neighbours to zero: those with the smallest w^2 / [H^-1]_cc^2, H being the Hessian
            of the columns that are not final.
        grid: What the weights that stay are rounded to; None leaves them as they are.
        hold: Weights that are zero stay zero.
    """
    cost = torch.zeros((), dtype=torch.float64, device=weight.device)
    zero = weight == 0 if hold else None
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        block = weight[:, start:end].clone()
        errors = torch.zeros_like(block)
        inner = factor[start:end, start:end]
        for column in range(end - start):
            if prune and column % GROUP == 0:
                pruned = _cheapest(block[:, column : column + GROUP], inner.diagonal()[column : column + GROUP])
            value = block[:, column]
            final = value if grid is None else grid.rounded(value, start + column)
            if prune:
                final = final.masked_fill(pruned[:, column % GROUP], 0.0)
            if zero is not None:
                final = final.masked_fill(zero[:, start + column], 0.0)
            weight[:, start + column] = final
            error = (value - final) / inner[column, column]
            block[:, column:].addr_(error, inner[column, column:], alpha=-1)
            errors[:, column] = error
        weight[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
        cost += errors.double().square_().sum()
    return float(cost)


def _cheapest(weights: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
    """Which two of four columns [out, 4] cost least; the first ones where they cost the same."""
    order = torch.argsort((weights / diagonal).square_(), dim=1, stable=True)
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(1, order[:, : GROUP // 2], value=True)


def prune_by_magnitude(weight: torch.Tensor) -> None:
    """Set the two smallest of four neighbouring inputs of `weight` [out, in] to zero, in place."""
    groups = weight.view(-1, GROUP)
    groups.masked_fill_(_cheapest(groups, torch.ones_like(groups[0])), 0.0)
