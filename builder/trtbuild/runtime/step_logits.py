"""What either path gives back of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class StepLogits:
    """The logits of a step, [rows, vocabulary]; `rows` gives each chunk's slice of them.

    `likeliest`: the likeliest token of each row where the device has found it already, -1 where it is not finite.
    """

    logits: torch.Tensor
    rows: list[slice]
    likeliest: list[int] | None = None
