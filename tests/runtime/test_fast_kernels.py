"""Every kernel of the fast path against a float64 reference: fresh random inputs, odd sizes, poisoned outputs."""

from __future__ import annotations

import pytest
import torch

from runtime.gpu import BF16_ERROR, DEVICE, FP8_ERROR, codes, error, needs_gpu, normal, poison

pytestmark = needs_gpu
SCALE = 0.037


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, device=DEVICE)


def expanded(found: torch.Tensor, scale: float) -> torch.Tensor:
    """Codes times their scale, or plain numbers as they are."""
    return found.double() * scale if found.dtype == torch.float8_e4m3fn else found.double()


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.double()


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (3, 576), (37, 100), (5, 64)])
def test_add_norm(rows: int, width: int, added: bool, fp8: bool) -> None:
    from trtbuild.runtime.fast.kernels.norm import add_norm

    stream, delta, weight = normal(rows, width, scale=3), normal(rows, width), normal(width)
    total = stream.double() + (delta.double() if added else 0)
    kept = stream.clone()
    poison()
    found = add_norm(kept, delta if added else None, weight, 1e-5, scalar(SCALE) if fp8 else None)
    assert error(kept, total) < (BF16_ERROR if added else 1e-12)
    assert error(expanded(found, SCALE), rms(total, weight, 1e-5)) < (FP8_ERROR if fp8 else BF16_ERROR)


def test_codes_saturate_and_round_to_even() -> None:
    """Bit for bit what the general path makes: past the largest number, halfway between two codes, tiny ones."""
    from trtbuild.runtime.fast.kernels.activation import silu_mul
    from trtbuild.runtime.linear import to_e4m3

    up = torch.cat([normal(1, 4000, scale=300), normal(1, 96, scale=1e-3)], dim=1)
    gate = torch.full_like(up, 20.0)  # silu(20) is 20 in bfloat16
    found = silu_mul(torch.cat([gate, up], dim=1), scalar(1.0))
    expected = to_e4m3(torch.nn.functional.silu(gate) * up, scalar(1.0))
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    assert (found.double().abs() == 448).sum() > 10


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 1536), (7, 100), (19, 2048)])
def test_silu_mul(rows: int, width: int, fp8: bool) -> None:
    from trtbuild.runtime.fast.kernels.activation import silu_mul

    pairs = normal(rows, 2 * width)
    gate, up = pairs.double().chunk(2, dim=1)
    poison()
    found = silu_mul(pairs, scalar(SCALE) if fp8 else None)
    assert error(expanded(found, SCALE), gate * torch.sigmoid(gate) * up) < (FP8_ERROR if fp8 else BF16_ERROR)


@pytest.mark.parametrize("form", ["plain", "bias", "float32", "gated", "gated to codes"])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(512, 4096), (512, 1024), (147, 200), (72, 2064)])
def test_one_row(outputs: int, inputs: int, fp8: bool, form: str) -> None:
    from trtbuild.runtime.fast.kernels.one_row import Tiling, one_row
    from trtbuild.runtime.fast.linear import TABLE

    gated = form.startswith("gated")
    total = outputs * 2 if gated else outputs
    x = codes(1, inputs) if fp8 else normal(1, inputs)
    weight = codes(total, inputs) if fp8 else normal(total, inputs, scale=inputs**-0.5)
    factor = 1 / (60 * 60 * inputs**0.5) if fp8 else 1.0
    bias = normal(outputs) if form == "bias" else None
    y = x.double() @ weight.double().T * factor + (0 if bias is None else bias.double())
    if gated:
        gate, up = y.chunk(2, dim=1)
        y = gate * torch.sigmoid(gate) * up
    to_codes = form == "gated to codes"
    used = TABLE["fp8" if fp8 else "bf16"][0]
    for tiling in (used.plain, used.gated, Tiling(16, 256, 4, 3)):
        assert isinstance(tiling, Tiling)
        poison()
        found = one_row(
            x, weight, tiling, factor=scalar(factor) if fp8 else None, bias=bias, gated=gated,
            scale=scalar(SCALE) if to_codes else None,
            out=torch.full((1, outputs), float("nan"), device=DEVICE) if form == "float32" else None,
        )  # fmt: skip
        assert found.shape == (1, outputs)
        assert error(expanded(found, SCALE), y) < (FP8_ERROR if to_codes else BF16_ERROR)


def activated(y: torch.Tensor) -> torch.Tensor:
    gate, up = y.chunk(2, dim=1)
    return gate * torch.sigmoid(gate) * up


