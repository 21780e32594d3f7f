"""The output as a plan: every tensor of every rank, and which bytes of which stored tensor fill it.

An output tensor is made of pieces. A piece is a rectangle of one stored tensor whose elements lie one after another in
the output, row by row, unchanged or passed through an elementwise function. What no piece covers is zero (padding).
Small tensors (scales, ones) are constants of the plan. Where elements change places, a block of the output is computed
as a whole when its turn comes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from trtbuild.convert.values import NUMPY_TYPES, Array, Transform, from_float
from trtbuild.safetensors_header import DTYPE_BITS, LENGTH_BYTES

_ALIGNMENT = 8
Span = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A rectangle of a stored tensor, taken as [rows, rest]; `at` is its first element's index in the output."""

    source: str
    rows: Span
    columns: Span
    at: int
    transform: Transform | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Elements of the output, from index `at` on, that `make` reads and computes."""

    at: int
    make: Callable[[], Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One tensor of one rank: `dtype` in safetensors spelling; pieces, blocks, or the bytes themselves."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Sequence[Piece] = ()
    blocks: Sequence[Block] = ()
    constant: bytes | None = None

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(slots=True)
class RankPlan:
    """One file: its tensors, and after `layout` its header and where each tensor's data begins."""

    rank: int
    outputs: list[Output] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The file's name."""
        return f"rank{self.rank}.safetensors"

    def layout(self) -> tuple[bytes, dict[str, int], int]:
        """(header with its length, first byte of each tensor's data, size of the file).

        Wider types come first, so that every tensor is aligned to its element; the header is padded with spaces.
        Source: huggingface/safetensors, README.md "Format", 0.8.0.
        """
        ordered = sorted(self.outputs, key=lambda output: (-DTYPE_BITS[output.dtype], output.name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begins, end = {}, 0
        for output in ordered:
            begins[output.name] = end
            header[output.name] = {
                "dtype": output.dtype, "shape": list(output.shape), "data_offsets": [end, end + output.bytes]
            }  # fmt: skip
            end += output.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        start = LENGTH_BYTES + len(text)
        full = len(text).to_bytes(LENGTH_BYTES, "little") + text
        return full, {name: start + begin for name, begin in begins.items()}, start + end


def numbers(name: str, values: Sequence[float], shape: tuple[int, ...]) -> Output:
    """A float32 constant."""
    return Output(name=name, dtype="F32", shape=shape, constant=np.asarray(values, dtype="<f4").tobytes())


def ones(name: str, dtype: str, shape: tuple[int, ...]) -> Output:
    """Ones of type `dtype`."""
    data = from_float(np.ones(shape, dtype=np.float32), dtype)
    return Output(name=name, dtype=dtype, shape=shape, constant=data.astype(NUMPY_TYPES[dtype]).tobytes())
