"""Hessians of linear layers' squared output error: H = 2 X X^T / tokens, X being the layer's inputs [in, tokens].

Layers with the same input (q, k and v; gate and up) share one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(slots=True)
class Hessian:
    """What the calibration text puts into some linear layers that have one input.

    Args:
        matrix: float32 [in, in]; None before the first token.
        tokens: How many it was made from.
        layers: Names of the layers.
        outputs: For each layer the sum over tokens of its squared output.
    """

    matrix: torch.Tensor | None = None
    tokens: int = 0
    layers: list[str] = field(default_factory=list)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, inputs: torch.Tensor) -> None:
        """Take in `inputs` [..., in]; the running mean is ModelOpt's, operation by operation."""
        columns = inputs.reshape(-1, inputs.shape[-1]).t().float()
        if not columns.shape[1]:
            return
        if self.matrix is None:
            self.matrix = torch.zeros(columns.shape[0], columns.shape[0], device=columns.device)
        self.matrix *= self.tokens / (self.tokens + columns.shape[1])
        self.tokens += columns.shape[1]
        columns = math.sqrt(2 / self.tokens) * columns
        self.matrix += columns @ columns.t()


class _Collector:
    def __init__(self) -> None:
        self.found: list[Hessian] = []
        self._of: dict[str, Hessian] = {}
        self._last: tuple[torch.Tensor, Hessian] | None = None

    def see(self, name: str, inputs: torch.Tensor) -> None:
        """A layer gets `inputs`; what the layer before it got is the same object where they share an input."""
        same = self._last is not None and self._last[0] is inputs
        hessian = self._of.get(name)
        if hessian is None:
            hessian = self._last[1] if same and self._last is not None else Hessian()
            if not hessian.layers:
                self.found.append(hessian)
            hessian.layers.append(name)
            self._of[name] = hessian
        if not same or self._last is None or self._last[1] is not hessian:
            if name != hessian.layers[0]:
                raise RuntimeError(f"{name} shares its input with {hessian.layers[0]} for some samples only")
            hessian.add(inputs)
        self._last = (inputs, hessian)

    def hook(self, name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        """What runs when the layer `name` has computed."""

        def seen(module: nn.Module, args: Any, output: torch.Tensor) -> None:  # noqa: ARG001  the signature of a hook
            self.see(name, args[0])
            outputs = self._of[name].outputs
            outputs[name] = outputs.get(name, 0) + output.float().square().sum()

        return seen


def collect(layers: Mapping[str, nn.Module], run: Callable[[], None]) -> list[Hessian]:
    """The Hessians of `layers` while `run` puts the calibration text through them.

    Layers that nothing reached are in none.
    """
    collector = _Collector()
    handles = [module.register_forward_hook(collector.hook(name)) for name, module in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return collector.found
