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
    """One hidden state for each sample, all of one type, in the order of the samples.

    Args:
        path: The file; None for none.
        shape: Of the longest sample's state, [1, T, H].
        kind: Type of its elements.
        keep: Hold the states in memory too; always so without a file.
        device: Where they are held.
        lengths: The T of each sample; empty where all are equal. In the file each has the room of the longest.
    """

    path: Path | None
    shape: Sequence[int]
    kind: torch.dtype
    keep: bool
    device: torch.device = torch.device("cpu")  # noqa: RUF009  it cannot be changed
    lengths: Sequence[int] = ()
    _held: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def sample_bytes(self) -> int:
        """Room of one sample's state."""
        return torch.Size(self.shape).numel() * self.kind.itemsize

    def put(self, index: int, states: torch.Tensor) -> None:
        """Store the states [B, T, H] of samples from `index` on; sample 0 comes first and begins the file anew."""
        states = states.detach().to(self.device if self.path is None else "cpu", self.kind).contiguous()
        if self.path is not None:
            with self.path.open("r+b" if index else "wb") as file:
                for offset, state in enumerate(states):
                    file.seek((index + offset) * self.sample_bytes)
                    file.write(memoryview(state.reshape(-1).view(torch.uint8).numpy()))
        if self.keep or self.path is None:
            self._held |= {index + offset: state for offset, state in enumerate(states.split(1))}

    def get(self, index: int, count: int = 1) -> torch.Tensor:
        """The states [count, T, H] of samples from `index` on, which have one length."""
        samples = range(index, index + count)
        if self.path is None or all(sample in self._held for sample in samples):
            held = [self._held[sample] for sample in samples]
            return held[0] if count == 1 else torch.cat(held)
        length = self.lengths[index] if self.lengths else self.shape[1]
        states = torch.empty((count, length, *self.shape[2:]), dtype=self.kind)
        with self.path.open("rb") as file:
            for sample, state in zip(samples, states, strict=True):
                view = memoryview(state.reshape(-1).view(torch.uint8).numpy())
                file.seek(sample * self.sample_bytes)
                if file.readinto(view) != len(view):
                    raise EOFError(f"{self.path} ends inside sample {sample}")
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
