"""RMS normalization, with the residual added before and E4M3 codes made after, in one pass over the row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trtbuild.runtime.fast.kernels.chain import chained, let_next_start, wait_for_previous
from trtbuild.runtime.fast.kernels.numbers import next_power_of_2, to_codes


@triton.jit
def _add_norm(
    stream,
    delta,
    weight,
    out,
    scale,
    eps,
    width,
    ADD: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAIN: tl.constexpr,
):
    let_next_start(CHAIN)
    wait_for_previous(CHAIN)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    x = tl.load(stream + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        # The stream is kept in bfloat16, and what is normalized is what is kept.
        x = x.to(tl.bfloat16).to(tl.float32)
        tl.store(stream + at, x.to(tl.bfloat16), mask=inside)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    y = (y * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)).to(tl.bfloat16)
    if CODES:
        tl.store(out + at, to_codes(y, tl.load(scale)), mask=inside)
    else:
        tl.store(out + at, y, mask=inside)


def add_norm(
    stream: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    """Add `delta` to the residual `stream` [T, W] in place and return the stream's RMS norm times `weight` [W].

    With `scale` (0-d float32) the result is the E4M3 codes of norm / scale, else bfloat16.
    """
    rows, width = stream.shape
    out = torch.empty_like(stream, dtype=stream.dtype if scale is None else torch.float8_e4m3fn)
    block = next_power_of_2(width)
    warps = max(1, min(8, block // 512))
    _add_norm[(rows,)](
        stream, delta, weight, out, scale, eps, width,
        ADD=delta is not None, CODES=scale is not None, BLOCK=block, num_warps=warps,
        **chained(),
    )  # fmt: skip
    return out
