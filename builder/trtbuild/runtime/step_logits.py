"""What either path gives back of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trtbuild.runtime.capture import States


@dataclass(frozen=True, slots=True)
class StepLogits:
    """The logits of a step, [rows, vocabulary]; `rows` gives each chunk's slice of them.

    `likeliest` waits for the step and gives the likeliest token of each row, -1 where it is not finite; without it the
    step is over already. The logits are those of the newest step. `states` are there for a drafter that reads them.
    """

    logits: torch.Tensor
    rows: list[slice]
    likeliest: Callable[[], list[int]] | None = None
    states: States | None = None