def test_silu_mul_multiplies_by_what_the_next_matrix_asks() -> None:
    from trtbuild.runtime.fast.kernels.activation import silu_mul

    pairs, pre = normal(7, 2 * 300), normal(300)
    assert error(silu_mul(pairs, None, pre), activated(pairs.double()) * pre.double()) < BF16_ERROR


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(512, 3072), (146, 208)])
@pytest.mark.parametrize("rows", [2, 8, 17, 64])
def test_few_rows(rows: int, outputs: int, inputs: int, fp8: bool, splits: int) -> None:
    from trtbuild.runtime.fast.kernels.few_rows import Block, few_rows

    x = codes(rows, inputs) if fp8 else normal(rows, inputs)
    weight = codes(outputs, inputs) if fp8 else normal(outputs, inputs, scale=inputs**-0.5)
    factor = 1 / (60 * 60 * inputs**0.5) if fp8 else 1.0
    bias = normal(outputs)
    y = x.double() @ weight.double().T * factor
    for block in (Block(64, 128, splits, 4, 4), Block(128, 64, splits, 4, 5), Block(64, 256, splits, 4, 3, rows=16)):
        used = scalar(factor) if fp8 else None
        for _ in range(3):  # the counters of one call are the next one's
            poison()
            found = few_rows(x, weight, block, factor=used, bias=bias)
            assert error(found, y + bias.double()) < BF16_ERROR
        out = torch.full((rows, outputs), float("nan"), device=DEVICE)
        assert error(few_rows(x, weight, block, factor=used, out=out), y) < BF16_ERROR
        poison()
        found = few_rows(x, weight, block, factor=used, gated=True, scale=scalar(SCALE) if fp8 else None)
        assert error(expanded(found, SCALE), activated(y)) < (FP8_ERROR if fp8 else BF16_ERROR)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 3, 16, 40, 200])
