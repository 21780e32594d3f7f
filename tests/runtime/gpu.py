"""What the tests of the fast path share: where they can run, and how an error is measured."""

from __future__ import annotations

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda"
BF16_ERROR = 1e-2
FP8_ERROR = 7e-2  # one rounding to 3 bits after the point is off by up to 1/16, and a bfloat16 one before it

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no NVIDIA GPU, or PyTorch without CUDA")]


def error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """The norm of the difference over the norm of `reference` (float64); infinite where a number is no number."""
    found = found.double()
    if not bool(found.isfinite().all()):
        return float("inf")
    return float((found - reference).norm() / reference.norm())


def poison() -> None:
    """Fill the memory that the next allocations will most likely get with NaN, so that unwritten outputs show."""
    waste = [torch.full((2**22,), float("nan"), device=DEVICE) for _ in range(8)]
    waste += [torch.full((2**10,), float("nan"), device=DEVICE) for _ in range(64)]
    del waste


def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Fresh random numbers on the device."""
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def codes(*shape: int) -> torch.Tensor:
    """Random E4M3 codes."""
    return (torch.randn(*shape, device=DEVICE) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
