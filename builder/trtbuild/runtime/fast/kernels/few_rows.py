"""Linear layers of a few rows: y = x @ W^T, and silu(gate) * up of it, with weights of any format.

The weights take the place of the left operand, whose tiles are at least 64 rows high on tensor cores, and the few rows
of x that of the right one, so that little is padded. Where the outputs are too few programs for the device, the inputs
are split too: each program leaves its part, and the last one of a tile adds them up, in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from trtbuild.runtime.fast.kernels.chain import chained, let_next_start, wait_for_previous
from trtbuild.runtime.fast.kernels.int4 import unpack_tile
from trtbuild.runtime.fast.kernels.numbers import next_power_of_2, silu_times, to_codes

_SMALLEST = 16
_COUNTERS = 2**16
_ENOUGH = 256  # tiles that keep a device busy without splitting the inputs


@dataclass(frozen=True, slots=True)
class Block:
    """A program's share: `outputs` rows of W and one of `splits` parts of their inputs, for at most `rows` rows of x.

    A turn takes `inputs` numbers of each row of W, or `groups` groups where weights have 4 bits.
    """

    outputs: int
    inputs: int
    splits: int
    warps: int
    stages: int
    rows: int = 256
    groups: int = 1


@triton.jit
def _part(
    x, weight, scales, M, N, n, m, total, start, end, K, stride,
    INPUTS: tl.constexpr, GROUPS: tl.constexpr, INT4: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """`total` [outputs, rows] plus the product over the inputs `start`..`end`."""
    if INT4:
        HALF: tl.constexpr = INPUTS // 2
        k = tl.arange(0, HALF)
        for turn in range(start, end, INPUTS * GROUPS):
            for step in tl.static_range(GROUPS):
                first = turn + step * INPUTS
                group = first // INPUTS
                real = (n < N) & (first < end)
                scale = tl.load(scales + group * stride + n, mask=real, other=0.0)
                low, high = unpack_tile(weight + group * (stride * HALF), n * HALF, scale, real, HALF, ASM)
                at = x + m[:, None] * K + first + k[None, :]
                seen = ((m < M) & (first < end))[:, None]
                total = tl.dot(low, tl.trans(tl.load(at, mask=seen, other=0.0)), total)
                total = tl.dot(high, tl.trans(tl.load(at + HALF, mask=seen, other=0.0)), total)
    else:
        k = tl.arange(0, INPUTS)
        for first in range(start, end, INPUTS):
            at = weight + n.to(tl.int64)[:, None] * K + first + k[None, :]
            if EVEN:
                ws = tl.load(at)
                xs = tl.load(x + m[:, None] * K + first + k[None, :], mask=(m < M)[:, None], other=0.0)
            else:
                inside = (first + k < end)[None, :]
                ws = tl.load(at, mask=(n < N)[:, None] & inside, other=0.0)
                xs = tl.load(x + m[:, None] * K + first + k[None, :], mask=(m < M)[:, None] & inside, other=0.0)
            total = tl.dot(ws, tl.trans(xs), total)
    return total


# A step may have any number of rows: no kernel is compiled for a number of its own.
@triton.jit(do_not_specialize=["M"])
def _few_rows(
    x, weight, scales, out, partial, counters, factor_at, bias, pre, out_scale, M, N, K, share,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, GROUPS: tl.constexpr, SPLITS: tl.constexpr,
    INT4: tl.constexpr, FP8: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, PRE: tl.constexpr,
    CODES: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    let_next_start(CHAIN)
    wait_for_previous(CHAIN)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    band = tl.program_id(2)
    n = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    m = band * ROWS + tl.arange(0, ROWS)
    start = split * share
    end = tl.minimum(start + share, K)
    stride = 2 * N if GATED else N
    total = tl.zeros([OUTPUTS, ROWS], dtype=tl.float32)
    if GATED:
        gate = tl.zeros([OUTPUTS, ROWS], dtype=tl.float32)
        gate = _part(x, weight, scales, M, N, n, m, gate, start, end, K, stride, INPUTS, GROUPS, INT4, EVEN, ASM)
        # The rows of `up` follow those of `gate`, in every group of 4-bit codes too.
        offset = N.to(tl.int64) * (INPUTS // 2) if INT4 else N.to(tl.int64) * K
        more = scales + N if INT4 else scales
        total = _part(
            x, weight + offset, more, M, N, n, m, total, start, end, K, stride, INPUTS, GROUPS, INT4, EVEN, ASM
        )
    else:
        total = _part(x, weight, scales, M, N, n, m, total, start, end, K, stride, INPUTS, GROUPS, INT4, EVEN, ASM)
    mine = True
    if SPLITS > 1:
        place = tl.arange(0, OUTPUTS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        number = tile * tl.num_programs(2) + band
        parts = partial + number.to(tl.int64) * (SPLITS * OUTPUTS * ROWS)
        tl.store(parts + split * (OUTPUTS * ROWS) + place, total)
        tl.debug_barrier()
        mine = tl.atomic_add(counters + number, 1, sem="acq_rel") == SPLITS - 1
        if mine:
            tl.store(counters + number, 0)
            total = tl.load(parts + place)
            for other in range(1, SPLITS):
                total += tl.load(parts + other * (OUTPUTS * ROWS) + place)
    if mine:
        inside = (n < N)[:, None] & (m < M)[None, :]
        to = out + m.to(tl.int64)[None, :] * N + n[:, None]
        factor = tl.load(factor_at) if FP8 else 1.0
        total = total * factor
        if BIAS:
            total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if GATED:
            y = silu_times(gate * factor, total)
            if PRE:
                by = tl.load(pre + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
                y = (y.to(tl.float32) * by).to(tl.bfloat16)
            if CODES:
                tl.store(to, to_codes(y, tl.load(out_scale)), mask=inside)
            else:
                tl.store(to, y, mask=inside)
        else:
            tl.store(to, total.to(out.dtype.element_ty), mask=inside)


@cache
def _counters(device: torch.device) -> torch.Tensor:
    """Zeros, which every kernel leaves as zeros; kernels of one stream take turns with them."""
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)


def few_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    block: Block,
    *,
    scales: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    pre: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The rows `x` [M, K] times a weight: [M, N], bfloat16 or `out`.

    The weight is [N, K], bfloat16 or E4M3 codes as `x` is, or `packing.pack`'s bytes with `scales` [K / S, N]. `factor`
    (0-d float32, with codes) multiplies the sums, then `bias` [N] is added. With `gated` the weight has 2 N rows, gate
    first, and the result is silu(gate) * up, times `pre` [N] where given; `scale` (0-d) then asks for E4M3 codes of it.
    """
    rows, width = x.shape
    int4 = scales is not None
    total = weight.shape[1] if int4 else weight.shape[0]
    outputs = total // 2 if gated else total
    inputs = weight.shape[2] * 2 if int4 else block.inputs
    tiles = triton.cdiv(outputs, block.outputs)
    splits = 1 if gated or tiles > _ENOUGH else min(block.splits, triton.cdiv(width, inputs))
    share = triton.cdiv(triton.cdiv(width, splits), inputs) * inputs
    if out is None:
        out = torch.empty(
            (rows, outputs), dtype=torch.bfloat16 if scale is None else torch.float8_e4m3fn, device=x.device
        )
    high = min(block.rows, max(_SMALLEST, next_power_of_2(rows)))
    bands = triton.cdiv(rows, high)
    partial = counters = None
    if splits > 1:
        partial = torch.empty(tiles * bands * splits * block.outputs * high, dtype=torch.float32, device=x.device)
        counters = _counters(x.device)
    _few_rows[(tiles, splits, bands)](
        x, weight, scales, out, partial, counters, factor, bias, pre, scale, rows, outputs, width, share,
        ROWS=high, OUTPUTS=block.outputs, INPUTS=inputs, GROUPS=block.groups, SPLITS=splits,
        INT4=int4, FP8=factor is not None, BIAS=bias is not None, GATED=gated, PRE=pre is not None,
        CODES=scale is not None, EVEN=outputs % block.outputs == 0 and width % (inputs * splits) == 0, ASM=x.is_cuda,
        num_warps=block.warps, num_stages=block.stages, **chained(),
    )  # fmt: skip
    return out
