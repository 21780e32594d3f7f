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
_PIECE = tl.constexpr(1024)  # bytes that a thread asks for at once
# Of the next matrix this much is asked for: about what the memory delivers while a small kernel runs, and well inside L2.
AHEAD = 16 * 2**20
_MOST_ROWS = 512  # larger steps keep the memory or the arithmetic busy anyway


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


@triton.jit
def prefetch(weights, size, program, THREADS: tl.constexpr):
    """Ask for this program's pieces of the first `size` bytes of `weights`, to find them in the L2 cache later."""
    piece = program * THREADS + tl.arange(0, THREADS)
    address = weights.to(tl.int64) + piece.to(tl.int64) * _PIECE
    wanted = (piece < size // _PIECE).to(tl.int32)
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.b32 p, $2, 0;
        @p cp.async.bulk.prefetch.L2.global [$1], 1024;
        mov.b32 $0, 0;
        }""",
        "=r,l,r",
        [address, wanted],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def ahead(weight: torch.Tensor | None, rows: int) -> int:
    """How many bytes of `weight`, the next matrix, a kernel of a step of `rows` tokens asks for: 0 for none."""
    if weight is None or rows > _MOST_ROWS or not chained()["CHAIN"]:
        return 0
    return min(weight.nbytes, AHEAD)


def programs_ahead(size: int, warps: int) -> int:
    """How many programs of `warps` warps it takes to ask for `size` bytes."""
    return -(-size // (int(_PIECE) * 32 * warps))


@cache
def chained() -> dict[str, Any]:
    """The launch arguments of a kernel that takes part, on this device."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= _CAPABILITY:
        return {"CHAIN": True, "launch_pdl": True}
    return {"CHAIN": False}
