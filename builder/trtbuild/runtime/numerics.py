"""The formats of weights and inputs: one row each, all that the engine knows of them.

Formats are those of ModelOpt's unified Hugging Face checkpoint
(NVIDIA/Model-Optimizer: modelopt/torch/export/quant_utils.py, modelopt/torch/quantization/qtensor/ @0.47.0).
Shapes: T tokens (any leading dimensions), I inputs, O outputs, G = I / group size.

A layer is y = (input(x) @ matrix^T) * outer * factor + bias. What multiplies the sums stays out of the products, so
that these are exact also in bfloat16: all codes, and E2M1 values times E4M3 scales or powers of two, fit its 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from trtbuild.runtime.codes import (
    E2M1_MAX,
    E4M3_MAX,
    MX_BLOCK,
    NVFP4_BLOCK,
    expand_int4,
    power_of_two,
    round_mx,
    round_nvfp4,
    scale_groups,
    to_e4m3,
    to_int8,
    unpack_e2m1,
    wide,
)

Tensors = Mapping[str, torch.Tensor]
# How a scale lies beside its weight: one number, one for each output, group of inputs, or tile of 128 x 128.
ONE, ROWS, GROUPS, TILES = "one", "rows", "groups", "tiles"
TILE = 128


@dataclass(frozen=True, slots=True)
class Numerics:
    """One format.

    Args:
        weight: The type of the codes in files, in safetensors' words.
        rows: Outputs in one stored row.
        columns: Inputs in one stored element.
        scales: How each scale of the weights lies.
        matrix: The matrix [O, I] that inputs are multiplied by.
        outer: The scale of the weights that multiplies the sums: one number, or one for each output.
        input: What becomes of an input [T, I] under ``input_scale`` (1 where files have none): the numbers that are
            multiplied, and what multiplies the sums for it: None, one number, or one for each token.
        input_scale: Whether files have an ``input_scale``.
        smoothed: Whether inputs may be multiplied by ``pre_quant_scale`` first.
    """

    weight: str
    scales: Mapping[str, str]
    matrix: Callable[[Tensors, torch.dtype], torch.Tensor]
    outer: Callable[[Tensors], torch.Tensor] | None = None
    input: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]] | None = None
    input_scale: bool = False
    rows: int = 1
    columns: int = 1
    smoothed: bool = False


def _codes(stored: Tensors, dtype: torch.dtype) -> torch.Tensor:
    return stored["weight"].to(dtype)


def _tiles(stored: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """E4M3 codes, each tile of 128 x 128 times its scale [O/128, 1, I/128, 1] (one number where there is one tile)."""
    codes = wide(stored["weight"].to(dtype))
    down, along = (side // TILE for side in codes.shape)
    tiled = codes.view(down, TILE, along, TILE) * stored["weight_scale"].reshape(down, 1, along, 1)
    return tiled.view(codes.shape).to(dtype)


def _int4(stored: Tensors, dtype: torch.dtype) -> torch.Tensor:
    return expand_int4(stored["weight"], stored["weight_scale"], dtype)


def _int4_in_e4m3(stored: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """INT4 weights as tensor cores of FP8 take them: rounded to E4M3 once more, less the second scale."""
    weights = expand_int4(stored["weight"], stored["weight_scale"], torch.promote_types(dtype, torch.float32))
    return to_e4m3(weights, stored["weight_scale_2"]).to(dtype)


def _nvfp4(stored: Tensors, dtype: torch.dtype) -> torch.Tensor:
    return scale_groups(unpack_e2m1(stored["weight"], dtype), stored["weight_scale"].to(dtype))


def _mxfp4(stored: Tensors, dtype: torch.dtype) -> torch.Tensor:
    return scale_groups(unpack_e2m1(stored["weight"], dtype), power_of_two(stored["weight_scale"], dtype))


def _mxfp8(stored: Tensors, dtype: torch.dtype) -> torch.Tensor:
    return scale_groups(stored["weight"].to(dtype), power_of_two(stored["weight_scale"], dtype))


def _first(stored: Tensors) -> torch.Tensor:
    return stored["weight_scale"]


def _second(stored: Tensors) -> torch.Tensor:
    return stored["weight_scale_2"]


_Input = tuple[torch.Tensor, torch.Tensor | None]


def _to_e4m3(x: torch.Tensor, scale: torch.Tensor) -> _Input:
    return to_e4m3(x, scale), scale


def _tokens_to_e4m3(x: torch.Tensor, _: torch.Tensor) -> _Input:
    """Each token by its own largest magnitude."""
    scale = wide(x).abs().amax(dim=-1, keepdim=True) / E4M3_MAX
    scale = scale.where(scale > 0, 1.0)
    return to_e4m3(x, scale), scale


def _to_int8(x: torch.Tensor, scale: torch.Tensor) -> _Input:
    return to_int8(x, scale), scale


def _to_nvfp4(x: torch.Tensor, scale: torch.Tensor) -> _Input:
    return round_nvfp4(x, scale), scale


def _to_mxfp8(x: torch.Tensor, _: torch.Tensor) -> _Input:
    return round_mx(x, E4M3_MAX), None


def _to_mxfp4(x: torch.Tensor, _: torch.Tensor) -> _Input:
    return round_mx(x, E2M1_MAX), None


_ROW_SCALES = {"weight_scale": ROWS}
_GROUP_SCALES = {"weight_scale": GROUPS}
_TWO_SCALES = _GROUP_SCALES | {"weight_scale_2": ONE}
_NVFP4 = Numerics("U8", _TWO_SCALES, _nvfp4, _second, _to_nvfp4, input_scale=True, columns=2, smoothed=True)

# By `quant_algo` in upper case.
NUMERICS: Mapping[str, Numerics] = {
    "FP8": Numerics("F8_E4M3", {"weight_scale": ONE}, _codes, _first, _to_e4m3, input_scale=True),
    "FP8_PER_CHANNEL_PER_TOKEN": Numerics("F8_E4M3", _ROW_SCALES, _codes, _first, _tokens_to_e4m3),
    "FP8_PB_WO": Numerics("F8_E4M3", {"weight_scale": TILES}, _tiles),
    "W8A8_SQ_PER_CHANNEL": Numerics("I8", _ROW_SCALES, _codes, _first, _to_int8, input_scale=True, smoothed=True),
    "W8A16": Numerics("I8", _ROW_SCALES, _codes, _first),
    "W4A16_AWQ": Numerics("U8", _GROUP_SCALES, _int4, rows=2, smoothed=True),
    "W4A8_AWQ": Numerics(
        "U8", _TWO_SCALES, _int4_in_e4m3, _second, _to_e4m3,
        input_scale=True, rows=2, smoothed=True,
    ),
    "NVFP4": _NVFP4,
    "NVFP4_AWQ": _NVFP4,
    "W4A16_NVFP4": Numerics("U8", _TWO_SCALES, _nvfp4, _second, columns=2),
    "MXFP4": Numerics("U8", _GROUP_SCALES, _mxfp4, None, _to_mxfp4, columns=2),
    "MXFP8": Numerics("F8_E4M3", _GROUP_SCALES, _mxfp8, None, _to_mxfp8),
}  # fmt: skip
# Groups whose size the format fixes; that of INT4 shows in the shape of its scales.
GROUP_SIZES: Mapping[str, int] = {
    "NVFP4": NVFP4_BLOCK,
    "NVFP4_AWQ": NVFP4_BLOCK,
    "W4A16_NVFP4": NVFP4_BLOCK,
    "MXFP4": MX_BLOCK,
    "MXFP8": MX_BLOCK,
}
