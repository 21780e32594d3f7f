"""Write safetensors files tensor by tensor, in one pass, so that a killed run goes on where it stopped.

The header stands before the data and is known only when a file is full. Its room is reserved, and what is left of it is
filled with spaces, which the format allows (huggingface/safetensors, README.md "Format", 0.8.0).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from trtbuild.compress.blocks import STORED_TYPES
from trtbuild.compress.metadata import write_json
from trtbuild.model import INDEX, WHOLE
from trtbuild.safetensors_header import LENGTH_BYTES

SHARD_BYTES = 5_000_000_000
_ALIGNMENT = 64
_ENTRY_BYTES = 140  # of a header's entry beside the name: type, up to four sides, two offsets, punctuation
_PREAMBLE_BYTES = 64
_COPIED_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Written:
    """One tensor: the number of its file, and where its data lie after the header."""

    shard: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def to_json(self) -> list[Any]:
        """As a list for the journal."""
        return [self.shard, self.name, self.dtype, list(self.shape), self.begin, self.end]

    @classmethod
    def of_json(cls, raw: Sequence[Any]) -> Written:
        """From the journal's list."""
        return cls(raw[0], raw[1], raw[2], tuple(raw[3]), raw[4], raw[5])


def reserved_bytes(names: Iterable[str]) -> int:
    """Room for a header with tensors of these names, so that the data begin at a multiple of 64 bytes."""
    room = _PREAMBLE_BYTES + sum(len(name.encode()) + _ENTRY_BYTES for name in names)
    return math.ceil((LENGTH_BYTES + room) / _ALIGNMENT) * _ALIGNMENT - LENGTH_BYTES


@dataclass(frozen=True, slots=True)
class Slot:
    """Room for a tensor in a file, that threads fill piece by piece."""

    path: Path
    offset: int

    def write(self, piece: torch.Tensor, first: int) -> None:
        """Write a flat piece whose first element is number `first` of the tensor."""
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            _write(descriptor, piece, self.offset + first * piece.element_size())
        finally:
            os.close(descriptor)


