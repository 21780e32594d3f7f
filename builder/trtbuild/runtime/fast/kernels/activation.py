"""The gated activation silu(gate) * up, and E4M3 codes of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trtbuild.runtime.fast.kernels.chain import chained, let_next_start, wait_for_previous
from trtbuild.runtime.fast.kernels.numbers import silu_times, to_codes

_BLOCK = 1024


@triton.jit
def _silu_mul(
    pairs, out, pre, scale, width,
    PRE: tl.constexpr, CODES: tl.constexpr, BLOCK: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    let_next_start(CHAIN)
    wait_for_previous(CHAIN)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(pairs + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(pairs + (row * 2 + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
    y = silu_times(gate, up)
    if PRE:
        y = (y.to(tl.float32) * tl.load(pre + columns, mask=inside, other=0.0).to(tl.float32)).to(tl.bfloat16)
    if CODES:
        tl.store(out + row * width + columns, to_codes(y, tl.load(scale)), mask=inside)
    else:
        tl.store(out + row * width + columns, y, mask=inside)


def silu_mul(
    pairs: torch.Tensor,
    scale: torch.Tensor | None,
    pre: torch.Tensor | None = None,
) -> torch.Tensor:
    """silu(gate) * up [T, W] of `pairs` [T, 2 W], gate first, times `pre` [W] where given.

    With `scale` (0-d) its E4M3 codes, else bfloat16.
    """
    rows, width = pairs.shape[0], pairs.shape[1] // 2
    out = torch.empty((rows, width), dtype=pairs.dtype if scale is None else torch.float8_e4m3fn, device=pairs.device)
    _silu_mul[(rows, triton.cdiv(width, _BLOCK))](
        pairs, out, pre, scale, width,
        PRE=pre is not None, CODES=scale is not None, BLOCK=_BLOCK, num_warps=4, **chained(),
    )  # fmt: skip
    return out
