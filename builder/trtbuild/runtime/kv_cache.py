"""The tensors of the paged KV cache, one pair of pools a layer.

Legend: H key/value heads, S slots (blocks x tokens per block), T tokens of a step, L tokens of one sequence,
D head size.
"""

from __future__ import annotations

import torch

E4M3_MAX = 448.0


class LayerCache:
    """Keys and values of one layer: pools of shape [H, S, D], addressed by slot number.

    With `scales` the pools hold E4M3 codes of k / k_scale and v / v_scale (saturating, round to nearest even); the
    reader multiplies the scales in again (`key_scale`, `value_scale`), so that expanding is a plain conversion.
    """

    def __init__(
        self,
        key_shape: tuple[int, int, int],
        value_shape: tuple[int, int, int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        scales: tuple[float, float] | None = None,
    ) -> None:
        self.dtype = dtype
        self.is_fp8 = scales is not None
        self.key_scale, self.value_scale = scales or (1.0, 1.0)
        # Codes are kept as bytes: index_copy_ knows no float8.
        stored = torch.uint8 if self.is_fp8 else dtype
        self.keys = torch.zeros(key_shape, dtype=stored, device=device)
        self.values = torch.zeros(value_shape, dtype=stored, device=device)

    def write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Store `keys` and `values` [H, T, D] in `slots` [T]."""
        if self.is_fp8:
            keys, values = encode_e4m3(keys, self.key_scale), encode_e4m3(values, self.value_scale)
        self.keys.index_copy_(1, slots, keys)
        self.values.index_copy_(1, slots, values)

    def read(self, slots: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [H, L, D] of `slots`: views where `slots` is a run and the pool holds plain numbers."""
        if isinstance(slots, slice):
            keys, values = self.keys[:, slots], self.values[:, slots]
        else:
            keys, values = self.keys.index_select(1, slots), self.values.index_select(1, slots)
        if self.is_fp8:
            keys, values = decode_e4m3(keys, self.dtype), decode_e4m3(values, self.dtype)
        return keys, values


def encode_e4m3(x: torch.Tensor, scale: float) -> torch.Tensor:
    """The E4M3 codes of x / scale as bytes: saturating at 448, rounded to nearest even."""
    scaled = (x.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8)


def decode_e4m3(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that E4M3 `codes` (bytes) stand for, without their scale."""
    return codes.view(torch.float8_e4m3fn).to(dtype)


def bytes_per_slot(layers: list[tuple[tuple[int, int], tuple[int, int]]], itemsize: int) -> int:
    """Bytes that one token takes, from each layer's ((key heads, key size), (value heads, value size))."""
    return sum((kh * kd + vh * vd) * itemsize for (kh, kd), (vh, vd) in layers)
