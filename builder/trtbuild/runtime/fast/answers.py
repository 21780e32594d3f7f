"""The tokens that steps choose: kept on the device for the next step, copied to the host for whoever asks later."""

from __future__ import annotations

from collections.abc import Callable

import torch

_SLOTS = 2  # steps whose answers may be on their way at once: the running one and the one behind it


class Answers:
    """A buffer [rows] (int32) that the newest step writes its tokens to, and the host's copies of it."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.chosen = torch.zeros(rows, dtype=torch.int32, device=device)
        self._host = [torch.zeros(rows, dtype=torch.int32, pin_memory=True) for _ in range(_SLOTS)]
        self._done = [torch.cuda.Event() for _ in range(_SLOTS)]
        self._next = 0

    def fetch(self, count: int) -> Callable[[], list[int]]:
        """Copy the first `count` tokens to the host behind what is queued; calling the result waits for them."""
        slot = self._next
        self._next = (slot + 1) % _SLOTS
        host, done = self._host[slot], self._done[slot]
        host[:count].copy_(self.chosen[:count], non_blocking=True)
        done.record()

        def wait() -> list[int]:
            done.synchronize()
            tokens: list[int] = host[:count].tolist()
            return tokens

        return wait