@dataclass(slots=True)
class ShardWriter:
    """Appends tensors to numbered files of a directory; a file is complete after `seal`.

    Args:
        directory: Where the files lie.
        room: What `reserved_bytes` says for all tensors that a file may hold.
        limit: The most bytes of data in a file; a larger tensor has a file of its own.
        written: What earlier runs have written; anything after it in the files is cut off.
    """

    directory: Path
    room: int
    limit: int = SHARD_BYTES
    written: list[Written] = field(default_factory=list)
    _file: int | None = None
    _shard: int = -1

    def __enter__(self) -> ShardWriter:
        for path in self.directory.glob("shard-*"):
            if int(path.name.partition("-")[2]) > self._last()[0]:
                path.unlink()
            else:
                path.chmod(0o644)  # a run that was killed while it was published has made it read-only
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def append(self, name: str, kind: torch.dtype, shape: Sequence[int], blocks: Iterable[torch.Tensor]) -> None:
        """Write one tensor, whose elements come in `blocks` of type `kind`."""
        size = math.prod(shape) * kind.itemsize
        shard, begin = self._place(size, kind.itemsize)
        offset = LENGTH_BYTES + self.room + begin
        descriptor = self._open(shard, begin)
        for block in blocks:
            offset += _write(descriptor, block, offset)
        end = offset - LENGTH_BYTES - self.room
        if end - begin != size:
            raise ValueError(f"{name}: {end - begin} bytes were written, {size} announced")
        self.written.append(Written(shard, name, STORED_TYPES[kind], tuple(shape), begin, end))

    def reserve(self, name: str, kind: torch.dtype, shape: Sequence[int]) -> Slot:
        """Make room for one tensor that others will write; it must be whole before the next `sync`."""
        size = math.prod(shape) * kind.itemsize
        shard, begin = self._place(size, kind.itemsize)
        self._open(shard, begin)
        self.written.append(Written(shard, name, STORED_TYPES[kind], tuple(shape), begin, begin + size))
        return Slot(self._path(shard), LENGTH_BYTES + self.room + begin)

    def append_all(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write whole tensors, the widest types first: every one then begins at a multiple of its type's size."""
        for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
            tensor = tensors[name].detach().contiguous()
            self.append(name, tensor.dtype, tensor.shape, on_host(tensor.reshape(-1)))

    def sync(self, shards: Iterable[int]) -> None:
        """Bring what was written to these files to the disk; another thread may go on writing to them."""
        for shard in sorted(set(shards)):
            descriptor = os.open(self._path(shard), os.O_RDONLY)
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)

    def seal(self) -> list[tuple[Path, int]]:
        """Write the headers; return the files in order, each with its number of data bytes."""
        self._close()
        files = []
        for shard in range(self._last()[0] + 1):
            entries = [item for item in self.written if item.shard == shard]
            path = self._path(shard)
            with path.open("r+b") as file:
                file.write(header_bytes(entries, self.room))
                os.fsync(file.fileno())
            files.append((path, entries[-1].end))
        return files

    def _place(self, size: int, item_bytes: int) -> tuple[int, int]:
        """The file and the position of the next tensor: a new file where this one is full or out of step."""
        shard, end = self._last()
        if shard < 0 or end + size > self.limit or end % item_bytes:
            return shard + 1, 0
        return shard, end

    def _last(self) -> tuple[int, int]:
        return (self.written[-1].shard, self.written[-1].end) if self.written else (-1, 0)

    def _path(self, shard: int) -> Path:
        return self.directory / f"shard-{shard:05d}"

    def _open(self, shard: int, begin: int) -> int:
        if self._file is None or self._shard != shard:
            self._close()
            self._file = os.open(self._path(shard), os.O_WRONLY | os.O_CREAT, 0o644)
            self._shard = shard
            os.ftruncate(self._file, LENGTH_BYTES + self.room + begin)
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def place_files(output: Path, files: Sequence[tuple[Path, int]], written: Sequence[Written]) -> None:
    """Give finished files their names in `output`, and more than one an index.

    They are linked, so that a run that is killed here can do it again.

    Args:
        output: On the same file system.
        files: What `ShardWriter.seal` returned.
        written: Every tensor in them.
    """
    total = len(files)
    numbered = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    names = numbered if total > 1 else [WHOLE]
    for (path, _), name in zip(files, names, strict=True):
        place_file(path, output / name)
    if total > 1:
        weight_map = {item.name: names[item.shard] for item in written}
        size = sum(size for _, size in files)
        write_json(output / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})


def place_file(path: Path, target: Path) -> None:
    """Give a finished file a second name in place of what is there; the only one where links are unknown."""
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(path)
    except OSError:  # a file system without links
        path.replace(target)


def on_host(flat: torch.Tensor) -> Iterator[torch.Tensor]:
    """The elements of a flat tensor in the host's memory; those of a GPU block by block, through one buffer."""
    if not flat.is_cuda:
        yield flat
        return
    step = _COPIED_BYTES // flat.element_size()
    buffer = torch.empty(min(step, flat.numel()), dtype=flat.dtype, pin_memory=True)
    for begin in range(0, flat.numel(), step):
        part = flat[begin : begin + step]
        yield buffer[: part.numel()].copy_(part)


def raw_bytes(block: torch.Tensor) -> memoryview:
    """The bytes of a flat, contiguous tensor."""
    return memoryview(block.cpu().view(torch.uint8).numpy())


def header_bytes(entries: Sequence[Written], room: int | None = None) -> bytes:
    """The beginning of a file with these tensors: the header's length and the header, filled up to `room` bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for item in entries:
        header[item.name] = {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": [item.begin, item.end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if room is None:
        room = math.ceil(len(text) / LENGTH_BYTES) * LENGTH_BYTES
    if len(text) > room:
        raise ValueError(f"a header has {len(text)} bytes, {room} are reserved")
    return room.to_bytes(LENGTH_BYTES, "little") + text.ljust(room)


def _write(descriptor: int, block: torch.Tensor, offset: int) -> int:
    """Write the bytes of a flat block at `offset`; return their number."""
    view = raw_bytes(block)
    size = len(view)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
    return size
