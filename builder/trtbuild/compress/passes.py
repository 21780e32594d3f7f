"""Put the calibration states through one decoder layer, as often as ModelOpt asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from trtbuild.compress.batches import Batch
from trtbuild.compress.blocks import is_finite
from trtbuild.compress.overflow import first_overflow, overflow_error
from trtbuild.compress.request import Meter
from trtbuild.compress.skeleton import Call
from trtbuild.compress.states import States


@dataclass(slots=True)
class LayerLoop:
    """The function that ModelOpt calls to put the samples through the model, which has this one layer.

    It also stores what comes out, once for each pair of states: the layer computes with its original numbers while
    ModelOpt calibrates, but for a KV cache that the first pass has calibrated and later passes round.

    Args:
        layer: The decoder layer.
        name: Its name in the model.
        calls: What it is called with beside the state, by the shape of a batch.
        states: For each call the states before the layer, and where those behind it go (None behind the last layer);
            the last pair for all further calls.
        batches: The samples, in the order in which they run.
        device: Where the layer runs.
        passes: For each call what it does, and what one layer costs in it.
        meter: Told after every batch.
        where: The layer, for the progress.
    """

    layer: nn.Module
    name: str
    calls: Mapping[tuple[int, int], Call]
    states: Sequence[tuple[States, States | None]]
    batches: Sequence[Batch]
    device: torch.device
    passes: Sequence[tuple[str, int]]
    meter: Meter
    where: str
    done: int = 0

    def __call__(self, model: nn.Module) -> None:  # noqa: ARG002  ModelOpt's signature
        """Run every sample once."""
        what, cost = self.passes[min(self.done, len(self.passes) - 1)]
        inputs, outputs = self.states[min(self.done, len(self.states) - 1)]
        count = sum(batch.size for batch in self.batches)
        with torch.no_grad():
            for batch in self.batches:
                states = inputs.get(batch.index, batch.size).to(self.device)
                hidden = self._run(batch, states)
                if outputs is not None and self.done < len(self.states):
                    outputs.put(batch.index, hidden)
                last = batch.index + batch.size
                self.meter.advance(cost * batch.size, f"{what}: {self.where}, sample {last} of {count}")
        self.done += 1

    def finish(self) -> None:
        """Store what ModelOpt had no need to compute: nothing in the layer is quantized then."""
        while self.done < len(self.states):
            self(self.layer)

    def _run(self, batch: Batch, states: torch.Tensor) -> torch.Tensor:
        call = self.calls[batch.shape]
        try:
            hidden = call.run(self.layer, states)
        except AssertionError as error:  # ModelOpt's answer to a range that is not finite
            culprit = self._first_overflow(call, states)
            if culprit is None:
                raise
            raise overflow_error(batch.index, culprit, states.dtype, batch.size) from error
        if not is_finite(hidden):
            culprit = self._first_overflow(call, states) or f"the output of {self.name}"
            raise overflow_error(batch.index, culprit, hidden.dtype, batch.size)
        return hidden

    def _first_overflow(self, call: Call, states: torch.Tensor) -> str | None:
        """The first module inside the layer that takes or gives what is not finite."""
        return first_overflow(self.layer, self.name, lambda: call.run(self.layer, states))
