"""Read and check safetensors headers without touching tensor data.

Format: 8 bytes little-endian header length N, N bytes of JSON (name -> dtype, shape, data_offsets), then the data.
Source: huggingface/safetensors, README.md "Format", 0.8.0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trtbuild.checkpoint_files import CheckpointFiles

LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference reader
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its header describes it; its data begin at byte `begin` of the shard."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    begin: int = 0

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of the data in bytes."""
        return self.elements * DTYPE_BITS[self.dtype] // 8


class HeaderError(ValueError):
    """A header that cannot be true; the message says why."""


def read_header(files: CheckpointFiles, shard: str) -> tuple[bytes, list[TensorInfo]]:
    """The raw header bytes and the tensors of one shard.

    Raises:
        HeaderError: the file is too short, the header is no JSON, or offsets, shapes and sizes contradict each other.
    """
    size = files.names_and_sizes()[shard]
    if size < LENGTH_BYTES:
        raise HeaderError(f"{shard} is {size} bytes long: no room for a safetensors header")
    length = int.from_bytes(files.read(shard, 0, LENGTH_BYTES), "little")
    if length > _MAX_HEADER_BYTES or LENGTH_BYTES + length > size:
        raise HeaderError(
            f"{shard} says its header has {length} bytes, the file has {size}: truncated, or no safetensors file"
        )
    raw = files.read(shard, LENGTH_BYTES, length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise HeaderError(f"{shard}: the header is not JSON") from None
    if not isinstance(header, dict):
        raise HeaderError(f"{shard}: the header is not a mapping")
    header.pop("__metadata__", None)
    tensors = _check(shard, header, LENGTH_BYTES + length, size)
    return raw, tensors


def _check(shard: str, header: Mapping[str, Any], data_begin: int, size: int) -> list[TensorInfo]:
    """Every tensor's description, if together they cover the data exactly once."""
    data_bytes = size - data_begin
    spans: list[tuple[int, int]] = []
    tensors: list[TensorInfo] = []
    for name, entry in header.items():
        info, span = _entry(shard, name, entry, data_begin)
        if span[1] - span[0] != info.bytes:
            raise HeaderError(
                f"{shard}: {name} has shape {list(info.shape)} of {info.dtype}, {info.bytes} bytes, "
                f"but spans {span[1] - span[0]}"
            )
        tensors.append(info)
        spans.append(span)
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            raise HeaderError(f"{shard}: the tensors leave a gap or overlap at byte {min(begin, end)} of the data")
        end = stop
    if end > data_bytes:
        raise HeaderError(f"{shard} is truncated: its tensors need {end} bytes, it holds {data_bytes}")
    if end < data_bytes:
        raise HeaderError(f"{shard} holds {data_bytes - end} bytes more than its header describes")
    return tensors


def _entry(shard: str, name: str, entry: Any, data_begin: int) -> tuple[TensorInfo, tuple[int, int]]:
    try:
        dtype, shape, (begin, stop) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        whole = all(isinstance(number, int) and number >= 0 for number in (*shape, begin, stop))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise HeaderError(f"{shard}: the header entry of {name} is malformed")
    if dtype not in DTYPE_BITS:
        raise HeaderError(f"{shard}: {name} has the unknown type {dtype}")
    return TensorInfo(name=name, dtype=dtype, shape=shape, shard=shard, begin=data_begin + begin), (begin, stop)
