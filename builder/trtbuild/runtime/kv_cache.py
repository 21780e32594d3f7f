"""The tensors of the paged KV cache, one pair of pools a layer.

Legend: H key/value heads, S slots (blocks x tokens per block), T tokens of a step, L tokens of one sequence,
D head size, B bytes of a coded head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from trtbuild.errors import CompatibilityError
from trtbuild.runtime.codes import (
    E4M3_MAX,
    NVFP4_BLOCK,
    nvfp4_parts,
    pack_e2m1,
    scale_groups,
    to_int8,
    unpack_e2m1,
)


@dataclass(frozen=True, slots=True)
class CacheFormat:
    """How keys and values are kept: codes of x / scale, as bytes.

    Args:
        encode: Bytes [..., B] of numbers [..., D] under a scale.
        decode: The numbers that bytes stand for, without the scale, so that the reader multiplies once.
        cells: B for a head of size D.
        block: What must divide D.
    """

    encode: Callable[[torch.Tensor, float], torch.Tensor]
    decode: Callable[[torch.Tensor, torch.dtype], torch.Tensor]
    cells: Callable[[int], int] = lambda size: size
    block: int = 1


class LayerCache:
    """Keys and values of one layer: pools of shape [H, S, D], addressed by slot number.

    With a `form` the pools hold codes of k / k_scale and v / v_scale [H, S, B]; the reader multiplies the scales in
    again (`key_scale`, `value_scale`).
    """

    def __init__(
        self,
        key_shape: tuple[int, int, int],
        value_shape: tuple[int, int, int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        form: str | None = None,
        scales: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        self.dtype = dtype
        self.form = form
        self.key_scale, self.value_scale = scales if form else (1.0, 1.0)
        self._codes = CACHE_FORMATS[form] if form else None
        # Codes are kept as bytes: index_copy_ knows no float8.
        stored = torch.uint8 if form else dtype
        self.keys = torch.zeros(self._stored_shape(key_shape), dtype=stored, device=device)
        self.values = torch.zeros(self._stored_shape(value_shape), dtype=stored, device=device)

    def _stored_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        heads, slots, size = shape
        return (heads, slots, size if self._codes is None else self._codes.cells(size))

    @property
    def is_fp8(self) -> bool:
        """Whether the pools hold E4M3 codes."""
        return self.form == "fp8"

    def write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Store `keys` and `values` [H, T, D] in `slots` [T]."""
        if self._codes is not None:
            keys, values = self._codes.encode(keys, self.key_scale), self._codes.encode(values, self.value_scale)
        self.keys.index_copy_(1, slots, keys)
        self.values.index_copy_(1, slots, values)

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy what lies in the slots `sources` [n] to `targets` [n], which may be among them."""
        for pool in (self.keys, self.values):
            pool.index_copy_(1, targets, pool.index_select(1, sources))

    def read(self, slots: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [H, L, D] of `slots`: views where `slots` is a run and the pool holds plain numbers."""
        if isinstance(slots, slice):
            keys, values = self.keys[:, slots], self.values[:, slots]
        else:
            keys, values = self.keys.index_select(1, slots), self.values.index_select(1, slots)
        if self._codes is not None:
            keys, values = self._codes.decode(keys, self.dtype), self._codes.decode(values, self.dtype)
        return keys, values


def encode_e4m3(x: torch.Tensor, scale: float) -> torch.Tensor:
    """The E4M3 codes of x / scale as bytes: saturating at 448, rounded to nearest even."""
    scaled = (x.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8)


def decode_e4m3(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that E4M3 `codes` (bytes) stand for, without their scale."""
    return codes.view(torch.float8_e4m3fn).to(dtype)


def _encode_int8(x: torch.Tensor, scale: float) -> torch.Tensor:
    return to_int8(x, torch.tensor(scale, device=x.device)).to(torch.int8).view(torch.uint8)


def _decode_int8(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return codes.view(torch.int8).to(dtype)


def encode_nvfp4(x: torch.Tensor, scale: float) -> torch.Tensor:
    """NVFP4 of x / scale [..., D] as bytes: E2M1 codes, two a byte [..., D/2], then E4M3 scales of blocks [..., D/16].

    `scale` is that of the checkpoint, the largest magnitude / 448: then a code times its block's scale is within E4M3,
    as the attention kernels need it (NVIDIA/TensorRT-LLM, tensorrt_llm/_torch/modules/linear.py @ed53795b,
    NVFP4LinearMethod: "to avoid overflow when dequantizing NVFP4 in attention kernels").
    """
    values, inner = nvfp4_parts(x, torch.tensor(scale, device=x.device))
    return torch.cat((pack_e2m1(values.flatten(-2)), inner.to(torch.float8_e4m3fn).view(torch.uint8)), dim=-1)


def decode_nvfp4(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers [..., D] that bytes of `encode_nvfp4` stand for, without their scale."""
    size = codes.shape[-1] * NVFP4_BLOCK // (NVFP4_BLOCK // 2 + 1)
    packed, inner = codes[..., : size // 2], codes[..., size // 2 :].contiguous().view(torch.float8_e4m3fn)
    return scale_groups(unpack_e2m1(packed, dtype), inner.to(dtype))


CACHE_FORMATS: Mapping[str, CacheFormat] = {
    "fp8": CacheFormat(encode_e4m3, decode_e4m3),
    "int8": CacheFormat(_encode_int8, _decode_int8),
    "nvfp4": CacheFormat(
        encode_nvfp4, decode_nvfp4, cells=lambda size: size // 2 + size // NVFP4_BLOCK, block=NVFP4_BLOCK
    ),
}


def bytes_per_slot(layers: list[tuple[tuple[int, int], tuple[int, int]]], dtype: torch.dtype, form: str | None) -> int:
    """Bytes that one token takes, from each layer's ((key heads, key size), (value heads, value size)).

    Raises:
        CompatibilityError: the heads are no whole number of the format's blocks.
    """
    codes = CACHE_FORMATS[form] if form else None
    total = 0
    for heads, size in (part for layer in layers for part in layer):
        if codes is not None and size % codes.block:
            raise CompatibilityError(
                f"kv_cache.dtype {form}: heads of {size} are no whole number of blocks of {codes.block}",
                "compress with kv_cache: fp8 or none",
            )
        total += heads * (size * dtype.itemsize if codes is None else codes.cells(size))
    return total
