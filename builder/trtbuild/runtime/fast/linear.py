"""Linear layers of the fast path: one table of formats, rows and kernels, and the calls behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from trtbuild.runtime.fast.kernels.activation import silu_mul
from trtbuild.runtime.fast.kernels.one_row import Tiling, one_row
from trtbuild.runtime.fast.weights import Matrix


@dataclass(frozen=True, slots=True)
class Choice:
    """One row of a format runs on our own kernel in these tilings; more rows run on cuBLAS."""

    plain: Tiling
    gated: Tiling


# Measured on an H100 with the sizes of Llama 3.1 8B (benchmarks/gpu/tilings.py). 4-bit weights and 2:4 sparsity get
# their lines here, and rows from 2 to 16 a kernel where it beats cuBLAS (bf16) and `torch._scaled_mm` (FP8).
TABLE = {
    "bf16": Choice(plain=Tiling(4, 2048, 8, 2), gated=Tiling(4, 1024, 4, 3)),
    "fp8": Choice(plain=Tiling(4, 1024, 4, 3), gated=Tiling(4, 1024, 4, 3)),
}


def linear(x: torch.Tensor, matrix: Matrix, out: torch.Tensor | None = None) -> torch.Tensor:
    """The product [T, N] of `x` [T, K], bfloat16 or E4M3 codes as the matrix asks: bfloat16, or float32 in `out`."""
    choice = _choice(matrix, x.shape[0])
    if choice is not None:
        return one_row(x, matrix.weight, choice.plain, factor=matrix.factor, bias=matrix.bias, out=out)
    if out is not None:
        return torch.mm(x, matrix.weight.t(), out_dtype=out.dtype, out=out)
    if matrix.input_scale is not None:
        return _scaled(x, matrix)
    return functional.linear(x, matrix.weight, matrix.bias)


def gated(x: torch.Tensor, matrix: Matrix, scale: torch.Tensor | None) -> torch.Tensor:
    """silu(gate) * up [T, N] of `x` [T, K] and the fused `matrix` [2 N, K]; E4M3 codes where `scale` is given."""
    choice = _choice(matrix, x.shape[0])
    if choice is not None and matrix.bias is None:
        return one_row(x, matrix.weight, choice.gated, factor=matrix.factor, gated=True, scale=scale)
    return silu_mul(linear(x, matrix), scale)


def _choice(matrix: Matrix, rows: int) -> Choice | None:
    return TABLE["bf16" if matrix.input_scale is None else "fp8"] if rows == 1 else None


def _scaled(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    y = torch._scaled_mm(  # noqa: SLF001  the only door to FP8 tensor cores
        x, matrix.weight.t(), scale_a=matrix.input_scale, scale_b=matrix.weight_scale, out_dtype=torch.bfloat16
    )
    return y if matrix.bias is None else y + matrix.bias
