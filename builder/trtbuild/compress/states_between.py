"""Which hidden states go from layer to layer, and where they are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from trtbuild.compress.request import Request
from trtbuild.compress.states import States
from trtbuild.weight_formats import is_smoothed

PRUNED, CACHED = "pruned", "cached"
_ON_DEVICE_BYTES = 4 << 30  # hidden states before and behind a layer


@dataclass(slots=True)
class StatesBetween:
    """The states of one compression.

    Args:
        request: Says which are needed.
        lengths: Tokens of each sample; without samples there are no states.
        device: Where layers run.
        work: Where files lie.
        keep: Hold the states in memory too.
        shape: Of the longest sample's state, [1, T, H]; known once the model was probed.
    """

    request: Request
    lengths: Sequence[int]
    device: torch.device
    work: Path
    keep: bool = True
    shape: Sequence[int] = ()
    _known: dict[str, States] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of states, in the order of their use: of the pruned model, and of it with its KV cache rounded.

        ModelOpt's AWQ rounds the KV cache in its second pass, as the first has calibrated it. Where formats are mixed,
        the cache is calibrated apart from them.
        """
        request = self.request
        if not self.lengths or not request.calibrated:
            return ()
        twice = is_smoothed(request.single) and not request.mixed
        return (PRUNED, CACHED) if request.kv_cache != "none" and twice else (PRUNED,)

    @property
    def recomputed(self) -> bool:
        """Whether states stay on the device, so that a resumed run puts the samples through finished layers again."""
        changed = self.request.sparse or self.request.solved  # the source's layers do not give these states
        return self.device.type == "cuda" and self.kinds == (PRUNED,) and not changed

    def before(self, kind: str, index: int) -> States:
        """The states before decoder layer `index`."""
        path = self.path(kind, index)
        if path.name not in self._known:
            dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
            if self.recomputed:
                size = 2 * len(self.lengths) * torch.Size(self.shape).numel() * dtype.itemsize
                place = self.device if size <= _ON_DEVICE_BYTES else torch.device("cpu")
                self._known[path.name] = States(None, self.shape, dtype, keep=True, device=place, lengths=self.lengths)
            else:
                self._known[path.name] = States(path, self.shape, dtype, self.keep, lengths=self.lengths)
        return self._known[path.name]

    def all_before(self, index: int) -> list[States]:
        """The states of all kinds before decoder layer `index`."""
        return [self.before(kind, index) for kind in self.kinds]

    def spend(self, index: int) -> list[States]:
        """The states before a layer, which this run needs no more: out of memory, their files still there."""
        spent = self.all_before(index)
        for kind, states in zip(self.kinds, spent, strict=True):
            states.release()
            del self._known[self.path(kind, index).name]
        return spent

    def missing(self, index: int) -> bool:
        """Whether a file is missing that a run needs which begins with layer `index`."""
        return not self.recomputed and not all(self.path(kind, index).is_file() for kind in self.kinds)

    def path(self, kind: str, index: int) -> Path:
        """The file of the states before decoder layer `index`."""
        return self.work / f"states-{kind}-{index}"
