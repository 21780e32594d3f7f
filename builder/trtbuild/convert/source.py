"""The tensors of a unified checkpoint: where each one lies, and small ones in memory.

Nothing is mapped and nothing large is kept: bytes are read where they lie, so that the resident memory does not grow
with the file (pages of a mapped file count as resident).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trtbuild.checkpoint_files import open_directory
from trtbuild.convert.values import NUMPY_TYPES, Array, Floats, to_float
from trtbuild.errors import ArtifactError
from trtbuild.model import ModelFacts, read_facts
from trtbuild.safetensors_header import DTYPE_BITS, LENGTH_BYTES


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of the checkpoint: file, first byte in it, safetensors type, shape."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """The first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def width(self) -> int:
        """Elements of one row."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) if self.shape else 1

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint: its facts, its config, its quantization section and its tensors by name."""

    directory: Path
    facts: ModelFacts
    config: Mapping[str, Any]
    quantization: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    def values(self, name: str) -> Floats:
        """The values of a small tensor in float32, flat."""
        stored = self.tensors[name]
        count = stored.rows * stored.width
        with stored.path.open("rb") as file:
            file.seek(stored.offset)
            raw = file.read(count * stored.item_bytes)
        return to_float(np.frombuffer(raw, NUMPY_TYPES[stored.dtype]), stored.dtype)

    def rectangle(self, name: str, rows: tuple[int, int], columns: tuple[int, int]) -> Array:
        """Rows and columns of a matrix as stored; the whole rows are read.

        Raises:
            ArtifactError: the file ends before they do.
        """
        stored = self.tensors[name]
        size = stored.width * stored.item_bytes
        with stored.path.open("rb") as file:
            file.seek(stored.offset + rows[0] * size)
            raw = file.read((rows[1] - rows[0]) * size)
        if len(raw) < (rows[1] - rows[0]) * size:
            raise ArtifactError(f"{stored.path}: {name} ended while it was read", "something changed the file")
        return np.frombuffer(raw, NUMPY_TYPES[stored.dtype]).reshape(-1, stored.width)[:, columns[0] : columns[1]]

    def scalar(self, name: str) -> float:
        """The value of a tensor with one element."""
        return float(self.values(name)[0])


def open_source(directory: Path) -> Source:
    """The checkpoint in `directory`.

    Raises:
        RecipeError: the directory is missing or empty.
        ArtifactError: a file is missing, truncated or contradicts itself.
        CompatibilityError: the weights are pickles.
    """
    facts = read_facts(open_directory(directory, at="convert.source"))
    config = json.loads((directory / "config.json").read_bytes())
    tensors: dict[str, Stored] = {}
    for shard in sorted(file.path for file in facts.files if file.path.endswith(".safetensors")):
        _add_shard(directory / shard, tensors)
    quantization = facts.quantization
    if quantization is None:
        section: dict[str, Any] = {}
    else:
        section = {"quant_method": quantization.method, **quantization.parameters}
    return Source(directory=directory, facts=facts, config=config, quantization=section, tensors=tensors)


def stored_in(path: Path) -> dict[str, Stored]:
    """The tensors of one file, whose header was checked."""
    tensors: dict[str, Stored] = {}
    _add_shard(path, tensors)
    return tensors


def _add_shard(path: Path, tensors: dict[str, Stored]) -> None:
    """Add one file's tensors; its header was checked by `read_facts`."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if name in tensors:
            raise ArtifactError(f"{path}: holds the tensor {name}, which {tensors[name].path.name} holds too")
        begin = LENGTH_BYTES + length + int(entry["data_offsets"][0])
        tensors[name] = Stored(path, begin, str(entry["dtype"]), tuple(entry["shape"]))


def file_bytes(source: Source) -> int:
    """Bytes of all weight files."""
    return sum(path.stat().st_size for path in {stored.path for stored in source.tensors.values()})
