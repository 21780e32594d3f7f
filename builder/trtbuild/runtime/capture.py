"""What a model computes on its way to the logits, for drafters that read it.

Legend: T tokens of a step, R rows of its logits, H hidden size, n captured layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trtbuild.errors import CompatibilityError


@dataclass(frozen=True, slots=True)
class States:
    """`last` [R, H]: what the head has made the logits of; `layers` [T, n x H]: outputs of layers side by side."""

    last: torch.Tensor
    layers: torch.Tensor | None


class Capture:
    """Keeps the states of the newest step of a model."""

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        """Watch the head of `model` and its decoder layers of these numbers.

        Raises:
            CompatibilityError: the model has no such layers, or no head apart.
        """
        found: Any = model
        head, decoder = found.get_output_embeddings(), getattr(found.base_model, "layers", None)
        if head is None or decoder is None or any(not 0 <= layer < len(decoder) for layer in layers):
            count = "no list of layers" if decoder is None else f"{len(decoder)} layers"
            raise CompatibilityError(
                f"{type(model).__name__} has {count}, and the draft reads the layers {list(layers)}",
                "use a draft that was trained for this model",
            )
        self._last: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}
        self._layers = tuple(layers)
        head.register_forward_pre_hook(self._keep_last)
        for layer in layers:
            decoder[layer].register_forward_hook(self._keeping(layer))

    def take(self, wanted: Sequence[int]) -> States:
        """The states of the step just computed; `wanted` are the rows that the logits are of."""
        last, self._last = self._last, None
        assert last is not None  # noqa: S101  every step ends in the head
        # Classes that make the logits of every row hand every row to the head.
        last = last[0] if last.shape[1] == len(wanted) else last[0, list(wanted)]
        layers = torch.cat([self._outputs[layer][0] for layer in self._layers], dim=-1) if self._layers else None
        self._outputs.clear()
        return States(last, layers)

    def _keep_last(self, _: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        self._last = given[0]

    def _keeping(self, layer: int) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            self._outputs[layer] = output if isinstance(output, torch.Tensor) else output[0]

        return keep
