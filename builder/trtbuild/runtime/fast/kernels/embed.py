"""The embedding of each token of a step, the tokens that only the device knows yet included."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trtbuild.runtime.fast.kernels.chain import chained, let_next_start, wait_for_previous

_BLOCK = 1024


@triton.jit
def _embed(tokens, chosen, table, out, width, BLOCK: tl.constexpr, CHAIN: tl.constexpr):
    let_next_start(CHAIN)
    wait_for_previous(CHAIN)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + row)
    if token < 0:
        # A choice of -1 says that there is none; its sequence has ended, and any row serves.
        token = tl.maximum(tl.load(chosen - 1 - token), 0)
    x = tl.load(table + token.to(tl.int64) * width + columns, mask=columns < width, other=0.0)
    tl.store(out + row * width + columns, x, mask=columns < width)


def embed(tokens: torch.Tensor, chosen: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The rows [T, W] of `table` [V, W] for `tokens` [T] (int32); -1 - r stands for the token `chosen`[r] (int32)."""
    width = table.shape[1]
    out = torch.empty((tokens.shape[0], width), dtype=table.dtype, device=table.device)
    grid = (tokens.shape[0], triton.cdiv(width, _BLOCK))
    _embed[grid](tokens, chosen, table, out, width, BLOCK=_BLOCK, num_warps=4, **chained())
    return out
