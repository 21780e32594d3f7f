"""Read the tensors of a decoder layer on threads, and of the next one while the current one is computed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from trtbuild.compress.blocks import TORCH_TYPES, TensorBlocks
from trtbuild.compress.places import Part
from trtbuild.compress.skeleton import Skeleton

_PIECE_BYTES = 32 << 20
_Wanted = Sequence[tuple[Part, torch.Tensor]]


class LayerReader:
    """Gives the decoder layers in order, each one as tensors by their names in it.

    Args:
        skeleton: Knows the layers and their places.
        pool: Threads that read.
        ahead: Read the next layer while the caller works on the one it has got. On a CPU it waits in the source's own
            type, which takes half the room.
    """

    def __init__(self, skeleton: Skeleton, pool: ThreadPoolExecutor, *, ahead: bool) -> None:
        self._skeleton, self._pool, self._ahead = skeleton, pool, ahead
        self._narrow = ahead and skeleton.device.type == "cpu"
        self._started: tuple[int, dict[str, torch.Tensor], list[Future[None]]] | None = None

    def expect(self, index: int) -> None:
        """Begin to read the layer that will be taken first."""
        if self._ahead and index < self._skeleton.depth:
            self._started = self._start(index)

    def take(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of a layer.

        Raises:
            ArtifactError: One cannot be read, or holds NaN or infinity.
        """
        started = self._started
        if started is None or started[0] != index:
            started = self._start(index)
        self._started = None
        _, values, pieces = started
        for piece in pieces:
            piece.result()
        if self._ahead and index + 1 < self._skeleton.depth:
            self._started = self._start(index + 1)
        return values

    def _start(self, index: int) -> tuple[int, dict[str, torch.Tensor], list[Future[None]]]:
        values, wanted = {}, []
        for name, (part, slot) in self._skeleton.wanted(index).items():
            kind = TORCH_TYPES[part.info.dtype] if self._narrow else slot.dtype
            values[name] = torch.empty(slot.shape, dtype=kind, device=self._skeleton.device)
            wanted.append((part, values[name]))
        return index, values, start_reading(self._pool, self._skeleton.blocks, wanted)


def start_reading(pool: ThreadPoolExecutor, blocks: TensorBlocks, wanted: _Wanted) -> list[Future[None]]:
    """Begin to fill tensors, large ones in several pieces at once."""
    on_gpu = any(target.is_cuda for _, target in wanted)
    # Room that was freed a moment ago may still be in use by what the device has yet to do.
    free = torch.cuda.current_stream().record_event() if on_gpu else None
    pieces = []
    for part, target in wanted:
        flat = target.view(-1)
        step = max(_PIECE_BYTES // flat.element_size(), 1)
        for begin in range(0, flat.numel(), step):
            piece = flat[begin : begin + step]
            pieces.append(pool.submit(_read, blocks, part, piece, begin, free))
    return pieces


_streams = threading.local()


def _read(blocks: TensorBlocks, part: Part, piece: torch.Tensor, begin: int, free: torch.cuda.Event | None) -> None:
    if free is None:
        blocks.read(part.info, piece, part.first + begin)
        return
    if not hasattr(_streams, "own"):
        _streams.own = torch.cuda.Stream()
    _streams.own.wait_event(free)
    with torch.cuda.stream(_streams.own):
        blocks.read(part.info, piece, part.first + begin)
        _streams.own.synchronize()
