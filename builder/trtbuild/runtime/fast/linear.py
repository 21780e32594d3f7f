"""Linear layers of the fast path: one table of formats, rows and kernels, and the calls behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from trtbuild.runtime.fast.kernels.activation import silu_mul
from trtbuild.runtime.fast.kernels.matvec import Tiling, few_rows
from trtbuild.runtime.fast.weights import Matrix


@dataclass(frozen=True, slots=True)
class Choice:
    """Up to `most_rows` rows of a format run on our own kernel in these tilings; beyond the last row, on cuBLAS."""

    format: str
    most_rows: int
    plain: Tiling
    gated: Tiling


# Measured on an H100 with the sizes of Llama 3.1 8B (benchmarks/gpu/tilings.py). 4-bit weights and 2:4 sparsity get
# their rows here.
TABLE = (
    Choice("bf16", 1, Tiling(4, 2048, 8, 2), Tiling(4, 1024, 4, 3)),
    Choice("fp8", 1, Tiling(4, 1024, 4, 3), Tiling(4, 1024, 4, 3)),
)


def linear(x: torch.Tensor, matrix: Matrix, out: torch.Tensor | None = None) -> torch.Tensor:
    """The product [T, N] of `x` [T, K], bfloat16 or E4M3 codes as the matrix asks: bfloat16, or float32 in `out`."""
    choice = _choice(matrix, x.shape[0])
    if choice is not None:
        return few_rows(x, matrix.weight, choice.plain, factor=matrix.factor, bias=matrix.bias, out=out)
    if out is not None:
        return torch.mm(x, matrix.weight.t(), out_dtype=out.dtype, out=out)
    if matrix.input_scale is not None:
        return _scaled(x, matrix)
    return functional.linear(x, matrix.weight, matrix.bias)


def gated(x: torch.Tensor, matrix: Matrix, scale: torch.Tensor | None) -> torch.Tensor:
    """silu(gate) * up [T, N] of `x` [T, K] and the fused `matrix` [2 N, K]; E4M3 codes where `scale` is given."""
    choice = _choice(matrix, x.shape[0])
    if choice is not None and matrix.bias is None:
        return few_rows(x, matrix.weight, choice.gated, factor=matrix.factor, gated=True, scale=scale)
    return silu_mul(linear(x, matrix), scale)


def _choice(matrix: Matrix, rows: int) -> Choice | None:
    name = "bf16" if matrix.input_scale is None else "fp8"
    return next((row for row in TABLE if row.format == name and rows <= row.most_rows), None)


def _scaled(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    y = torch._scaled_mm(  # noqa: SLF001  the only door to FP8 tensor cores
        x, matrix.weight.t(), scale_a=matrix.input_scale, scale_b=matrix.weight_scale, out_dtype=torch.bfloat16
    )
    return y if matrix.bias is None else y + matrix.bias
