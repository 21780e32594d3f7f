"""Carry out a plan: read every stored tensor once, block by block, and write its pieces where they belong.

Offsets in all files are known beforehand, so that blocks are written in any order and by several threads; the memory
is one block for each thread, however large the model is. Blocks that are computed (the interleaved scales of NVFP4
experts) read their rows once more.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trtbuild.convert.plan import Block, Piece, RankPlan
from trtbuild.convert.source import Stored
from trtbuild.convert.values import NUMPY_TYPES, Array
from trtbuild.errors import ArtifactError, CompatibilityError, HostError
from trtbuild.safetensors_header import DTYPE_BITS
from trtbuild.worker import Progress

# A block stays in the processor's cache between reading and writing: 2 MiB and more took three times as long.
_BLOCK_BYTES = 256 << 10
_THREADS = 2
_PART = ".part"
_local = threading.local()


@dataclass(frozen=True, slots=True)
class _Target:
    """A piece, the file it goes to, the first byte of its tensor there, and the output's bytes per element."""

    piece: Piece
    descriptor: int
    begin: int
    item_bytes: int


def write_ranks(
    plans: Sequence[RankPlan], tensors: Mapping[str, Stored], output: Path, progress: Progress
) -> dict[str, int]:
    """Write one file for each plan into `output` and return their sizes; on any error none of them remains.

    Raises:
        HostError: the disk is full.
        ArtifactError: a stored tensor ends before it should.
        CompatibilityError: a value does not fit into float16.
    """
    layouts = [plan.layout() for plan in plans]
    _refuse_full_disk(output, sum(size for _, _, size in layouts))
    parts = [output / (plan.name + _PART) for plan in plans]
    with _cleaned_up(parts, output), _opened(parts) as descriptors:
        targets: dict[str, list[_Target]] = defaultdict(list)
        computed: list[tuple[Block, int, int]] = []
        for plan, (header, begins, size), descriptor in zip(plans, layouts, descriptors, strict=True):
            os.ftruncate(descriptor, size)
            _write(descriptor, header, 0)
            for made in plan.outputs:
                if made.constant is not None:
                    _write(descriptor, made.constant, begins[made.name])
                item_bytes = DTYPE_BITS[made.dtype] // 8
                for piece in made.pieces:
                    targets[piece.source].append(_Target(piece, descriptor, begins[made.name], item_bytes))
                computed += [(block, descriptor, begins[made.name] + block.at * item_bytes) for block in made.blocks]
        _copy_all(targets, computed, tensors, progress)
    for plan, part in zip(plans, parts, strict=True):
        part.rename(output / plan.name)
    return {plan.name: size for plan, (_, _, size) in zip(plans, layouts, strict=True)}


def _copy_all(
    targets: Mapping[str, list[_Target]],
    computed: Sequence[tuple[Block, int, int]],
    tensors: Mapping[str, Stored],
    progress: Progress,
) -> None:
    """Copy in the order of the files, so that the disk is read forwards; then what is computed."""
    order = sorted(targets, key=lambda name: (tensors[name].path, tensors[name].offset))
    with ThreadPoolExecutor(_THREADS) as pool:
        running = [pool.submit(_copy, name, tensors[name], targets[name]) for name in order]
        running += [pool.submit(_compute, *item) for item in computed]
        try:
            for done, future in enumerate(running, start=1):
                future.result()
                progress(done, len(running), "convert the weights")
        except BaseException:
            for future in running:
                future.cancel()
            raise


def _copy(name: str, stored: Stored, targets: Sequence[_Target]) -> None:
    row_bytes = stored.width * stored.item_bytes
    step = max(_BLOCK_BYTES // max(row_bytes, 1), 1)
    buffer = _own_buffer(min(step, stored.rows) * row_bytes)
    kind = NUMPY_TYPES[stored.dtype]
    with stored.path.open("rb") as file:
        for first in range(0, stored.rows, step):
            last = min(first + step, stored.rows)
            view = memoryview(buffer)[: (last - first) * row_bytes]
            _read(file.fileno(), view, stored.offset + first * row_bytes, f"{stored.path}: {name}")
            block = np.frombuffer(view, kind).reshape(last - first, stored.width)
            for target in targets:
                _put(name, target, block, first, last)


def _compute(block: Block, descriptor: int, begin: int) -> None:
    _write(descriptor, np.ascontiguousarray(block.make()).reshape(-1).view(np.uint8).data, begin)


def _own_buffer(size: int) -> bytearray:
    """This thread's buffer of at least `size` bytes: a new one for every tensor would be zeroed and paged in anew."""
    buffer: bytearray = getattr(_local, "buffer", bytearray())
    if len(buffer) < size:
        buffer = _local.buffer = bytearray(size)
    return buffer


def _put(name: str, target: _Target, block: Array, first: int, last: int) -> None:
    """Write the rows `first` to `last` of a stored tensor, as far as the target's piece has them."""
    piece = target.piece
    begin, end = max(first, piece.rows[0]), min(last, piece.rows[1])
    if begin >= end:
        return
    part = block[begin - first : end - first, piece.columns[0] : piece.columns[1]]
    if piece.transform is not None:
        try:
            part = piece.transform(part)
        except OverflowError as error:
            raise CompatibilityError(f"{name} holds {error}, which float16 cannot", "convert to bfloat16") from None
    index = piece.at + (begin - piece.rows[0]) * (piece.columns[1] - piece.columns[0])
    data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
    _write(target.descriptor, data.data, target.begin + index * target.item_bytes)


def _read(descriptor: int, view: memoryview, offset: int, what: str) -> None:
    while view:
        count = os.preadv(descriptor, [view], offset)
        if not count:
            raise ArtifactError(f"{what} ended while it was read", "something changed the file; download it again")
        view, offset = view[count:], offset + count


def _write(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


@contextmanager
def _opened(paths: Sequence[Path]) -> Iterator[list[int]]:
    descriptors: list[int] = []
    try:
        # One by one: what is open already is closed when the next fails.
        descriptors.extend(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) for path in paths)
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@contextmanager
def _cleaned_up(parts: Sequence[Path], output: Path) -> Iterator[None]:
    """Remove the unfinished files when anything goes wrong, and say so when the disk is full."""
    try:
        yield
    except BaseException as error:
        for part in parts:
            part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise HostError(f"{output}: the disk is full", "free space there or move the store") from error
        raise


def _refuse_full_disk(output: Path, needed: int) -> None:
    state = os.statvfs(output)
    free = state.f_bavail * state.f_frsize
    if free < needed:
        raise HostError(
            f"{output}: the TensorRT-LLM checkpoint needs {needed:,} bytes, {free:,} are free",
            "free space there or move the store",
        )
