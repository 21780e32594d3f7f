"""The fast path as the runner sees it: the chunks of a step in, logits and likeliest tokens out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from trtbuild.runtime.fast.answers import Answers
from trtbuild.runtime.fast.decoder import Decoder, Packed
from trtbuild.runtime.fast.graphs import DecodeGraphs, token
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
        device = weights.embedding.device
        self.answers = Answers(max_batch_size, device)
        self.decoder = Decoder(weights, [_pool(cache, page) for cache in caches], self.answers.chosen)
        with torch.inference_mode():
            self.graphs = DecodeGraphs(self.decoder, self.answers, max_batch_size, -(-max_seq_len // page))

    def execute(self, chunks: list[Chunk]) -> StepLogits:
        """Launch `chunks`; the logits are float32, and those of the newest step."""
        with torch.inference_mode():
            if len(chunks) <= self.graphs.largest and all(chunk.end - chunk.start == 1 for chunk in chunks):
                return self.graphs.run(chunks)
            return self.execute_packed(chunks)

    def execute_packed(self, chunks: list[Chunk]) -> StepLogits:
        """As `execute`, without graphs."""
        with torch.inference_mode():
            rows, wanted, order = _plan(chunks)
            if not wanted:
                wanted = [0]  # a step of unfinished chunks: one row keeps the shapes ordinary
            logits = self.decoder.run(_pack([chunks[index] for index in order], wanted, self.decoder))
            count = logits.shape[0]
            if count <= self.answers.chosen.shape[0]:
                argmax(logits, self.answers.chosen[:count])
                return StepLogits(logits, rows, self.answers.fetch(count))
            # The logits of many positions are asked for, so that the next step waits for this one anyway.
            return StepLogits(logits, rows)


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
    tokens = np.concatenate([np.array(_tokens(chunk), dtype=np.int32) for chunk in chunks])
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

    table = _table([chunk.sequence for chunk in chunks])
    places = np.array(tiles, dtype=np.int32).reshape(-1, 4)
    sent = _send([tokens, positions, columns, table, places, np.array(wanted, dtype=np.int32)], device)
    return Packed(sent[0], sent[1], sent[2], sent[3], sent[4], sent[5], singles=singles)


def _tokens(chunk: Chunk) -> list[int]:
    return chunk.sequence.token_ids[chunk.start : chunk.end] if chunk.is_known else [token(chunk)]


def _send(arrays: list[npt.NDArray[np.int32]], device: torch.device) -> list[torch.Tensor]:
    """`arrays` on the device, in one copy from pinned memory, for which nobody waits."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    sent = (flat.pin_memory() if device.type == "cuda" else flat).to(device, non_blocking=True)
    found, start = [], 0
    for array in arrays:
        found.append(sent[start : start + array.size].view(array.shape))
        start += array.size
    return found


def _table(sequences: list[Sequence]) -> npt.NDArray[np.int32]:
    table = np.zeros((max(len(sequence.block_table) for sequence in sequences), len(sequences)), dtype=np.int32)
    for column, sequence in enumerate(sequences):
        table[: len(sequence.block_table), column] = sequence.block_table
    return table