@pytest.mark.parametrize(("outputs", "inputs"), [(512, 3072), (146, 384)])
def test_four_bits(outputs: int, inputs: int, rows: int, group: int) -> None:
    from trtbuild.runtime.fast.kernels.few_rows import Block, few_rows
    from trtbuild.runtime.fast.kernels.int4 import expand
    from trtbuild.runtime.fast.kernels.one_row_int4 import Lines, one_row_int4
    from trtbuild.runtime.fast.linear import TABLE
    from trtbuild.runtime.fast.packing import pack

    numbers = torch.randint(-8, 8, (outputs, inputs), device=DEVICE, dtype=torch.int8)
    packed = pack(numbers, group)
    scales = (torch.rand(inputs // group, outputs, device=DEVICE) * 0.01).to(torch.bfloat16)
    exact = (numbers.double().view(outputs, -1, group) * scales.double().t()[:, :, None]).view(outputs, inputs)
    weight = torch.full((outputs, inputs), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    assert error(expand(packed, scales, weight), exact) < BF16_ERROR
    # Bit for bit what the general path multiplies with.
    assert torch.equal(weight, (numbers.view(outputs, -1, group) * scales.t()[:, :, None]).view(outputs, inputs))
    x, bias, pre = normal(rows, inputs), normal(outputs), normal(outputs // 2)
    y = x.double() @ exact.T
    gated = activated(y) * pre.double()
    narrow = Block(64, 0, 2, 4, 3, rows=16, groups=4)
    shares = [one for line in TABLE["int4"] if rows <= line.rows for one in (line.plain, line.gated)]
    used = [one for one in shares if isinstance(one, Block)]
    for block in (Block(64, 0, 3, 4, 3, rows=64), Block(128, 0, 1, 8, 2, rows=128, groups=2), narrow, *used):
        poison()
        assert error(few_rows(x, packed, block, scales=scales, bias=bias), y + bias.double()) < BF16_ERROR
        poison()
        assert error(few_rows(x, packed, block, scales=scales, gated=True, pre=pre), gated) < BF16_ERROR
    for lines in (Lines(16, 8, 4), Lines(8, 4, 2)) if rows == 1 else ():
        poison()
        assert error(one_row_int4(x, packed, scales, lines, bias=bias), y + bias.double()) < BF16_ERROR
        poison()
        assert error(one_row_int4(x, packed, scales, lines, gated=True, pre=pre), gated) < BF16_ERROR


def test_embedding_of_tokens_that_the_device_chose() -> None:
    from trtbuild.runtime.fast.kernels.embed import embed

    table = normal(50, 1500)
    tokens = torch.tensor([3, -1, -3, 49], dtype=torch.int32, device=DEVICE)
    chosen = torch.tensor([7, 8, -1], dtype=torch.int32, device=DEVICE)
    poison()
    assert torch.equal(embed(tokens, chosen, table), table[[3, 7, 0, 49]])


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("width", [320, 9000])
def test_argmax(rows: int, width: int) -> None:
    from trtbuild.runtime.fast.kernels.argmax import argmax

    logits = torch.randn(rows, width, device=DEVICE)
    logits[0, 100] = logits[0, 317] = 50.0
    tokens = torch.full((rows,), -7, dtype=torch.int32, device=DEVICE)
    argmax(logits, tokens)
    assert tokens[0] == 100
    assert torch.equal(tokens.long(), logits.argmax(dim=1))
    for strange in (float("nan"), float("inf")):
        broken = logits.clone()
        broken[rows - 1, width - 1] = strange
        argmax(broken, tokens)
        assert tokens[rows - 1] == -1
    argmax(torch.full_like(logits, float("-inf")), tokens)
    assert (tokens == -1).all()


class Cache:
    """A paged cache with random past, its blocks scattered; and the same numbers as plain lists for the reference."""

    def __init__(self, lengths: list[int], keys: int, size: int, page: int, fp8: bool) -> None:
        from trtbuild.runtime.fast.shapes import Pool

        needed = [-(-length // page) for length in lengths]
        blocks = torch.randperm(sum(needed) + 3)
        width = max(needed)
        self.table = torch.full((width, len(lengths)), 2**30, dtype=torch.int32)
        taken = 0
        for column, count in enumerate(needed):
            self.table[:count, column] = blocks[taken : taken + count]
            taken += count
        self.table = self.table.to(DEVICE)
        shape = (keys, len(blocks) * page, size)
        make = codes if fp8 else normal
        self.scales = (0.02, 0.017) if fp8 else (1.0, 1.0)
        self.pool = Pool(make(*shape), make(*shape), page, *self.scales)
        self.page = page

    def slots(self, column: int, length: int) -> torch.Tensor:
        places = torch.arange(length, device=DEVICE)
        return self.table[places // self.page, column].long() * self.page + places % self.page

    def read(self, column: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [H, length, D], float64, scales included."""
        slots = self.slots(column, length)
        keys, values = self.pool.keys.double(), self.pool.values.double()
        return keys[:, slots] * self.scales[0], values[:, slots] * self.scales[1]


def rotation(positions: int, size: int):
    from trtbuild.runtime.fast.shapes import Rotation

    angles = torch.arange(positions, device=DEVICE)[:, None] * 10000.0 ** (
        -torch.arange(0, size, 2, device=DEVICE) / size
    )
    return Rotation(angles.cos().float().contiguous(), angles.sin().float().contiguous())


def turned(x: torch.Tensor, positions: torch.Tensor, turn, norm: torch.Tensor | None, eps: float) -> torch.Tensor:
    """`x` [T, heads, D] normed and rotated in float64."""
    if norm is not None:
        x = rms(x, norm, eps)
    low, high = x.chunk(2, dim=-1)
    c, s = turn.cos[positions].double()[:, None], turn.sin[positions].double()[:, None]
    return torch.cat([low * c - high * s, high * c + low * s], dim=-1)


def attention(query, keys, values, first: int, scaling: float, window: int) -> torch.Tensor:
    """[count, Hq, D] of query [count, Hq, D] at positions from `first`, and keys and values [H, L, D]."""
    count, queries, _ = query.shape
    group = queries // keys.shape[0]
    scores = torch.einsum("thd,hld->htl", query, keys.repeat_interleave(group, 0)) * scaling
    rows = torch.arange(first, first + count, device=DEVICE)[:, None]
    columns = torch.arange(keys.shape[1], device=DEVICE)[None]
    hidden = (columns > rows) | ((columns <= rows - window) if window else False)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("htl,hld->thd", weights, values.repeat_interleave(group, 0))


SHAPES = [  # query heads, key heads, head size, page, window, norms
    (8, 2, 64, 32, 0, False),
    (9, 3, 32, 7, 0, True),
    (4, 4, 128, 32, 50, False),
    (6, 1, 64, 1, 0, True),
]


def make_heads(queries: int, keys: int, size: int, window: int, normed: bool):
    from trtbuild.runtime.fast.shapes import Heads

    norms = (1 + normal(size, scale=0.2), 1 + normal(size, scale=0.2)) if normed else (None, None)
    return Heads(queries, keys, size, size**-0.5, window, *norms, eps=1e-5)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_attention(shape: tuple[int, int, int, int, int, bool], fp8: bool, splits: int) -> None:
    from trtbuild.runtime.fast.kernels.decode_attention import decode_attention

    queries, keys, size, page, window, normed = shape
    lengths = [1, 2, 64, 65, 130, 301]
    heads, turn = make_heads(queries, keys, size, window, normed), rotation(400, size)
    cache = Cache(lengths, keys, size, page, fp8)
    rows = len(lengths) + 1  # the last row only fills up
    qkv = normal(rows, (queries + 2 * keys) * size)
    positions = torch.tensor([length - 1 for length in lengths] + [-1], dtype=torch.int32, device=DEVICE)
    table = torch.cat([cache.table, torch.full_like(cache.table[:, :1], 2**30)], dim=1)
    before = cache.pool.keys.clone()
    raw = qkv.double().view(rows, -1, size)
    places = positions.clamp(min=0).long()
    query = turned(raw[:, :queries], places, turn, heads.query_norm, heads.eps)
    key = turned(raw[:, queries : queries + keys], places, turn, heads.key_norm, heads.eps)
    for out_codes in (False, True):
        poison()
        out = torch.full((rows, queries * size), float("nan"), device=DEVICE, dtype=torch.bfloat16)
        out = out.to(torch.float8_e4m3fn) if out_codes else out
        decode_attention(
            qkv, out, positions, table, turn, heads, cache.pool, splits=splits,
            scale=scalar(SCALE) if out_codes else None,
        )  # fmt: skip
        found = expanded(out, SCALE).view(rows, queries, size)
        for column, length in enumerate(lengths):
            stored_keys, stored_values = cache.read(column, length)
            limit = FP8_ERROR if fp8 else BF16_ERROR
            assert error(stored_keys[:, -1], key[column]) < limit
            assert error(stored_values[:, -1], raw[column, queries + keys :]) < limit
            expected = attention(
                query[column : column + 1], stored_keys, stored_values, length - 1, heads.scaling, window
            )[0]
            assert error(found[column], expected) < (FP8_ERROR if out_codes else BF16_ERROR), (column, length)
    # Nothing but the new tokens' slots was touched.
    written = torch.stack([cache.slots(column, length)[-1] for column, length in enumerate(lengths)])
    same = before.view(torch.uint8) == cache.pool.keys.view(torch.uint8)
    kept = torch.ones(before.shape[1], dtype=torch.bool, device=DEVICE)
    kept[written] = False
    assert same[:, kept].all()


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill(shape: tuple[int, int, int, int, int, bool], fp8: bool) -> None:
    """Whole prompts, chunks after a past, and lengths around the tiles, packed into one step."""
    from trtbuild.runtime.fast.kernels.prefill_attention import TILE_ROWS, prefill_attention
    from trtbuild.runtime.fast.kernels.rotary import rotary_write

    queries, keys, size, page, window, normed = shape
    runs = [(0, 1), (0, 64), (5, 131), (200, 129), (63, 2), (0, 300)]
    heads, turn = make_heads(queries, keys, size, window, normed), rotation(400, size)
    cache = Cache([first + count for first, count in runs], keys, size, page, fp8)
    qkv = normal(sum(count for _, count in runs), (queries + 2 * keys) * size)
    positions = torch.cat([torch.arange(first, first + count) for first, count in runs]).to(DEVICE)
    columns = torch.cat([torch.full((count,), index) for index, (_, count) in enumerate(runs)]).to(DEVICE)
    raw = qkv.double().view(len(positions), -1, size)
    query = turned(raw[:, :queries], positions, turn, heads.query_norm, heads.eps)
    key = turned(raw[:, queries : queries + keys], positions, turn, heads.key_norm, heads.eps)
    rotary_write(qkv, positions.int(), columns.int(), cache.table, turn, heads, cache.pool)
    assert error(qkv.view(len(positions), -1, size)[:, :queries], query) < BF16_ERROR
    tiles, row = [], 0
    for column, (first, count) in enumerate(runs):
        tiles += [
            (row + start, min(TILE_ROWS, count - start), first + start, column) for start in range(0, count, TILE_ROWS)
        ]
        row += count
    out_codes = fp8
    out = torch.full((len(positions), queries * size), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    out = out.to(torch.float8_e4m3fn) if out_codes else out
    prefill_attention(
        qkv, out, torch.tensor(tiles, dtype=torch.int32, device=DEVICE), cache.table, heads, cache.pool,
        scale=scalar(SCALE) if out_codes else None,
    )  # fmt: skip
    found = expanded(out, SCALE).view(len(positions), queries, size)
    row = 0
    for column, (first, count) in enumerate(runs):
        stored_keys, stored_values = cache.read(column, first + count)
        here = slice(row, row + count)
        limit = FP8_ERROR if fp8 else BF16_ERROR
        assert error(stored_keys[:, first:].transpose(0, 1), key[here]) < limit
        assert error(stored_values[:, first:].transpose(0, 1), raw[here, queries + keys :]) < limit
        expected = attention(query[here], stored_keys, stored_values, first, heads.scaling, window)
        assert error(found[here], expected) < (FP8_ERROR if out_codes else BF16_ERROR), (first, count)
        row += count
