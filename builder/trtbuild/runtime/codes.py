"""The small number formats: how numbers are rounded to their codes, and what stored codes stand for.

E4M3 is an 8-bit float (sign, 4 exponent bits, 3 mantissa bits, largest 448, no infinities), E2M1 a 4-bit one with the
magnitudes 0, 0.5, 1, 1.5, 2, 3, 4 and 6, E8M0 a power of two as a byte (exponent + 127; 255 is NaN). The last two, and
blocks of 32 that share a scale: OCP Microscaling Formats (MX) Specification v1.0, section 5.
How codes are packed: NVIDIA/Model-Optimizer, modelopt/torch/export/quant_utils.py and
modelopt/torch/quantization/qtensor/ @0.47.0.
Shapes: T tokens (any leading dimensions), I inputs, O outputs, G = I / group size.
"""

from __future__ import annotations

import torch

E4M3_MAX = 448.0
E2M1_MAX = 6.0
INT8_MIN, INT8_MAX = -128, 127
E8M0_BIAS, E8M0_NAN = 127, 255
NVFP4_BLOCK, MX_BLOCK = 16, 32
_MANTISSA_BITS, _LEAST_POWER = 23, 0x00400000  # of float32: where the exponent begins, and 2**-127
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in at least float32: a bfloat16 quotient would be rounded twice."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_e4m3(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the E4M3 codes of `x / scale`: saturated to +-448, rounded to nearest, ties to even."""
    quotient = wide(x) / scale
    return quotient.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def to_int8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the integers -128 to 127 nearest to `x / scale`, ties to even, in the type of the quotient."""
    return (wide(x) / scale).round_().clamp_(INT8_MIN, INT8_MAX)


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Return the E2M1 value nearest to each of `x`, ties to the even mantissa, saturated to +-6."""
    size = x.abs().clamp_(max=E2M1_MAX)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)
    return torch.copysign((size / step).round_() * step, x)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Return int8 codes [O, I] in -8..7 from bytes [O/2, I]: row r holds outputs 2r (low nibble) and 2r+1 (high)."""
    signed = packed.view(torch.int8)
    low = (signed << 4) >> 4
    high = signed >> 4
    return torch.stack((low, high), dim=1).reshape(packed.shape[0] * 2, packed.shape[1])


def expand_int4(packed: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights [O, I] of packed codes [O/2, I] and scales [O, G]: code times the scale of its group."""
    return scale_groups(unpack_int4(packed).to(dtype), weight_scale.to(dtype))


def unpack_e2m1(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the values [..., I] of bytes [..., I/2]: inputs 2c in the low nibble and 2c+1 in the high one."""
    values = torch.tensor((*_E2M1, *(-value for value in _E2M1)), dtype=dtype, device=packed.device)
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return values[nibbles.int()]


def pack_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Return bytes [..., I/2] of E2M1 values [..., I], the inverse of `unpack_e2m1`."""
    size = values.abs()
    codes = torch.where(size < 2, size * 2, torch.where(size < 4, size + 2, size / 2 + 4)).to(torch.uint8)
    codes = (codes | (values.signbit().to(torch.uint8) << 3)).unflatten(-1, (-1, 2))
    return codes[..., 0] | (codes[..., 1] << 4)


def scale_groups(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return `values` [..., I], each group of neighbours times its `scale` [..., G]; changes `values`."""
    groups = values.unflatten(-1, (scale.shape[-1], -1))
    return groups.mul_(scale.unsqueeze(-1)).flatten(-2)


def power_of_two(exponents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that E8M0 bytes stand for, made of their bits: library functions round."""
    bits = exponents.to(torch.int32) << _MANTISSA_BITS
    return bits.where(bits > 0, _LEAST_POWER).view(torch.float32).to(dtype)


def nvfp4_parts(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return E2M1 values [..., G, 16] of `x` [..., I] and their blocks' E4M3 scales [..., G], both less `scale`.

    A block's scale is its largest magnitude / 6 / `scale`, rounded to E4M3; a block whose scale rounds to zero is zero.
    """
    blocks = (wide(x) / scale).unflatten(-1, (-1, NVFP4_BLOCK))
    inner = (blocks.abs().amax(dim=-1) / E2M1_MAX).clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn).to(blocks.dtype)
    values = round_e2m1(blocks / inner.unsqueeze(-1).where(inner.unsqueeze(-1) > 0, 1.0))
    return values.where(inner.unsqueeze(-1) > 0, 0.0), inner


def round_nvfp4(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return what NVFP4 makes of `x` [..., I], less the tensor's `scale`: six bits at most, exact in bfloat16."""
    values, inner = nvfp4_parts(x, scale)
    return values.mul_(inner.unsqueeze(-1)).flatten(-2)


def round_mx(x: torch.Tensor, largest: float) -> torch.Tensor:
    """Return what MXFP8 (`largest` 448: E4M3) or MXFP4 (6: E2M1) makes of `x` [..., I], blocks of 32 along it.

    A block's scale is the least power of two that saturates nothing, as in ModelOpt's tensors and in NVIDIA's
    conversion `cvt.rp.satfinite.ue8m0x2`; the OCP specification leaves the choice open.
    """
    blocks = wide(x).unflatten(-1, (-1, MX_BLOCK))
    mantissa, exponent = torch.frexp(blocks.abs().amax(dim=-1, keepdim=True) / largest)
    exponent = (exponent - (mantissa == 0.5).to(exponent.dtype)).clamp_(-E8M0_BIAS, E8M0_BIAS)
    scaled = (blocks * power_of_two(E8M0_BIAS - exponent, blocks.dtype)).clamp_(-largest, largest)
    rounded = round_e2m1(scaled) if largest == E2M1_MAX else scaled.to(torch.float8_e4m3fn).to(scaled.dtype)
    return (rounded * power_of_two(E8M0_BIAS + exponent, blocks.dtype)).flatten(-2)
