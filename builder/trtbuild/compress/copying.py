"""Copy a checkpoint block by block, rounded to bf16: names and shards stay as they are, no model class is needed.

Finished files are noted in a journal, so that a killed copy goes on behind the last of them.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from trtbuild.compress.blocks import STORED_TYPES, TensorBlocks, rounded_type
from trtbuild.compress.journal import Journal
from trtbuild.compress.metadata import write_json, write_metadata
from trtbuild.compress.request import Meter, Request
from trtbuild.compress.shards import Written, header_bytes, place_file, raw_bytes
from trtbuild.model import INDEX
from trtbuild.safetensors_header import TensorInfo


def copy_checkpoint(
    request: Request,
    source: Mapping[str, TensorInfo],
    meter: Meter,
    replaced: Mapping[str, torch.Tensor] | None = None,
    *,
    work: Path | None = None,
    key: str = "",
) -> int:
    """Write the source's tensors and metadata to the output, floating-point tensors in bf16.

    Args:
        request: Where the source, the tokenizer and the output are.
        source: The source's tensors.
        meter: Told after every file.
        replaced: Tensors, by their name in the files, that take the place of the source's.
        work: Where unfinished files lie, on the file system of the output; None to write to the output at once.
        key: Of everything that decides the bytes.

    Returns:
        How many files an earlier run had finished.

    Raises:
        ArtifactError: A tensor holds NaN or infinity; a file disappeared or changed.
    """
    lost = (replaced or {}).keys() - source.keys()
    if lost:
        raise KeyError(f"no tensor {min(lost)} in {request.source}")
    blocks = TensorBlocks(request.source, source)
    shards: dict[str, list[TensorInfo]] = defaultdict(list)
    for info in source.values():
        shards[info.shard].append(info)
    journal = None if work is None else _open_journal(work, key)
    finished = {part["file"] for part in journal.parts} if journal is not None else set()
    for number, shard in enumerate(sorted(shards)):
        path = request.output / shard if work is None else work / _unfinished_name(shard)
        if shard not in finished:
            _copy_shard(path, shards[shard], blocks, replaced or {})
            if journal is not None:
                _sync(path)
                journal.finish({"file": shard})
        if work is not None:
            place_file(path, request.output / shard)
        meter.advance(1, f"copy: file {number + 1} of {len(shards)}")
    if (request.source / INDEX).exists():
        size = sum(_size(info) for info in source.values())
        weight_map = {name: source[name].shard for name in sorted(source)}
        write_json(request.output / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    write_metadata(request, None)
    return len(finished)


def _open_journal(work: Path, key: str) -> Journal:
    """The journal, empty unless all that it counts on is there."""
    work.mkdir(parents=True, exist_ok=True)
    journal = Journal(work, key)
    if not journal.parts or not all((work / _unfinished_name(part["file"])).is_file() for part in journal.parts):
        for path in work.iterdir():
            path.unlink()
        journal = Journal(work, key)
    return journal


def _unfinished_name(shard: str) -> str:
    return f"copy-{shard.replace('/', '_')}"


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _copy_shard(
    path: Path, infos: Iterable[TensorInfo], blocks: TensorBlocks, replaced: Mapping[str, torch.Tensor]
) -> None:
    order = sorted(infos, key=lambda info: (-rounded_type(info).itemsize, info.name))
    written, end = [], 0
    for info in order:
        begin, end = end, end + _size(info)
        written.append(Written(0, info.name, STORED_TYPES[rounded_type(info)], info.shape, begin, end))
    path.unlink(missing_ok=True)  # it may be a link to a file that was finished
    with path.open("wb") as file:
        file.write(header_bytes(written))
        for info in order:
            for block in _values(info, blocks, replaced.get(info.name)):
                file.write(raw_bytes(block))


def _values(info: TensorInfo, blocks: TensorBlocks, replacement: torch.Tensor | None) -> Iterator[torch.Tensor]:
    if replacement is None:
        return blocks.rounded(info)
    return iter([replacement.to(rounded_type(info)).reshape(-1)])


def _size(info: TensorInfo) -> int:
    return math.prod(info.shape) * rounded_type(info).itemsize
