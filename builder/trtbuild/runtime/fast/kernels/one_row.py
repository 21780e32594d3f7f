"""Linear layers for one row, limited by how fast the weights can be read: y = x @ W^T, and silu(gate) * up of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from trtbuild.runtime.fast.kernels.chain import chained, let_next_start, wait_for_previous
from trtbuild.runtime.fast.kernels.numbers import silu_times, to_codes


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the weights are walked: `outputs` rows of W a program, `inputs` numbers of each a turn."""

    outputs: int
    inputs: int
    warps: int
    stages: int


@triton.jit
def _finish(total, gate_total, factor, bias, out, out_scale, n, N,
            BIAS: tl.constexpr, GATED: tl.constexpr, CODES: tl.constexpr):  # fmt: skip
    total = total * factor
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if GATED:
        y = silu_times(gate_total * factor, total)
        if CODES:
            tl.store(out + n, to_codes(y, tl.load(out_scale)), mask=n < N)
        else:
            tl.store(out + n, y, mask=n < N)
    else:
        tl.store(out + n, total.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def _take(at, inside, first, k, K, EVEN: tl.constexpr):
    """A tile of the weights from column `first` on."""
    if EVEN:
        tile = tl.load(at + first)
    else:
        tile = tl.load(at + first, mask=inside & (first + k < K)[None, :], other=0.0)
    return tile


@triton.jit
def _one_row(
    x, weight, out, factor_at, bias, out_scale, N, K,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    FP8: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, CODES: tl.constexpr, EVEN: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    let_next_start(CHAIN)
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.arange(0, INPUTS)
    n_inside = (n < N)[:, None]
    gate_at = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    w_at = gate_at + N.to(tl.int64) * K if GATED else gate_at
    # The first tile needs nothing of the kernel before.
    ws = _take(w_at, n_inside, 0, k, K, EVEN)
    gs = _take(gate_at, n_inside, 0, k, K, EVEN) if GATED else ws
    wait_for_previous(CHAIN)
    xs = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    total = ws.to(tl.float32) * xs
    gate_total = gs.to(tl.float32) * xs if GATED else total
    for first in range(INPUTS, K, INPUTS):
        xs = tl.load(x + first + k, mask=first + k < K, other=0.0).to(tl.float32)[None, :]
        total += _take(w_at, n_inside, first, k, K, EVEN).to(tl.float32) * xs
        if GATED:
            gate_total += _take(gate_at, n_inside, first, k, K, EVEN).to(tl.float32) * xs
    factor = tl.load(factor_at) if FP8 else 1.0
    sums = tl.sum(total, axis=1)
    gate_sums = tl.sum(gate_total, axis=1) if GATED else sums
    _finish(sums, gate_sums, factor, bias, out, out_scale, n, N, BIAS, GATED, CODES)


def one_row(
    x: torch.Tensor,
    weight: torch.Tensor,
    tiling: Tiling,
    *,
    factor: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The row `x` [1, K] times `weight` [N, K], both bfloat16 or both E4M3 codes: [1, N], bfloat16 or `out`.

    `factor` (0-d float32, with codes) multiplies the sums, then `bias` [N] is added. With `gated` the weight is
    [2 N, K], gate first, and the result is silu(gate) * up; `scale` (0-d) then asks for E4M3 codes of it.
    """
    width = x.shape[1]
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    if out is None:
        kind = torch.bfloat16 if scale is None else torch.float8_e4m3fn
        out = torch.empty((1, outputs), dtype=kind, device=x.device)
    grid = (triton.cdiv(outputs, tiling.outputs),)
    even = width % tiling.inputs == 0 and outputs % tiling.outputs == 0
    flags = {
        "FP8": factor is not None, "BIAS": bias is not None, "GATED": gated, "CODES": scale is not None, "EVEN": even,
        "OUTPUTS": tiling.outputs, "INPUTS": tiling.inputs, "num_warps": tiling.warps, "num_stages": tiling.stages,
        **chained(),
    }  # fmt: skip
    _one_row[grid](x, weight, out, factor, bias, scale, outputs, width, **flags)
    return out
