"""Read tensors of a checkpoint block by block: nothing stays mapped, so memory does not grow with what was read."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from trtbuild.errors import ArtifactError
from trtbuild.safetensors_header import TensorInfo

TORCH_TYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
STORED_TYPES: Mapping[torch.dtype, str] = {kind: name for name, kind in TORCH_TYPES.items()}
_CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ROUNDED = (torch.float16, torch.float32, torch.float64)
_BLOCK_BYTES = 4 << 20


class TensorBlocks:
    """The tensors of one directory, read through one buffer of a few MiB for each thread that reads.

    A file that disappears or changes while the work goes on is an error, and never half of one model and half of
    another.

    Args:
        directory: Where the files lie.
        infos: All tensors that will be asked for.
        finite: Refuse NaN and infinity.
        pinned: Buffers that a GPU can copy from directly.
    """

    def __init__(
        self, directory: Path, infos: Mapping[str, TensorInfo], *, finite: bool = True, pinned: bool = False
    ) -> None:
        self.directory, self._finite, self._pinned = directory, finite, pinned
        self._identities = {shard: _identity(directory / shard) for shard in {info.shard for info in infos.values()}}
        self._own = threading.local()

    def blocks(self, info: TensorInfo, first: int = 0, count: int | None = None) -> Iterator[torch.Tensor]:
        """Yield the elements of a tensor from `first` on, flat, in its own type; a block is gone when the next comes.

        Raises:
            ArtifactError: The file has disappeared, has changed, or holds NaN or infinity here.
        """
        for _, block in self._walk(info, first, info.elements - first if count is None else count, None):
            yield block

    def rounded(self, info: TensorInfo) -> Iterator[torch.Tensor]:
        """The same for a whole tensor as a checkpoint keeps it: wide floating-point values as bf16."""
        for block in self.blocks(info):
            yield block.to(rounded_type(info))

    def read(self, info: TensorInfo, target: torch.Tensor, first: int = 0) -> None:
        """Fill `target` (contiguous, of any type and device) with the elements of a tensor from `first` on."""
        flat = target.view(-1)
        straight = flat.device.type == "cpu" and flat.dtype == TORCH_TYPES[info.dtype]
        for begin, block in self._walk(info, first, flat.numel(), flat if straight else None):
            if not straight:
                flat[begin : begin + block.numel()].copy_(block)

    def value(self, info: TensorInfo) -> torch.Tensor:
        """A whole tensor in its own type."""
        tensor = torch.empty(info.shape, dtype=TORCH_TYPES[info.dtype])
        self.read(info, tensor)
        return tensor

    def unchanged(self) -> bool:
        """Whether all files are still those that were there at the start."""
        return all(_identity(self.directory / shard) == known for shard, known in self._identities.items())

    def _walk(
        self, info: TensorInfo, first: int, count: int, target: torch.Tensor | None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (position after `first`, block); blocks are parts of `target` where it is given."""
        kind = TORCH_TYPES[info.dtype]
        step = _BLOCK_BYTES // kind.itemsize
        descriptor = self._open(info.shard)
        try:
            for begin in range(0, count, step):
                number = min(step, count - begin)
                block = self._buffer(number, kind) if target is None else target[begin : begin + number]
                self._fill(descriptor, block, info, info.begin + (first + begin) * kind.itemsize)
                if self._finite and kind in _CHECKED and not is_finite(block):
                    raise ArtifactError(
                        f"{self.directory}: {info.name} holds NaN or infinite values", "use an undamaged checkpoint"
                    )
                yield begin, block
        finally:
            os.close(descriptor)

    def _buffer(self, number: int, kind: torch.dtype) -> torch.Tensor:
        buffer = getattr(self._own, "buffer", None)
        if buffer is None:
            buffer = self._own.buffer = torch.empty(_BLOCK_BYTES, dtype=torch.uint8, pin_memory=self._pinned)
        part: torch.Tensor = buffer[: number * kind.itemsize]
        return part.view(kind)

    def _open(self, shard: str) -> int:
        path = self.directory / shard
        if _identity(path) != self._identities[shard]:
            raise ArtifactError(f"{path} has changed or disappeared while it was read", "put the same file back")
        return os.open(path, os.O_RDONLY)

    def _fill(self, descriptor: int, block: torch.Tensor, info: TensorInfo, offset: int) -> None:
        view = memoryview(block.view(torch.uint8).numpy())
        while view:
            count = os.preadv(descriptor, [view], offset)
            if not count:
                raise ArtifactError(f"{self.directory / info.shard} ended inside {info.name}", "put the same file back")
            view, offset = view[count:], offset + count


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; a tenth of the time of asking every element."""
    if tensor.numel() == 0:
        return True
    least, most = torch.aminmax(tensor)  # NaN wins in both
    return math.isfinite(least) and math.isfinite(most)


def rounded_type(info: TensorInfo) -> torch.dtype:
    """The type in which a tensor of the source is kept when it is not quantized."""
    kind = TORCH_TYPES[info.dtype]
    return torch.bfloat16 if kind in _ROUNDED else kind


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino
