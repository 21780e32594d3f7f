"""How large one decoder layer is: what decides the memory of a step that works layer by layer."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from trtbuild.safetensors_header import TensorInfo

_SHARING = ("k_proj", "v_proj", "up_proj", "w3")  # have the input of another weight
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class LayerSize:
    """The largest decoder layer, in elements.

    `matrix` is its largest weight (one expert of a stack), `inputs` the largest number of inputs of a weight, and
    `squared_inputs` the sum over its weights of the squared number of inputs, weights with the same input counted once:
    the Hessians that SparseGPT and GPTQ collect.
    """

    parameters: int
    matrix: int
    squared_inputs: int
    inputs: int = 0


def largest_layer(tensors: Iterable[TensorInfo]) -> LayerSize:
    """The sizes of the largest decoder layer; zeros where no tensor's name has a layer's number."""
    layers: dict[str, list[TensorInfo]] = defaultdict(list)
    for tensor in tensors:
        found = _LAYER.search(tensor.name)
        if found:
            layers[found[1]].append(tensor)
    sizes = [_size(layer) for layer in layers.values()]
    return max(sizes, key=lambda size: size.parameters, default=LayerSize(0, 0, 0))


def _size(tensors: list[TensorInfo]) -> LayerSize:
    matrices = [tensor for tensor in tensors if len(tensor.shape) in {2, 3}]
    stacks = [tensor.shape[0] if len(tensor.shape) == 3 else 1 for tensor in matrices]
    return LayerSize(
        parameters=sum(tensor.elements for tensor in tensors),
        matrix=max((tensor.elements // max(n, 1) for tensor, n in zip(matrices, stacks, strict=True)), default=0),
        squared_inputs=sum(
            n * tensor.shape[-1] ** 2
            for tensor, n in zip(matrices, stacks, strict=True)
            if tensor.name.removesuffix(".weight").rpartition(".")[2] not in _SHARING
        ),
        inputs=max((tensor.shape[-1] for tensor in matrices), default=0),
    )
