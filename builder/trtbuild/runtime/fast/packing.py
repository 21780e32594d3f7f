"""4-bit weights as the kernels read them: packed once at load.

Legend: N outputs, K inputs, S inputs of one group (each has a scale per output).

[K / S, N, S / 2] bytes: byte c of a group and output holds the code of the group's input c in its low half and that
of input S / 2 + c in its high half, both plus 8. What a program takes of one group lies in one piece, and the two
halves of the bytes are two tiles whose inputs follow one another.
"""

from __future__ import annotations

import torch


def pack(codes: torch.Tensor, group: int) -> torch.Tensor:
    """The packed bytes [K / S, N, S / 2] of signed codes [N, K] (int8, -8..7)."""
    halves = (codes + 8).to(torch.uint8).view(codes.shape[0], -1, 2, group // 2)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).transpose(0, 1).contiguous()


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The codes [N, K] (int8) of `packed`."""
    codes = torch.stack([packed & 15, packed >> 4], dim=2).to(torch.int8) - 8
    return codes.transpose(0, 1).reshape(packed.shape[1], -1)
