"""What several kernels share: E4M3 codes, rotation, sizes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_codes(x, scale):
    """The E4M3 codes of bfloat16 numbers `x` over `scale`: saturated to +-448, rounded to nearest even."""
    quotient = tl.div_rn(x.to(tl.float32), scale)
    return tl.clamp(quotient, -448.0, 448.0).to(tl.float8e4nv)


@triton.jit
def silu_times(gate, up):
    """The bfloat16 product silu(gate) * up of float32 sums, rounded where PyTorch's bfloat16 modules round."""
    gate = gate.to(tl.bfloat16).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(tl.bfloat16).to(tl.float32)
    return (activated * up.to(tl.bfloat16).to(tl.float32)).to(tl.bfloat16)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()
