"""Which calibration samples run at once: neighbours of one length, so that nothing is padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples from `index` on, all of one length in tokens."""

    index: int
    size: int
    length: int

    @property
    def shape(self) -> tuple[int, int]:
        """Samples and tokens of each, which decide what a layer is called with."""
        return self.size, self.length


def batch_tokens(device: torch.device) -> int:
    """How many tokens run at once: on a GPU enough to keep it busy, on a CPU those of one sample."""
    return _TOKENS if device.type == "cuda" else 1


def batches(lengths: Sequence[int], tokens: int) -> list[Batch]:
    """All samples in their order, as many neighbours of one length together as have `tokens` at most (one at least)."""
    found: list[Batch] = []
    for index, length in enumerate(lengths):
        last = found[-1] if found else None
        if last is not None and last.length == length and (last.size + 1) * length <= tokens:
            found[-1] = Batch(last.index, last.size + 1, length)
        else:
            found.append(Batch(index, 1, length))
    return found
