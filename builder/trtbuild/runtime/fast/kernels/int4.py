"""4-bit weights as the kernels read them: packed once at load, unpacked in registers.

Legend: N outputs, K inputs, S inputs of one group (each has a scale per output).

A checkpoint's codes become words of eight: word w of group g and output n holds the codes of inputs 4 w .. 4 w + 3 of the
first half of the group and of the same four of the second half. [K / S, N, S / 2] bytes: what a program takes of one group
lies in one piece, and the halves of the words come out as two tiles whose inputs follow one another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Bits at which a word holds the codes of the first half's inputs 0, 1, 2, 3 and of the second half's: a shift by 4 j and one
# mask give two codes, 16 bits apart, the places of two bfloat16 numbers in a register.
_SHIFTS = (0, 16, 4, 20), (8, 24, 12, 28)
_BLOCK = 32


def pack(codes: torch.Tensor, group: int) -> torch.Tensor:
    """The packed bytes [K / S, N, S / 2] of signed codes [N, K] (int8, -8..7)."""
    outputs, inputs = codes.shape
    shifted = (codes.to(torch.int64) + 8).view(outputs, inputs // group, 2, group // 8, 4)
    words = sum(shifted[:, :, half, :, place] << _SHIFTS[half][place] for half in range(2) for place in range(4))
    assert isinstance(words, torch.Tensor)  # noqa: S101  a sum of tensors
    narrow = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return narrow.transpose(0, 1).contiguous().view(torch.uint8)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The codes [N, K] (int8) of `packed`."""
    groups, outputs, half = packed.shape
    words = packed.contiguous().view(torch.int32).to(torch.int64)[..., None]
    parts = [(words >> torch.tensor(shifts, device=packed.device)) & 15 for shifts in _SHIFTS]
    codes = torch.stack([part.reshape(groups, outputs, half) for part in parts], dim=2)
    return (codes - 8).to(torch.int8).reshape(groups, outputs, 2 * half).transpose(0, 1).reshape(outputs, -1)


@triton.jit
def unpack_tile(at, rows, scale, inside, HALF: tl.constexpr, ASM: tl.constexpr):
    """Both halves [rows, HALF] (bfloat16) of the group whose rows begin at `at` + `rows` [rows] bytes."""
    if ASM:
        packed = tl.load(at + rows[:, None] + tl.arange(0, HALF)[None, :], mask=inside[:, None], other=0)
        wide = scale[:, None] + tl.zeros([1, HALF], dtype=tl.bfloat16)
        # 0x4300 with a code u in its last bits is the bfloat16 number 128 + u, and 0xc308 is -136.
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d, s, t, u, one, off, none;
            mov.b32 one, 0x3f803f80;
            mov.b32 off, 0xc308c308;
            mov.b32 none, 0x80008000;
            shr.u32 s, $4, 4;
            shr.u32 t, $4, 8;
            shr.u32 u, $4, 12;
            lop3.b32 a, $4, 0x000f000f, 0x43004300, 0xea;
            lop3.b32 b, s, 0x000f000f, 0x43004300, 0xea;
            lop3.b32 c, t, 0x000f000f, 0x43004300, 0xea;
            lop3.b32 d, u, 0x000f000f, 0x43004300, 0xea;
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
        column = tl.arange(0, HALF)
        byte = at + rows[:, None] + (column // 4 * 4 + column % 2 * 2)[None, :]
        shift = (column % 4 // 2 * 4)[None, :]
        first = tl.load(byte, mask=inside[:, None], other=0).to(tl.int32)
        second = tl.load(byte + 1, mask=inside[:, None], other=0).to(tl.int32)
        wide = scale.to(tl.float32)[:, None]
        low = ((((first >> shift) & 15) - 8).to(tl.float32) * wide).to(tl.bfloat16)
        high = ((((second >> shift) & 15) - 8).to(tl.float32) * wide).to(tl.bfloat16)
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
