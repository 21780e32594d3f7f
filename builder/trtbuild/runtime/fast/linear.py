"""Linear layers of the fast path: one table of formats, rows and kernels, and the calls behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch.nn import functional

from trtbuild.runtime.fast.kernels.activation import silu_mul
from trtbuild.runtime.fast.kernels.few_rows import Block, few_rows
from trtbuild.runtime.fast.kernels.int4 import expand
from trtbuild.runtime.fast.kernels.one_row import Tiling, one_row
from trtbuild.runtime.fast.kernels.one_row_int4 import Lines, one_row_int4
from trtbuild.runtime.fast.weights import Matrix

Share: TypeAlias = Tiling | Block | Lines


@dataclass(frozen=True, slots=True)
class Line:
    """Up to `rows` rows run in these shares on a kernel of ours, or on cuBLAS and with the activation by itself."""

    rows: int
    plain: Share | None
    gated: Share | None


# Measured on an H100 with the sizes of Llama 3.1 8B (benchmarks/gpu/tilings.py). More rows than the last line says run
# on cuBLAS; 4-bit weights are expanded for it.
TABLE: dict[str, tuple[Line, ...]] = {
    "bf16": (
        Line(1, Tiling(4, 2048, 8, 2), Tiling(4, 1024, 4, 3)),
        Line(16, Block(64, 256, 2, 4, 3), Block(64, 256, 1, 4, 3)),
        Line(64, None, Block(128, 64, 1, 4, 5)),
    ),
    "fp8": (
        Line(1, Tiling(4, 1024, 4, 3), Tiling(4, 1024, 4, 3)),
        Line(16, None, Block(64, 256, 1, 4, 4)),
        Line(64, None, Block(64, 128, 1, 4, 6)),
    ),
    "int4": (
        Line(1, Lines(8, 16, 4), Lines(8, 8, 4)),
        Line(16, Block(64, 0, 8, 4, 2, groups=2), Block(64, 0, 1, 4, 3, groups=4)),
        Line(64, Block(128, 0, 4, 8, 3, groups=2), Block(128, 0, 1, 8, 3, groups=2)),
        Line(256, Block(128, 0, 4, 8, 3, rows=256), Block(64, 0, 1, 4, 3, rows=128)),
    ),
}


def linear(x: torch.Tensor, matrix: Matrix, out: torch.Tensor | None = None) -> torch.Tensor:
    """The product [T, N] of `x` [T, K], bfloat16 or E4M3 codes as the matrix asks: bfloat16, or float32 in `out`."""
    line = _line(matrix, x.shape[0])
    if line is not None and line.plain is not None:
        return _ours(x, matrix, line.plain, out=out)
    if out is not None:
        return torch.mm(x, matrix.weight.t(), out_dtype=out.dtype, out=out)
    if matrix.input_scale is not None:
        return _scaled(x, matrix)
    return functional.linear(x, _dense(matrix), matrix.bias)


def gated(x: torch.Tensor, matrix: Matrix, following: Matrix) -> torch.Tensor:
    """silu(gate) * up [T, N] of `x` [T, K] and the fused `matrix` [2 N, K], in the form that `following` reads."""
    line = _line(matrix, x.shape[0])
    share = None if line is None or matrix.bias is not None else line.gated
    if share is not None and not (isinstance(share, Tiling) and following.pre is not None):
        return _ours(x, matrix, share, gated=True, following=following)
    return silu_mul(linear(x, matrix), following.input_scale, following.pre)


def _line(matrix: Matrix, rows: int) -> Line | None:
    form = "bf16" if matrix.input_scale is None else "fp8"
    lines = TABLE[form if matrix.group_scales is None else "int4"]
    return next((line for line in lines if rows <= line.rows), None)


def _ours(
    x: torch.Tensor,
    matrix: Matrix,
    share: Share,
    *,
    gated: bool = False,
    following: Matrix | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    scale = None if following is None else following.input_scale
    pre = None if following is None else following.pre
    if isinstance(share, Lines):
        assert matrix.group_scales is not None  # noqa: S101  the table's line for 4 bits
        return one_row_int4(
            x, matrix.weight, matrix.group_scales, share, bias=matrix.bias, gated=gated, pre=pre, scale=scale
        )  # fmt: skip
    if isinstance(share, Tiling):
        return one_row(
            x, matrix.weight, share, factor=matrix.factor, bias=matrix.bias, gated=gated, scale=scale, out=out
        )  # fmt: skip
    return few_rows(
        x, matrix.weight, share, scales=matrix.group_scales, factor=matrix.factor, bias=matrix.bias, gated=gated,
        pre=pre, scale=scale, out=out,
    )  # fmt: skip


def _dense(matrix: Matrix) -> torch.Tensor:
    if matrix.group_scales is None:
        return matrix.weight
    groups, outputs, half = matrix.weight.shape
    weight = torch.empty((outputs, groups * half * 2), dtype=torch.bfloat16, device=matrix.weight.device)
    return expand(matrix.weight, matrix.group_scales, weight)


def _scaled(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    y = torch._scaled_mm(  # noqa: SLF001  the only door to FP8 tensor cores
        x, matrix.weight.t(), scale_a=matrix.input_scale, scale_b=matrix.weight_scale, out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )  # fmt: skip
    return y if matrix.bias is None else y + matrix.bias
