"""Linear layers for one row with 4-bit weights, limited by how fast these can be read and unpacked.

Legend: N outputs, K inputs, S inputs of one group. A program's tile has a line for each of its outputs in each of
several groups, so that enough bytes are asked for at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from trtbuild.runtime.fast.kernels.chain import chained, let_next_start, wait_for_previous
from trtbuild.runtime.fast.kernels.int4 import unpack_tile
from trtbuild.runtime.fast.kernels.numbers import silu_times, to_codes


@dataclass(frozen=True, slots=True)
class Lines:
    """A program's share: `outputs` outputs, `groups` groups of each a turn."""

    outputs: int
    groups: int
    warps: int


@triton.jit
def _sums(
    x, packed, scales, K, stride, n, N,
    HALF: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The products [OUTPUTS] of `x` with the rows `n` [GROUPS x OUTPUTS] (every group's) of the weight."""
    line = tl.arange(0, GROUPS * OUTPUTS)
    column = tl.arange(0, HALF)
    total = tl.zeros([GROUPS * OUTPUTS, HALF], dtype=tl.float32)
    count = K // (2 * HALF)
    for first in range(0, count, GROUPS):
        group = first + line // OUTPUTS
        inside = (n < N) & (group < count)
        scale = tl.load(scales + group * stride + n, mask=inside, other=0.0)
        low, high = unpack_tile(packed, (group * stride + n) * HALF, scale, inside, HALF, ASM)
        at = x + group[:, None] * (2 * HALF) + column[None, :]
        total += low.to(tl.float32) * tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
        total += high.to(tl.float32) * tl.load(at + HALF, mask=inside[:, None], other=0.0).to(tl.float32)
    return tl.sum(tl.reshape(tl.sum(total, axis=1), [GROUPS, OUTPUTS]), axis=0)


@triton.jit
def _one_row_int4(
    x, packed, scales, out, bias, pre, out_scale, N, K,
    HALF: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
    PRE: tl.constexpr, CODES: tl.constexpr, ASM: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    let_next_start(CHAIN)
    wait_for_previous(CHAIN)
    first = tl.program_id(0) * OUTPUTS
    lines = first + tl.arange(0, GROUPS * OUTPUTS) % OUTPUTS
    n = first + tl.arange(0, OUTPUTS)
    stride = 2 * N if GATED else N
    sums = _sums(x, packed, scales, K, stride, lines, N, HALF, OUTPUTS, GROUPS, ASM)
    if GATED:
        # The rows of `up` follow those of `gate` in every group.
        ups = _sums(x, packed + N * HALF, scales + N, K, stride, lines, N, HALF, OUTPUTS, GROUPS, ASM)
        y = silu_times(sums, ups)
        if PRE:
            y = (y.to(tl.float32) * tl.load(pre + n, mask=n < N, other=0.0).to(tl.float32)).to(tl.bfloat16)
        if CODES:
            tl.store(out + n, to_codes(y, tl.load(out_scale)), mask=n < N)
        else:
            tl.store(out + n, y, mask=n < N)
    else:
        if BIAS:
            sums += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(out + n, sums.to(out.dtype.element_ty), mask=n < N)


def one_row_int4(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    share: Lines,
    *,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    pre: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The row `x` [1, K] (bfloat16) times `packing.pack`'s bytes with `scales` [K / S, N]: [1, N], bfloat16.

    `bias` [N] is added. With `gated` the weight has 2 N rows, gate first, and the result is silu(gate) * up, times
    `pre` [N] where given; `scale` (0-d) then asks for E4M3 codes of it.
    """
    total, half = packed.shape[1], packed.shape[2]
    outputs = total // 2 if gated else total
    kind = torch.bfloat16 if scale is None else torch.float8_e4m3fn
    out = torch.empty((1, outputs), dtype=kind, device=x.device)
    _one_row_int4[(triton.cdiv(outputs, share.outputs),)](
        x, packed, scales, out, bias, pre, scale, outputs, x.shape[1],
        HALF=half, OUTPUTS=share.outputs, GROUPS=share.groups, BIAS=bias is not None, GATED=gated,
        PRE=pre is not None, CODES=scale is not None, ASM=x.is_cuda, num_warps=share.warps, **chained(),
    )  # fmt: skip
    return out
