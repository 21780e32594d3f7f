"""Number formats as bytes: bf16, fp16, fp32 and E4M3, in numpy.

numpy has no bfloat16 and no 8-bit float: a bf16 is the upper half of a float32, an E4M3 is looked up.
E4M3: one sign bit, four exponent bits (bias 7), three mantissa bits, no infinities, 0x7F and 0xFF are NaN
(OCP 8-bit Floating Point Specification 1.0, section 5.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
Transform = Callable[[Array], Array]

NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F8_E4M3": np.dtype("u1"),
    "U8": np.dtype("u1"), "I8": np.dtype("i1"),
}  # fmt: skip
PLAIN = ("BF16", "F16", "F32")
FILE_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_NAN = 0x7F


def to_float(stored: Array, dtype: str) -> Floats:
    """The values of `stored`, whose elements are of safetensors type `dtype`."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E4M3":
        return _DECODED[stored]
    return stored.astype(np.float32)


def from_float(values: Floats, dtype: str) -> Array:
    """`values` rounded to the nearest, ties to even, as elements of safetensors type `dtype`.

    Raises:
        OverflowError: a finite value is too large for float16.
    """
    if dtype == "BF16":
        bits = values.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            narrow = values.astype(np.float16)
        if bool(np.any(np.isinf(narrow) & np.isfinite(values))):
            raise OverflowError("a value beyond 65504")
        return narrow
    return values


def caster(source: str, target: str, *, plus: float = 0.0) -> Transform | None:
    """What turns elements of type `source` into `target` after adding `plus`; None where bytes stay as they are."""
    if source == target and not plus:
        return None

    def cast(stored: Array) -> Array:
        values = to_float(stored, source)
        return from_float(values + np.float32(plus) if plus else values, target)

    return cast


def rescaler(scale: float, target: float) -> Transform | None:
    """What turns E4M3 codes that mean `code * scale` into those that mean `code * target`; None where both are equal.

    In float32, product first, then the quotient, then the nearest code: exactly what TensorRT-LLM does when it fuses
    projections (NVIDIA/TensorRT-LLM, tensorrt_llm/quantization/layers.py, FP8Linear.postprocess).
    """
    if scale == target:
        return None
    table = encode_e4m3(_DECODED * np.float32(scale) / np.float32(target))
    return lambda codes: table[codes]


def encode_e4m3(values: Floats) -> Codes:
    """The nearest E4M3 codes, ties to the even mantissa, saturating at 448; NaN stays NaN."""
    magnitude = np.abs(values).astype(np.float64)
    below = np.searchsorted(_MIDDLES, magnitude, side="left")
    tie = magnitude == _MIDDLES[np.minimum(below, len(_MIDDLES) - 1)]
    code = below + (tie & (below % 2 == 1))
    code = np.where(np.isnan(values), _NAN, np.minimum(code, _NAN - 1))
    return (code | (np.signbit(values) << 7)).astype(np.uint8)


def _decode_table() -> Floats:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    magnitude[[_NAN, _NAN | 128]] = np.nan
    return np.where(code & 128, -magnitude, magnitude).astype(np.float32)


_DECODED = _decode_table()
_MAGNITUDES = _DECODED[:_NAN].astype(np.float64)
_MIDDLES = (_MAGNITUDES[:-1] + _MAGNITUDES[1:]) / 2
