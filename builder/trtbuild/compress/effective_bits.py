"""How many bits a weight takes in the files of a checkpoint, everything that belongs to its layer counted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from trtbuild.safetensors_header import TensorInfo

_LEAVES = frozenset(
    {"weight", "weight_packed", "weight_shape", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"}
)


def bits_per_weight(
    layers: Iterable[str], written: Mapping[str, TensorInfo], source: Mapping[str, TensorInfo]
) -> float | None:
    """Bits of a weight of the `layers` in the files `written`; None if the source does not say how many weights."""
    names = set(layers)
    infos = [source.get(f"{layer}.weight") for layer in names]
    if not names or any(info is None for info in infos):
        return None
    weights = sum(math.prod(info.shape) for info in infos if info is not None)
    stored = sum(
        info.bytes for name, info in written.items()
        if name.rpartition(".")[0] in names and name.rpartition(".")[2] in _LEAVES
    )  # fmt: skip
    return round(8 * stored / weights, 4)
