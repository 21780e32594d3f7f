"""The hidden states of the calibration samples between two layers: in memory where they fit, always in a file.

The file is what a killed run goes on with.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(slots=True)
class States:
    """One hidden state for each sample, all of one type, in the order of the samples.

    Args:
        path: The file.
        shape: Of the longest sample's state, [1, T, H].
        kind: Type of its elements.
        keep: Hold the states in memory too.
        lengths: The T of each sample; empty where all are equal. In the file each has the room of the longest.
    """

    path: Path
    shape: Sequence[int]
    kind: torch.dtype
    keep: bool
    lengths: Sequence[int] = ()
    _held: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def sample_bytes(self) -> int:
        """Room of one sample's state."""
        return torch.Size(self.shape).numel() * self.kind.itemsize

    def put(self, index: int, state: torch.Tensor) -> None:
        """Store the state of sample `index`; sample 0 comes first and begins the file anew."""
        state = state.detach().to("cpu", self.kind).contiguous()
        with self.path.open("r+b" if index else "wb") as file:
            file.seek(index * self.sample_bytes)
            file.write(memoryview(state.reshape(-1).view(torch.uint8).numpy()))
        if self.keep:
            self._held[index] = state

    def get(self, index: int) -> torch.Tensor:
        """The state of sample `index`."""
        if index in self._held:
            return self._held[index]
        length = self.lengths[index] if self.lengths else self.shape[1]
        state = torch.empty((1, length, *self.shape[2:]), dtype=self.kind)
        view = memoryview(state.reshape(-1).view(torch.uint8).numpy())
        with self.path.open("rb") as file:
            file.seek(index * self.sample_bytes)
            if file.readinto(view) != len(view):
                raise EOFError(f"{self.path} ends inside sample {index}")
        return state

    def sync(self) -> None:
        """Bring the file to the disk."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())

    def discard(self) -> None:
        """Remove the states; there may be none."""
        self._held.clear()
        self.path.unlink(missing_ok=True)
