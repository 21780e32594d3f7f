"""The fast path as the runner sees it: the chunks of a step in, logits and likeliest tokens out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from trtbuild.runtime.fast.decoder import Decoder, Packed
from trtbuild.runtime.fast.graphs import DecodeGraphs
from trtbuild.runtime.fast.kernels.argmax import argmax
from trtbuild.runtime.fast.kernels.prefill_attention import TILE_ROWS
from trtbuild.runtime.fast.shapes import Pool
from trtbuild.runtime.fast.weights import Weights
from trtbuild.runtime.kv_cache import LayerCache
from trtbuild.runtime.scheduler import Chunk
from trtbuild.runtime.sequence import Sequence
from trtbuild.runtime.step_logits import StepLogits


class FastPath:
    """Runs steps on fused weights: decode steps as CUDA graphs, steps with prompt tokens kernel by kernel."""

    def __init__(
        self, weights: Weights, caches: list[LayerCache], *, page: int, max_batch_size: int, max_seq_len: int
    ) -> None:
        # What the host has to do meanwhile; called once a step, when all of it is queued on the device.
        self.while_busy: Callable[[], None] = _nothing
        self.decoder = Decoder(weights, [_pool(cache, page) for cache in caches])
        with torch.inference_mode():
            self.graphs = DecodeGraphs(self.decoder, max_batch_size, -(-max_seq_len // page))

    def execute(self, chunks: list[Chunk]) -> StepLogits:
        """Compute `chunks`; the logits are float32, and valid until the next step."""
        with torch.inference_mode():
            if len(chunks) <= self.graphs.largest and all(chunk.end - chunk.start == 1 for chunk in chunks):
                logits, likeliest = self.graphs.run(
                    [chunk.sequence for chunk in chunks], [chunk.start for chunk in chunks], self.while_busy
                )
                return StepLogits(logits, [slice(row, row + 1) for row in range(len(chunks))], likeliest)
            return self.execute_packed(chunks)

    def execute_packed(self, chunks: list[Chunk]) -> StepLogits:
        """As `execute`, without graphs."""
        with torch.inference_mode():
            rows, wanted, order = _plan(chunks)
            if not wanted:
                wanted = [0]  # a step of unfinished chunks: one row keeps the shapes ordinary
            logits = self.decoder.run(_pack([chunks[index] for index in order], wanted, self.decoder))
            chosen = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)
            argmax(logits, chosen)
            self.while_busy()
            return StepLogits(logits, rows, chosen.tolist())


def _nothing() -> None:
    pass


def _pool(cache: LayerCache, page: int) -> Pool:
    keys, values = cache.keys, cache.values
    if cache.is_fp8:
        keys, values = keys.view(torch.float8_e4m3fn), values.view(torch.float8_e4m3fn)
    return Pool(keys, values, page, cache.key_scale, cache.value_scale)


def _plan(chunks: list[Chunk]) -> tuple[list[slice], list[int], list[int]]:
    """Each chunk's slice of the logits, the packed rows that are wanted, the order of packing (singles first)."""
    order = sorted(range(len(chunks)), key=lambda index: chunks[index].end - chunks[index].start > 1)
    first_row: dict[int, int] = {}
    row = 0
    for index in order:
        first_row[index] = row
        row += chunks[index].end - chunks[index].start
    wanted: list[int] = []
    rows: list[slice] = []
    for index, chunk in enumerate(chunks):
        sequence, first, count = chunk.sequence, len(wanted), chunk.end - chunk.start
        if sequence.wants_every_position and chunk.start < sequence.prompt_len:
            wanted += range(first_row[index], first_row[index] + count)
        elif chunk.is_last:
            wanted.append(first_row[index] + count - 1)
        rows.append(slice(first, len(wanted)))
    return rows, wanted, order


def _pack(chunks: list[Chunk], wanted: list[int], decoder: Decoder) -> Packed:
    """The tokens of `chunks`, single tokens first, as tensors on the device."""
    counts = [chunk.end - chunk.start for chunk in chunks]
    singles = counts.count(1)
    tokens = np.concatenate(
        [np.array(chunk.sequence.token_ids[chunk.start : chunk.end], dtype=np.int32) for chunk in chunks]
    )
    positions = np.concatenate([np.arange(chunk.start, chunk.end, dtype=np.int32) for chunk in chunks])
    columns = np.repeat(np.arange(len(chunks), dtype=np.int32), counts)
    tiles: list[tuple[int, int, int, int]] = []
    row = 0
    for column, chunk in enumerate(chunks[singles:], start=singles):
        tiles += [
            (row + start - chunk.start, min(TILE_ROWS, chunk.end - start), start, column)
            for start in range(chunk.start, chunk.end, TILE_ROWS)
        ]
        row += chunk.end - chunk.start
    # Those that see the most first: the short ones fill up what is left of the device.
    tiles.sort(key=lambda tile: -tile[2])
    device = decoder.weights.embedding.device

    def put(array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return Packed(
        tokens=put(tokens),
        positions=put(positions),
        columns=put(columns),
        table=put(_table([chunk.sequence for chunk in chunks])),
        tiles=put(np.array(tiles, dtype=np.int32).reshape(-1, 4)),
        wanted=put(np.array(wanted, dtype=np.int64)),
        singles=singles,
    )


def _table(sequences: list[Sequence]) -> npt.NDArray[np.generic]:
    table = np.zeros((max(len(sequence.block_table) for sequence in sequences), len(sequences)), dtype=np.int32)
    for column, sequence in enumerate(sequences):
        table[: len(sequence.block_table), column] = sequence.block_table
    return table
