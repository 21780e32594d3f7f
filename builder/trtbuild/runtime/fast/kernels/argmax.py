"""The likeliest token of each row of logits, found on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trtbuild.runtime.fast.kernels.chain import chained, let_next_start, wait_for_previous
from trtbuild.runtime.fast.kernels.numbers import next_power_of_2

_BLOCK = 4096


@triton.jit
def _parts(logits, tops, places, width, parts, BLOCK: tl.constexpr, CHAIN: tl.constexpr):
    let_next_start(CHAIN)
    wait_for_previous(CHAIN)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * width + columns, mask=columns < width, other=float("-inf"))
    strange = tl.max((x != x).to(tl.int32), axis=0)
    top, place = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(tops + row * parts + part, tl.where(strange > 0, float("inf"), top))
    tl.store(places + row * parts + part, part * BLOCK + place)


@triton.jit
def _whole(tops, places, tokens, parts, BLOCK: tl.constexpr, CHAIN: tl.constexpr):
    let_next_start(CHAIN)
    wait_for_previous(CHAIN)
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    x = tl.load(tops + row * parts + part, mask=part < parts, other=float("-inf"))
    top, best = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
    place = tl.load(places + row * parts + best)
    finite = (top > float("-inf")) & (top < float("inf"))
    tl.store(tokens + row, tl.where(finite, place, -1))


def argmax(logits: torch.Tensor, tokens: torch.Tensor) -> None:
    """Write the place of the largest of each row of `logits` [B, V] (float32), the first of equals, to `tokens` [B].

    A row with a NaN or an infinite largest value gives -1.
    """
    rows, width = logits.shape
    parts = triton.cdiv(width, _BLOCK)
    tops = torch.empty((rows, parts), dtype=torch.float32, device=logits.device)
    places = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)
    _parts[(rows, parts)](logits, tops, places, width, parts, BLOCK=_BLOCK, num_warps=4, **chained())
    _whole[(rows,)](tops, places, tokens, parts, BLOCK=next_power_of_2(parts), num_warps=1, **chained())
