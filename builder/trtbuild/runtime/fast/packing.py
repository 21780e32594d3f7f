"""4-bit weights as the kernels read them: packed once at load.

Legend: N outputs, K inputs, S inputs of one group (each has a scale per output).

A checkpoint's codes become words of eight: word w of group g and output n holds the codes of inputs 4 w .. 4 w + 3 of the
first half of the group and of the same four of the second half. [K / S, N, S / 2] bytes: what a program takes of one group
lies in one piece, and the halves of the words come out as two tiles whose inputs follow one another.
"""

from __future__ import annotations

import torch

# Bits at which a word holds the codes of the first half's inputs 0, 1, 2, 3 and of the second half's: a shift by 4 j and one
# mask give two codes, 16 bits apart, the places of two bfloat16 numbers in a register.
_SHIFTS = (0, 16, 4, 20), (8, 24, 12, 28)


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
