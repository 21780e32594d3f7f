"""Decode steps as CUDA graphs: one a padded batch size, over buffers that never move."""

from __future__ import annotations

import gc

import torch

from trtbuild.runtime.fast.answers import Answers
from trtbuild.runtime.fast.decoder import Decoder
from trtbuild.runtime.fast.kernels.argmax import argmax
from trtbuild.runtime.scheduler import Chunk
from trtbuild.runtime.sequence import Sequence
from trtbuild.runtime.step_logits import StepLogits

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)


class DecodeGraphs:
    """Runs decode steps of up to `largest` sequences, one column of every buffer each.

    A step copies a small block of numbers to the device, the block table where it changed, and replays a graph: the
    host waits for nothing but the copies of the step before.
    """

    def __init__(self, decoder: Decoder, answers: Answers, max_batch_size: int, max_blocks: int) -> None:
        self._decoder = decoder
        self._answers = answers
        self.sizes = [size for size in _SIZES if size < max_batch_size] + [min(max_batch_size, _SIZES[-1])]
        largest, device = self.sizes[-1], decoder.weights.embedding.device
        vocabulary = decoder.weights.head.shape[0]
        # Rows: tokens, positions. The host's copies are pinned, so that no copy waits for the device.
        self._host_inputs = torch.zeros((2, largest), dtype=torch.int32, pin_memory=True)
        self._host_table = torch.zeros((max_blocks, largest), dtype=torch.int32, pin_memory=True)
        self._inputs = torch.zeros((2, largest), dtype=torch.int32, device=device)
        self._table = torch.zeros((max_blocks, largest), dtype=torch.int32, device=device)
        self._logits = torch.empty((largest, vocabulary), dtype=torch.float32, device=device)
        self._input_numbers, self._table_numbers = self._host_inputs.numpy(), self._host_table.numpy()
        # Whose blocks each column of the table holds, and at which of its versions.
        self._owners: list[tuple[Sequence | None, int]] = [(None, 0)] * largest
        self._copied = torch.cuda.Event()
        self._inputs[1] = -1
        self._rows = [slice(row, row + 1) for row in range(largest)]
        self._graphs = self._capture()

    @property
    def largest(self) -> int:
        """The most sequences of a step."""
        return self.sizes[-1]

    def run(self, chunks: list[Chunk]) -> StepLogits:
        """Launch the step of `chunks`, single tokens; the logits [B, V] are those of the newest step."""
        count = len(chunks)
        size = next(size for size in self.sizes if size >= count)
        self._copied.synchronize()  # the device has taken the last step's numbers
        numbers = self._input_numbers
        numbers[0, :count] = [token(chunk) for chunk in chunks]
        numbers[1, :count] = [chunk.start for chunk in chunks]
        numbers[1, count:size] = -1
        self._inputs.copy_(self._host_inputs, non_blocking=True)
        self._update_table(chunks)
        self._copied.record()
        self._graphs[size].replay()
        return StepLogits(self._logits[:count], self._rows[:count], self._answers.fetch(count))

    def _update_table(self, chunks: list[Chunk]) -> None:
        height = 0
        for column, chunk in enumerate(chunks):
            sequence = chunk.sequence
            owner = (sequence, sequence.table_version)
            if self._owners[column] != owner:
                self._owners[column] = owner
                blocks = sequence.block_table
                self._table_numbers[: len(blocks), column] = blocks
                height = max(height, len(blocks))
        if height:
            self._table[:height].copy_(self._host_table[:height], non_blocking=True)

    def _capture(self) -> dict[int, torch.cuda.CUDAGraph]:
        """A graph of each size. Neither another thread's work nor a collected tensor may fall into a capture."""
        collecting = gc.isenabled()
        gc.disable()
        try:
            return self._capture_all()
        finally:
            if collecting:
                gc.enable()

    def _capture_all(self) -> dict[int, torch.cuda.CUDAGraph]:
        graphs: dict[int, torch.cuda.CUDAGraph] = {}
        pool = None
        # The largest first: the smaller ones fit into the memory that it took.
        for size in reversed(self.sizes):
            self._step(size)  # compiles kernels and lets libraries take their workspaces
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._step(size)
            pool = pool or graph.pool()
            graphs[size] = graph
        return graphs

    def _step(self, size: int) -> None:
        logits = self._logits[:size]
        self._decoder.decode(self._inputs[0, :size], self._inputs[1, :size], self._table, logits)
        argmax(logits, self._answers.chosen[:size])


def token(chunk: Chunk) -> int:
    """The token of a chunk of one, as the device is told of it: -1 - r where only the newest step's row r knows it."""
    sequence = chunk.sequence
    return sequence.token_ids[chunk.start] if chunk.is_known else -1 - sequence.row
