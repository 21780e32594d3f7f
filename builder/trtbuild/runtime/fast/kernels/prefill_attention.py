"""Attention of runs of tokens over the paged cache: whole prompts, chunks, prompts after a reused prefix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trtbuild.runtime.fast.kernels.numbers import to_codes
from trtbuild.runtime.fast.shapes import Heads, Pool

TILE_ROWS = 128  # tokens of one sequence that a program takes together
_TILE_PLACES = 64
_WARPS, _STAGES = 8, 3


@triton.jit
def _attend(scores, values, top, total, seen):
    """Take `scores` [ROWS, TILE], in units of log2, and their values into a running softmax."""
    higher = tl.maximum(top, tl.max(scores, axis=1))
    # A row that has seen nothing yet keeps -inf, and exp2(-inf - -inf) is no number.
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp2(top - safe)
    weights = tl.exp2(scores - safe[:, None])
    total = total * shrink + tl.sum(weights, axis=1)
    seen = tl.dot(weights.to(tl.bfloat16), values, seen * shrink[:, None])
    return higher, total, seen


@triton.jit
def _prefill(
    qkv, out, tiles, table, table_stride, pool_keys, pool_values, slots, key_scale, value_scale, scaling, window,
    pre, out_scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, PRE: tl.constexpr, OUT_CODES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    tile = tiles + tl.program_id(1) * 4
    start = tl.load(tile).to(tl.int64)
    count = tl.load(tile + 1)
    position = tl.load(tile + 2)
    column = tl.load(tile + 3)
    rows = tl.arange(0, ROWS)
    whole = tl.arange(0, SIZE)
    here = position + rows
    at = qkv + (start + rows)[:, None] * ((QUERIES + 2 * KEYS) * SIZE) + head * SIZE + whole[None, :]
    query = tl.load(at, mask=(rows < count)[:, None], other=0.0)
    factor = scaling * key_scale * 1.4426950408889634
    base = (head // (QUERIES // KEYS)).to(tl.int64) * slots
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    seen = tl.zeros([ROWS, SIZE], dtype=tl.float32)
    length = position + count
    first = 0
    if WINDOW:
        first = tl.maximum(position - window + 1, 0) // TILE * TILE
    edge = first
    if not WINDOW:
        # Up to here every row sees every place: no masks.
        edge = (position + 1) // TILE * TILE
        for n in range(0, edge, TILE):
            places = n + tl.arange(0, TILE)
            blocks = tl.load(table + (places // PAGE) * table_stride + column).to(tl.int64)
            offset = (base + blocks * PAGE + places % PAGE) * SIZE
            keys = tl.load(pool_keys + offset[:, None] + whole[None, :]).to(tl.bfloat16)
            values = tl.load(pool_values + offset[:, None] + whole[None, :]).to(tl.bfloat16)
            scores = tl.dot(query, tl.trans(keys)) * factor
            top, total, seen = _attend(scores, values, top, total, seen)
    for n in range(edge, length, TILE):
        places = n + tl.arange(0, TILE)
        real = places < length
        blocks = tl.load(table + (places // PAGE) * table_stride + column, mask=real, other=0).to(tl.int64)
        offset = (base + blocks * PAGE + places % PAGE) * SIZE
        keys = tl.load(pool_keys + offset[:, None] + whole[None, :], mask=real[:, None], other=0.0).to(tl.bfloat16)
        values = tl.load(pool_values + offset[:, None] + whole[None, :], mask=real[:, None], other=0.0).to(tl.bfloat16)
        live = places[None, :] <= here[:, None]
        if WINDOW:
            live &= places[None, :] > here[:, None] - window
        scores = tl.where(live, tl.dot(query, tl.trans(keys)) * factor, float("-inf"))
        top, total, seen = _attend(scores, values, top, total, seen)
    y = (seen / total[:, None] * value_scale).to(tl.bfloat16)
    if PRE:
        by = tl.load(pre + head * SIZE + whole).to(tl.float32)[None, :]
        y = (y.to(tl.float32) * by).to(tl.bfloat16)
    to = out + (start + rows)[:, None] * (QUERIES * SIZE) + head * SIZE + whole[None, :]
    if OUT_CODES:
        tl.store(to, to_codes(y, tl.load(out_scale)), mask=(rows < count)[:, None])
    else:
        tl.store(to, y, mask=(rows < count)[:, None])


def prefill_attention(
    qkv: torch.Tensor,
    out: torch.Tensor,
    tiles: torch.Tensor,
    table: torch.Tensor,
    heads: Heads,
    pool: Pool,
    *,
    scale: torch.Tensor | None,
    pre: torch.Tensor | None = None,
) -> None:
    """Write the attention output of every token of `tiles` to its row of `out` [T, Hq D].

    `qkv` [T, (Hq + 2 H) D] holds rotated queries, `pool` all keys and values up to the tokens themselves. Each row of
    `tiles` [tiles, 4] (int32): first row of `qkv`, tokens (at most TILE_ROWS), first position, column of `table`.
    `out` is multiplied by `pre` [Hq D] where given; it is bfloat16, or E4M3 codes with `scale` (0-d float32).
    """
    if tiles.shape[0] == 0:
        return
    _prefill[(heads.queries, tiles.shape[0])](
        qkv, out, tiles, table, table.stride(0), pool.keys, pool.values, pool.keys.shape[1],
        pool.key_scale, pool.value_scale, heads.scaling, heads.window, pre, scale,
        QUERIES=heads.queries, KEYS=heads.keys, SIZE=heads.size, PAGE=pool.page, ROWS=TILE_ROWS, TILE=_TILE_PLACES,
        WINDOW=heads.window > 0, PRE=pre is not None, OUT_CODES=scale is not None, num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
