"""What the kernels are told of a model: heads, cache, rotation; knows nothing of the kernels.

Legend: D head size, H key/value heads, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Heads:
    """The shape of one attention layer, and what happens to its heads before attention.

    `scaling` multiplies the scores; `window` is how many positions a token sees (0: all before it and itself);
    `query_norm` and `key_norm` [D] are the weights of RMS norms over each head.
    """

    queries: int
    keys: int
    size: int
    scaling: float
    window: int = 0
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    eps: float = 1e-6


@dataclass(frozen=True, slots=True)
class Pool:
    """One layer's cache: keys and values [H, S, D], bfloat16 or E4M3 codes of k / key_scale and v / value_scale."""

    keys: torch.Tensor
    values: torch.Tensor
    page: int
    key_scale: float = 1.0
    value_scale: float = 1.0

    @property
    def is_fp8(self) -> bool:
        """Whether the pool holds codes."""
        return self.keys.dtype == torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Rotation:
    """cos and sin [positions, D / 2], float32, with the model's attention factor in them."""

    cos: torch.Tensor
    sin: torch.Tensor
