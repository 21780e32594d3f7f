"""The hidden states of the calibration samples between two layers.

On a CPU they always lie in a file, with which a killed run goes on, and in memory too where they fit. On a GPU they
stay on the device: there it takes less time to compute them again than to write them down.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(slots=True)
class States:
    """One hidden state for each sample, all of one shape and type, in the order of the samples.

    Args:
        path: The file; None for none.
        shape: Of one sample's state, [1, T, H].
        kind: Type of its elements.
        keep: Hold the states in memory too; always so without a file.
        device: Where they are held.
    """

    path: Path | None
    shape: Sequence[int]
    kind: torch.dtype
    keep: bool
    device: torch.device = torch.device("cpu")  # noqa: RUF009  it cannot be changed
    _held: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def sample_bytes(self) -> int:
        """Size of one sample's state."""
        return torch.Size(self.shape).numel() * self.kind.itemsize

    def put(self, index: int, states: torch.Tensor) -> None:
        """Store the states [B, T, H] of samples from `index` on; sample 0 comes first and begins the file anew."""
        states = states.detach().to(self.device if self.path is None else "cpu", self.kind).contiguous()
        if self.path is not None:
            with self.path.open("r+b" if index else "wb") as file:
                file.seek(index * self.sample_bytes)
                file.write(memoryview(states.reshape(-1).view(torch.uint8).numpy()))
        if self.keep or self.path is None:
            self._held |= {index + offset: state for offset, state in enumerate(states.split(1))}

    def get(self, index: int, count: int = 1) -> torch.Tensor:
        """The states [count, T, H] of samples from `index` on."""
        samples = range(index, index + count)
        if self.path is None or all(sample in self._held for sample in samples):
            held = [self._held[sample] for sample in samples]
            return held[0] if count == 1 else torch.cat(held)
        states = torch.empty((count, *self.shape[1:]), dtype=self.kind)
        view = memoryview(states.reshape(-1).view(torch.uint8).numpy())
        with self.path.open("rb") as file:
            file.seek(index * self.sample_bytes)
            if file.readinto(view) != len(view):
                raise EOFError(f"{self.path} ends inside sample {index}")
        return states

    def sync(self) -> None:
        """Bring the file to the disk."""
        if self.path is not None:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def release(self) -> None:
        """Keep the states in the file alone."""
        self._held.clear()

    def discard(self) -> None:
        """Remove the states; there may be none."""
        self._held.clear()
        if self.path is not None:
            self.path.unlink(missing_ok=True)
