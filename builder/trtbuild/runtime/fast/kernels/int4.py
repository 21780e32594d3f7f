"""4-bit weights of `fast/packing.py` unpacked in registers, and expanded for large steps.

Legend: N outputs, K inputs, S inputs of one group (each has a scale per output).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 32


@triton.jit
def unpack_tile(at, rows, scale, inside, HALF: tl.constexpr, ASM: tl.constexpr):
    """Both halves [rows, HALF] (bfloat16) of the group whose rows begin at `at` + `rows` [rows] bytes."""
    packed = tl.load(at + rows[:, None] + tl.arange(0, HALF)[None, :], mask=inside[:, None], other=0)
    if ASM:
        wide = scale[:, None] + tl.zeros([1, HALF], dtype=tl.bfloat16)
        # Two bytes become the halves of a register; 0x4300 with a code u in its last bits is the bfloat16 number
        # 128 + u, and 0xc308 is -136. Only pairs of neighbours go together: tensor cores take no more in one piece.
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d, s, t, zero, one, off, none;
            mov.b32 zero, 0;
            mov.b32 one, 0x3f803f80;
            mov.b32 off, 0xc308c308;
            mov.b32 none, 0x80008000;
            prmt.b32 s, $4, zero, 0x4140;
            prmt.b32 t, $4, zero, 0x4342;
            lop3.b32 a, s, 0x000f000f, 0x43004300, 0xea;
            lop3.b32 b, t, 0x000f000f, 0x43004300, 0xea;
            shr.u32 s, s, 4;
            shr.u32 t, t, 4;
            lop3.b32 c, s, 0x000f000f, 0x43004300, 0xea;
            lop3.b32 d, t, 0x000f000f, 0x43004300, 0xea;
            fma.rn.bf16x2 a, a, one, off;
            fma.rn.bf16x2 b, b, one, off;
            fma.rn.bf16x2 c, c, one, off;
            fma.rn.bf16x2 d, d, one, off;
            fma.rn.bf16x2 $0, a, $5, none;
            fma.rn.bf16x2 $1, b, $6, none;
            fma.rn.bf16x2 $2, c, $5, none;
            fma.rn.bf16x2 $3, d, $6, none;
            }""",
            "=r,=r,=r,=r,r,r,r",
            [packed, wide],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        codes = packed.to(tl.int32)
        wide = scale.to(tl.float32)[:, None]
        low = (((codes & 15) - 8).to(tl.float32) * wide).to(tl.bfloat16)
        high = (((codes >> 4) - 8).to(tl.float32) * wide).to(tl.bfloat16)
    return low, high


@triton.jit
def _expand(packed, scales, out, N, K, HALF: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1).to(tl.int64)
    inside = n < N
    scale = tl.load(scales + group * N + n, mask=inside, other=0.0)
    low, high = unpack_tile(packed + group * N * HALF, n.to(tl.int64) * HALF, scale, inside, HALF, ASM)
    to = out + n.to(tl.int64)[:, None] * K + group * 2 * HALF + tl.arange(0, HALF)[None, :]
    tl.store(to, low, mask=inside[:, None])
    tl.store(to + HALF, high, mask=inside[:, None])


def expand(packed: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write the weights, code times scale in bfloat16, of `packed` and `scales` [K / S, N] to `out` [N, K]."""
    groups, outputs, half = packed.shape
    _expand[(triton.cdiv(outputs, _BLOCK), groups)](
        packed, scales, out, outputs, groups * 2 * half, HALF=half, ROWS=_BLOCK, ASM=packed.is_cuda, num_warps=4
    )
    return out
