"""Kernels that start while the one before them ends (programmatic dependent launch, Hopper and newer).

Such a kernel may be on the device before its predecessor has finished. It may read weights at once; before anything
that another kernel writes it waits, and so does every kernel of the chain: that keeps the order of all of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_CAPABILITY = (9, 0)


@triton.jit
def let_next_start(CHAIN: tl.constexpr):
    """Allow the next kernel onto the device as soon as every program of this one has begun."""
    if CHAIN:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(CHAIN: tl.constexpr):
    """Wait until the kernel before is done and its results can be read."""
    if CHAIN:
        gdc_wait()


@cache
def chained() -> dict[str, Any]:
    """The launch arguments of a kernel that takes part, on this device."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= _CAPABILITY:
        return {"CHAIN": True, "launch_pdl": True}
    return {"CHAIN": False}
