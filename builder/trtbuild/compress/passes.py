"""Put the calibration states through one decoder layer, as often as ModelOpt asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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
        call: What it is called with beside the state.
        states: For each call the states before the layer, and where those behind it go (None behind the last layer);
            the last pair for all further calls.
        count: Number of samples.
        device: Where the layer runs.
        passes: For each call what it does, and what one layer costs in it.
        meter: Told after every sample.
        where: The layer, for the progress.
    """

    layer: nn.Module
    name: str
    call: Call
    states: Sequence[tuple[States, States | None]]
    count: int
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
            for index in range(self.count):
                state = inputs.get(index).to(self.device)
                hidden = self.call.run(self.layer, state)
                self._check(index, state, hidden)
                if outputs is not None and self.done < len(self.states):
                    outputs.put(index, hidden)
                self.meter.advance(cost, f"{what}: {self.where}, sample {index + 1} of {self.count}")
        self.done += 1

    def finish(self) -> None:
        """Store what ModelOpt had no need to compute: nothing in the layer is quantized then."""
        while self.done < len(self.states):
            self(self.layer)

    def _check(self, index: int, state: torch.Tensor, hidden: torch.Tensor) -> None:
        if not bool(torch.isfinite(hidden).all()):
            culprit = self._first_overflow(state) or self.name
            raise ToolError(
                f"calibration sample {index + 1}: the output of {culprit} is not finite in {hidden.dtype}",
                "the model does not compute with these weights and this text; check both",
            )

    def _first_overflow(self, state: torch.Tensor) -> str | None:
        """The first module inside the layer whose output is not finite."""
        found: list[str] = []

        def watch(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001  the signature of a hook
                if isinstance(output, torch.Tensor) and not bool(torch.isfinite(output).all()):
                    found.append(f"{self.name}.{name}")

            return hook

        handles = [module.register_forward_hook(watch(name)) for name, module in self.layer.named_modules() if name]
        try:
            self.call.run(self.layer, state)
        finally:
            for handle in handles:
                handle.remove()
        return found[0] if found else None
