"""Put the calibration states through one decoder layer, as often as ModelOpt asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trtbuild.compress.blocks import is_finite
from trtbuild.compress.request import Meter
from trtbuild.compress.skeleton import Call
from trtbuild.compress.states import States
from trtbuild.errors import ToolError


@dataclass(slots=True)
class LayerLoop:
    """The function that ModelOpt calls to put the samples through the model, which has this one layer.

    It also stores what comes out, once for each pair of states: the layer computes with its original numbers while
    ModelOpt calibrates, but for a KV cache that the first pass has calibrated and later passes round.

    Args:
        layer: The decoder layer.
        name: Its name in the model.
        calls: What it is called with beside the state, by the number of samples at once.
        states: For each call the states before the layer, and where those behind it go (None behind the last layer);
            the last pair for all further calls.
        count: Number of samples.
        batch: How many run at once.
        device: Where the layer runs.
        passes: For each call what it does, and what one layer costs in it.
        meter: Told after every sample.
        where: The layer, for the progress.
    """

    layer: nn.Module
    name: str
    calls: Mapping[int, Call]
    states: Sequence[tuple[States, States | None]]
    count: int
    batch: int
    device: torch.device
    passes: Sequence[tuple[str, int]]
    meter: Meter
    where: str
    done: int = 0

    def __call__(self, model: nn.Module) -> None:  # noqa: ARG002  ModelOpt's signature
        """Run every sample once."""
        what, cost = self.passes[min(self.done, len(self.passes) - 1)]
        inputs, outputs = self.states[min(self.done, len(self.states) - 1)]
        with torch.no_grad():
            for index in range(0, self.count, self.batch):
                size = min(self.batch, self.count - index)
                states = inputs.get(index, size).to(self.device)
                hidden = self._run(index, states)
                if outputs is not None and self.done < len(self.states):
                    outputs.put(index, hidden)
                self.meter.advance(cost * size, f"{what}: {self.where}, sample {index + size} of {self.count}")
        self.done += 1

    def finish(self) -> None:
        """Store what ModelOpt had no need to compute: nothing in the layer is quantized then."""
        while self.done < len(self.states):
            self(self.layer)

    def _run(self, index: int, states: torch.Tensor) -> torch.Tensor:
        call = self.calls[len(states)]
        try:
            hidden = call.run(self.layer, states)
        except AssertionError as error:  # ModelOpt's answer to a range that is not finite
            culprit = self._first_overflow(call, states)
            if culprit is None:
                raise
            raise _overflow(index, len(states), culprit, states.dtype) from error
        if not is_finite(hidden):
            culprit = self._first_overflow(call, states) or f"the output of {self.name}"
            raise _overflow(index, len(states), culprit, hidden.dtype)
        return hidden

    def _first_overflow(self, call: Call, states: torch.Tensor) -> str | None:
        """The first module inside the layer that takes or gives what is not finite."""
        found: list[str] = []

        def watch(what: str, name: str) -> Any:
            def hook(module: nn.Module, *values: Any) -> None:  # noqa: ARG001  the signature of both kinds of hook
                value = values[-1][0] if isinstance(values[-1], tuple) and values[-1] else values[-1]
                if isinstance(value, torch.Tensor) and not is_finite(value):
                    found.append(f"the {what} of {self.name}.{name}")

            return hook

        handles = []
        for name, module in self.layer.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(watch("input", name)))
                handles.append(module.register_forward_hook(watch("output", name)))
        with suppress(AssertionError):
            call.run(self.layer, states)
        for handle in handles:
            handle.remove()
        return found[0] if found else None


def _overflow(index: int, size: int, culprit: str, kind: torch.dtype) -> ToolError:
    samples = f"sample {index + 1}" if size == 1 else f"samples {index + 1} to {index + size}"
    return ToolError(
        f"calibration {samples}: {culprit} is not finite in {kind}",
        "the model does not compute with these weights and this text; check both",
    )
