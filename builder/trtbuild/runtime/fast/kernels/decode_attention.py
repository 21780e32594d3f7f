"""Attention of one new token a sequence over the paged cache: head norms, rotation and the cache write included.

The past is split among several programs where few sequences would leave the device idle. Each program keeps what it saw
as a partial softmax; `_combine` joins them. The new token itself comes from registers, never from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trtbuild.runtime.fast.kernels.chain import chained, let_next_start, wait_for_previous
from trtbuild.runtime.fast.kernels.numbers import next_power_of_2, to_codes
from trtbuild.runtime.fast.kernels.rotary import head_norm
from trtbuild.runtime.fast.shapes import Heads, Pool, Rotation

_TILE = 64  # positions that a program looks at together
_MOST_SPLITS = 16
_SMALLEST_DOT = 16


@triton.jit
def _decode(
    qkv, out, partial, sums, positions, table, table_stride, cos, sin, query_norm, key_norm, eps,
    pool_keys, pool_values, slots, key_scale, value_scale, scaling, window, pre, out_scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
    NORM: tl.constexpr, CODES: tl.constexpr, PRE: tl.constexpr, OUT_CODES: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    let_next_start(CHAIN)
    wait_for_previous(CHAIN)
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    position = tl.load(positions + sequence)
    if position < 0:  # a row that only fills up the batch
        return
    HALF: tl.constexpr = SIZE // 2
    group = tl.arange(0, ROWS)[:, None]
    half = tl.arange(0, HALF)[None, :]
    whole = tl.arange(0, SIZE)
    row = qkv + sequence * (QUERIES + 2 * KEYS) * SIZE
    at = row + (head * GROUP + group) * SIZE + half
    query_low = tl.load(at, mask=group < GROUP, other=0.0).to(tl.float32)
    query_high = tl.load(at + HALF, mask=group < GROUP, other=0.0).to(tl.float32)
    key_at = row + (QUERIES + head) * SIZE + half
    key_low = tl.load(key_at).to(tl.float32)
    key_high = tl.load(key_at + HALF).to(tl.float32)
    if NORM:
        query_low, query_high = head_norm(
            query_low, query_high, tl.load(query_norm + half).to(tl.float32),
            tl.load(query_norm + half + HALF).to(tl.float32), eps, SIZE,
        )  # fmt: skip
        key_low, key_high = head_norm(
            key_low, key_high, tl.load(key_norm + half).to(tl.float32),
            tl.load(key_norm + half + HALF).to(tl.float32), eps, SIZE,
        )  # fmt: skip
    angle = position.to(tl.int64) * HALF + half
    c = tl.load(cos + angle)
    s = tl.load(sin + angle)
    turned_low = (query_low * c - query_high * s).to(tl.bfloat16)
    turned_high = (query_high * c + query_low * s).to(tl.bfloat16)
    new_low = (key_low * c - key_high * s).to(tl.bfloat16)
    new_high = (key_high * c + key_low * s).to(tl.bfloat16)
    new_value = tl.load(row + (QUERIES + KEYS + head) * SIZE + whole)

    block = tl.load(table + (position // PAGE) * table_stride + sequence).to(tl.int64)
    base = head.to(tl.int64) * slots
    to = (base + block * PAGE + position % PAGE) * SIZE
    mine = split == 0
    if CODES:
        code_low, code_high = to_codes(new_low, key_scale), to_codes(new_high, key_scale)
        code_value = to_codes(new_value, value_scale)
        if split == 0:
            tl.store(pool_keys + to + half, code_low)
            tl.store(pool_keys + to + HALF + half, code_high)
            tl.store(pool_values + to + whole, code_value)
        new_low, new_high = code_low.to(tl.bfloat16), code_high.to(tl.bfloat16)
        new_value = code_value.to(tl.bfloat16)
    elif split == 0:
        tl.store(pool_keys + to + half, new_low)
        tl.store(pool_keys + to + HALF + half, new_high)
        tl.store(pool_values + to + whole, new_value)

    # In units of log2, so that exp2 serves.
    factor = scaling * key_scale * 1.4426950408889634
    fresh = tl.sum(turned_low.to(tl.float32) * new_low.to(tl.float32), axis=1)
    fresh += tl.sum(turned_high.to(tl.float32) * new_high.to(tl.float32), axis=1)
    top = tl.where(mine, fresh * factor, float("-inf"))
    total = tl.where(mine, 1.0, 0.0) + tl.zeros([ROWS], dtype=tl.float32)
    seen = tl.where(mine, new_value.to(tl.float32), 0.0)[None, :] + tl.zeros([ROWS, SIZE], dtype=tl.float32)

    first = tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)
    share = tl.cdiv(tl.cdiv(position - first, SPLITS), TILE) * TILE
    start = first + split * share
    end = tl.minimum(start + share, position)
    for n in range(start, end, TILE):
        places = n + tl.arange(0, TILE)
        real = places < end
        blocks = tl.load(table + (places // PAGE) * table_stride + sequence, mask=real, other=0).to(tl.int64)
        offset = (base + blocks * PAGE + places % PAGE) * SIZE
        keys_at = pool_keys + offset[:, None] + half
        keys_low = tl.load(keys_at, mask=real[:, None], other=0.0).to(tl.bfloat16)
        keys_high = tl.load(keys_at + HALF, mask=real[:, None], other=0.0).to(tl.bfloat16)
        scores = tl.dot(turned_low, tl.trans(keys_low))
        scores = tl.dot(turned_high, tl.trans(keys_high), scores) * factor
        scores = tl.where(real[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        shrink = tl.exp2(top - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        values_at = pool_values + offset[:, None] + whole[None, :]
        values = tl.load(values_at, mask=real[:, None], other=0.0).to(tl.bfloat16)
        seen = tl.dot(weights.to(tl.bfloat16), values, seen * shrink[:, None])
        top = higher

    line = sequence * QUERIES + head * GROUP + group
    if SPLITS == 1:
        y = (seen / total[:, None] * value_scale).to(tl.bfloat16)
        if PRE:
            by = tl.load(pre + (head * GROUP + group) * SIZE + whole[None, :], mask=group < GROUP, other=0.0)
            y = (y.to(tl.float32) * by.to(tl.float32)).to(tl.bfloat16)
        if OUT_CODES:
            tl.store(out + line * SIZE + whole[None, :], to_codes(y, tl.load(out_scale)), mask=group < GROUP)
        else:
            tl.store(out + line * SIZE + whole[None, :], y, mask=group < GROUP)
    else:
        tl.store(partial + (line * SPLITS + split) * SIZE + whole[None, :], seen, mask=group < GROUP)
        rows = tl.arange(0, ROWS)
        place = ((sequence * QUERIES + head * GROUP + rows) * SPLITS + split) * 2
        tl.store(sums + place, top, mask=rows < GROUP)
        tl.store(sums + place + 1, total, mask=rows < GROUP)


@triton.jit
def _combine(
    out, partial, sums, positions, value_scale, pre, out_scale,
    QUERIES: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr, PRE: tl.constexpr, OUT_CODES: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    let_next_start(CHAIN)
    wait_for_previous(CHAIN)
    sequence = tl.program_id(0).to(tl.int64)
    if tl.load(positions + sequence) < 0:
        return
    line = sequence * QUERIES + tl.program_id(1)
    splits = tl.arange(0, SPLITS)
    whole = tl.arange(0, SIZE)
    place = (line * SPLITS + splits) * 2
    tops = tl.load(sums + place)
    weights = tl.exp2(tops - tl.max(tops, axis=0))
    total = tl.sum(weights * tl.load(sums + place + 1), axis=0)
    parts = tl.load(partial + (line * SPLITS + splits)[:, None] * SIZE + whole[None, :])
    y = (tl.sum(parts * weights[:, None], axis=0) / total * value_scale).to(tl.bfloat16)
    if PRE:
        by = tl.load(pre + tl.program_id(1) * SIZE + whole).to(tl.float32)
        y = (y.to(tl.float32) * by).to(tl.bfloat16)
    if OUT_CODES:
        tl.store(out + line * SIZE + whole, to_codes(y, tl.load(out_scale)))
    else:
        tl.store(out + line * SIZE + whole, y)


def splits_for(programs: int, multiprocessors: int) -> int:
    """Into how many parts the past is cut so that `programs` (sequences x key heads) fill the device about once."""
    splits = 1
    while splits < _MOST_SPLITS and programs * splits * 2 <= multiprocessors:
        splits *= 2
    return splits


def decode_attention(
    qkv: torch.Tensor,
    out: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    rotation: Rotation,
    heads: Heads,
    pool: Pool,
    *,
    splits: int,
    scale: torch.Tensor | None,
    pre: torch.Tensor | None = None,
) -> None:
    """Write the attention output of one token a sequence to `out` [B, Hq D], and its keys and values into `pool`.

    `qkv` [B, (Hq + 2 H) D] holds the projections as they are; `positions` [B] (int32) each token's place in its
    sequence, -1 for a row to leave out; `table` [blocks, at least B] (int32) the blocks of each sequence, a column
    each. `out` is multiplied by `pre` [Hq D] where given; it is bfloat16, or E4M3 codes with `scale` (0-d float32).
    """
    rows = qkv.shape[0]
    lines = rows * heads.queries
    partial = sums = None
    if splits > 1:
        partial = torch.empty((lines, splits, heads.size), dtype=torch.float32, device=qkv.device)
        sums = torch.empty((lines, splits, 2), dtype=torch.float32, device=qkv.device)
    group = heads.queries // heads.keys
    _decode[(rows, heads.keys, splits)](
        qkv, out, partial, sums, positions, table, table.stride(0), rotation.cos, rotation.sin,
        heads.query_norm, heads.key_norm, heads.eps,
        pool.keys, pool.values, pool.keys.shape[1], pool.key_scale, pool.value_scale,
        heads.scaling, heads.window, pre, scale,
        QUERIES=heads.queries, KEYS=heads.keys, SIZE=heads.size, GROUP=group,
        ROWS=max(_SMALLEST_DOT, next_power_of_2(group)), PAGE=pool.page, TILE=_TILE, SPLITS=splits,
        NORM=heads.query_norm is not None, CODES=pool.is_fp8, PRE=pre is not None, OUT_CODES=scale is not None,
        num_warps=4, num_stages=2, **chained(),
    )  # fmt: skip
    if splits > 1:
        _combine[(rows, heads.queries)](
            out, partial, sums, positions, pool.value_scale, pre, scale,
            QUERIES=heads.queries, SIZE=heads.size, SPLITS=splits, PRE=pre is not None, OUT_CODES=scale is not None,
            num_warps=1,
            **chained(),
        )  # fmt: skip
