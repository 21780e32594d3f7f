"""Head norms, rotary positions and the write into the paged cache, for packed prompt tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trtbuild.runtime.fast.kernels.numbers import next_power_of_2, to_codes
from trtbuild.runtime.fast.shapes import Heads, Pool, Rotation


@triton.jit
def head_norm(low, high, weight_low, weight_high, eps, SIZE: tl.constexpr):
    """The RMS norm over heads given as halves [heads, SIZE / 2], rounded as a bfloat16 module rounds."""
    mean = (tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / SIZE
    factor = tl.rsqrt(mean + eps)[:, None]
    low = (low * factor).to(tl.bfloat16).to(tl.float32) * weight_low
    high = (high * factor).to(tl.bfloat16).to(tl.float32) * weight_high
    return low.to(tl.bfloat16).to(tl.float32), high.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _rotary_write(
    qkv, positions, columns, table, table_stride, cos, sin, query_norm, key_norm, eps,
    pool_keys, pool_values, slots, key_scale, value_scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    PAGE: tl.constexpr, NORM: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token)
    block = tl.load(table + (position // PAGE) * table_stride + tl.load(columns + token)).to(tl.int64)
    slot = block * PAGE + position % PAGE
    heads = tl.arange(0, HEADS)[:, None]
    half = tl.arange(0, HALF)[None, :]
    inside = (heads < QUERIES + 2 * KEYS) & (half < SIZE // 2)
    at = qkv + token * (QUERIES + 2 * KEYS) * SIZE + heads * SIZE + half
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + SIZE // 2, mask=inside, other=0.0).to(tl.float32)
    is_query, is_value = heads < QUERIES, heads >= QUERIES + KEYS
    normed_low, normed_high = low, high
    if NORM:
        seen = half < SIZE // 2
        query_low = tl.load(query_norm + half, mask=seen, other=0.0).to(tl.float32)
        query_high = tl.load(query_norm + half + SIZE // 2, mask=seen, other=0.0).to(tl.float32)
        key_low = tl.load(key_norm + half, mask=seen, other=0.0).to(tl.float32)
        key_high = tl.load(key_norm + half + SIZE // 2, mask=seen, other=0.0).to(tl.float32)
        weight_low = tl.where(is_query, query_low, key_low)
        weight_high = tl.where(is_query, query_high, key_high)
        normed_low, normed_high = head_norm(low, high, weight_low, weight_high, eps, SIZE)
    angle = position.to(tl.int64) * (SIZE // 2) + half
    c = tl.load(cos + angle, mask=half < SIZE // 2, other=0.0)
    s = tl.load(sin + angle, mask=half < SIZE // 2, other=0.0)
    low = tl.where(is_value, low, normed_low * c - normed_high * s).to(tl.bfloat16)
    high = tl.where(is_value, high, normed_high * c + normed_low * s).to(tl.bfloat16)
    tl.store(at, low, mask=inside & is_query)
    tl.store(at + SIZE // 2, high, mask=inside & is_query)
    is_key = (heads >= QUERIES) & (heads < QUERIES + KEYS)
    to_keys = pool_keys + ((heads - QUERIES).to(tl.int64) * slots + slot) * SIZE + half
    to_values = pool_values + ((heads - QUERIES - KEYS).to(tl.int64) * slots + slot) * SIZE + half
    if CODES:
        tl.store(to_keys, to_codes(low, key_scale), mask=inside & is_key)
        tl.store(to_keys + SIZE // 2, to_codes(high, key_scale), mask=inside & is_key)
        tl.store(to_values, to_codes(low, value_scale), mask=inside & is_value)
        tl.store(to_values + SIZE // 2, to_codes(high, value_scale), mask=inside & is_value)
    else:
        tl.store(to_keys, low, mask=inside & is_key)
        tl.store(to_keys + SIZE // 2, high, mask=inside & is_key)
        tl.store(to_values, low, mask=inside & is_value)
        tl.store(to_values + SIZE // 2, high, mask=inside & is_value)


def rotary_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    columns: torch.Tensor,
    table: torch.Tensor,
    rotation: Rotation,
    heads: Heads,
    pool: Pool,
) -> None:
    """Norm and rotate the queries of `qkv` [T, (Hq + 2 H) D] in place; put rotated keys and values into `pool`.

    `positions` [T] and `columns` [T] (int32) give each token's place in its sequence and its sequence's column of
    `table` [blocks, sequences] (int32), which names the block of each run of `pool.page` positions.
    """
    if qkv.shape[0] == 0:
        return
    _rotary_write[(qkv.shape[0],)](
        qkv, positions, columns, table, table.stride(0), rotation.cos, rotation.sin,
        heads.query_norm, heads.key_norm, heads.eps,
        pool.keys, pool.values, pool.keys.shape[1], pool.key_scale, pool.value_scale,
        QUERIES=heads.queries, KEYS=heads.keys, SIZE=heads.size, HALF=next_power_of_2(heads.size // 2),
        HEADS=next_power_of_2(heads.queries + 2 * heads.keys), PAGE=pool.page,
        NORM=heads.query_norm is not None, CODES=pool.is_fp8, num_warps=4,
    )  # fmt: skip
