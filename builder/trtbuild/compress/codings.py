"""Codes and scales of formats that need nothing but the weights, as ModelOpt computes them, for a few rows at a time.

The order of roundings is ModelOpt's with float32 weights (nvidia-modelopt 0.47.0: modelopt/torch/export/quant_utils.py
`to_quantized_weight`, `get_scaling_factor`, modelopt/torch/quantization/nn/modules/tensor_quantizer.py `export_amax`,
modelopt/torch/quantization/qtensor/mxfp8_tensor.py). The largest magnitude of 16-bit weights is exact in 16 bits, so
that only one block at a time is ever widened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_FP8_MOST = 448.0
_INT8_MOST = 127.0
_MX_GROUP = 32
_SQUARE = 128
# For each type: integers of its width, the mask that removes the sign, and infinity without it.
_BITS: Mapping[torch.dtype, tuple[torch.dtype, int, int]] = {
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
}
SOURCE_TYPES = frozenset(_BITS)


class NotFiniteError(Exception):
    """A block holds NaN or infinity."""


@dataclass(frozen=True, slots=True)
class Coding:
    """One format.

    Args:
        algorithm: ModelOpt's name of it for a layer, and the group size that goes with it.
        rows: A block has a multiple of so many.
        kind: Type of the codes.
        scale_kind: Type of the scales.
        scale_shape: Of the scales of a matrix [out, in].
        code: Takes a block [rows, in] and a float32 one to compute in; fills the codes [rows, in] and returns the
            scales of these rows, flat.
    """

    algorithm: tuple[str, int]
    rows: int
    kind: torch.dtype
    scale_kind: torch.dtype
    scale_shape: Callable[[int, int], tuple[int, ...]]
    code: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _largest(block: torch.Tensor, *sides: int) -> torch.Tensor:
    """The largest magnitudes, in float32, along the last of `sides` into which the block is folded."""
    whole, mask, infinity = _BITS[block.dtype]
    found = (block.view(whole) & mask).view(sides).amax(dim=-1)
    if found.numel() and int(found.max()) >= infinity:
        raise NotFiniteError
    return found.view(block.dtype).float()


def _scale(largest: torch.Tensor, most: float) -> torch.Tensor:
    """What ModelOpt makes of a range: one that is zero counts as `most`."""
    return torch.where(largest == 0, most, largest).clamp_(min=torch.finfo(torch.float32).tiny) / most


def _fp8_rows(block: torch.Tensor, wide: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    scale = _scale(_largest(block, *block.shape), _FP8_MOST)
    codes.copy_(wide.copy_(block).div_(scale[:, None]))
    return scale


def _int8_rows(block: torch.Tensor, wide: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    scale = _scale(_largest(block, *block.shape), _INT8_MOST)
    codes.copy_(wide.copy_(block).div_(scale[:, None]).round_().clamp_(-128, 127))
    return scale


def _fp8_squares(block: torch.Tensor, wide: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    rows, columns = block.shape
    high, broad = rows // _SQUARE, columns // _SQUARE
    largest = _largest(block, rows, broad, _SQUARE).view(high, _SQUARE, broad).amax(dim=1)
    scale = _scale(largest, _FP8_MOST)
    sides = (high, _SQUARE, broad, _SQUARE)
    codes.copy_(wide.copy_(block).view(sides).div_(scale[:, None, :, None]).view(rows, columns))
    return scale.view(-1)


def _mxfp8(block: torch.Tensor, wide: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    rows, columns = block.shape
    sides = (rows, columns // _MX_GROUP, _MX_GROUP)
    least = _largest(block, *sides) / _FP8_MOST
    power = torch.where(least > 0, torch.log2(least), -127.0).ceil_().clamp_(-127, 127)
    scaled = wide.copy_(block).view(sides).mul_(torch.exp2(-power)[:, :, None]).clamp_(-_FP8_MOST, _FP8_MOST)
    codes.copy_(scaled.view(rows, columns))
    return (power + 127).to(torch.uint8).view(-1)


def _of_rows(out: int, into: int) -> tuple[int, ...]:  # noqa: ARG001  the signature of all
    return (out,)


def _of_squares(out: int, into: int) -> tuple[int, ...]:
    sides = (out // _SQUARE, 1, into // _SQUARE, 1)
    return sides if sides != (1, 1, 1, 1) else ()  # ModelOpt drops the sides of a single one


def _of_groups(out: int, into: int) -> tuple[int, ...]:
    return (out, into // _MX_GROUP)


_FP8 = torch.float8_e4m3fn
CODINGS: Mapping[str, Coding] = {
    "fp8_per_channel_per_token": Coding(("fp8_pc_pt", 0), 1, _FP8, torch.float32, _of_rows, _fp8_rows),
    "fp8_block": Coding(("fp8_pb_wo", _SQUARE), _SQUARE, _FP8, torch.float32, _of_squares, _fp8_squares),
    "int8_weight_only": Coding(("int8_wo", 0), 1, torch.int8, torch.float32, _of_rows, _int8_rows),
    "mxfp8": Coding(("mxfp8", _MX_GROUP), 1, _FP8, torch.uint8, _of_groups, _mxfp8),
}
# What `process_layer_quant_config` and `convert_hf_quant_config_format` of ModelOpt write where all layers are alike.
SECTIONS: Mapping[str, Mapping[str, object]] = {
    "fp8_per_channel_per_token": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
    "fp8_block": {"quant_algo": "fp8_pb_wo"},
    "int8_weight_only": {"quant_algo": "W8A16"},
    "mxfp8": {"quant_algo": "MXFP8", "group_size": _MX_GROUP},
}
