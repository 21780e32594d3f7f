"""Checkpoints in the form of compressed-tensors, read as if they were ModelOpt's.

Format: vllm-project/compressed-tensors 0.20.0, `compressors/pack_quantized/helpers.py`: int32 words of eight codes
along the input, the first in the lowest bits, each code with 8 added. The codes are those of INT4 without smoothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trtbuild.errors import CompatibilityError

METHOD = "compressed-tensors"
_PACKED, _SHAPE = ".weight_packed", ".weight_shape"
_HINT = "compress with checkpoint: compressed-tensors and format int4_awq, int4_gptq or fp8, or serve it with vLLM"


def quantized_as(section: Mapping[str, Any], where: Path) -> tuple[str, int | None, dict[str, str]]:
    """What `quantization_config` says: ModelOpt's name of the format, its group, and names of layers by pattern.

    The last is empty where all layers share the format.

    Raises:
        CompatibilityError: A scheme that has no counterpart here.
    """
    groups = list((section.get("config_groups") or {}).values())
    if not groups:
        raise CompatibilityError(f"{where}: compressed-tensors without config_groups", _HINT)
    named = [_algorithm(group, where) for group in groups]
    group_size = next((size for _, size in named if size), None)
    if len(named) == 1:
        return *named[0], {}
    layers = {
        str(target): algorithm
        for group, (algorithm, _) in zip(groups, named, strict=True)
        for target in group["targets"]
    }
    return "MIXED_PRECISION", group_size, layers


def _algorithm(group: Mapping[str, Any], where: Path) -> tuple[str, int | None]:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    kind = (weights.get("type"), weights.get("num_bits"), weights.get("strategy"))
    plain = weights.get("symmetric", True) and not weights.get("actorder")
    if kind == ("int", 4, "group") and weights.get("group_size") and not inputs and plain:
        return "W4A16_AWQ", int(weights["group_size"])
    if kind == ("float", 8, "tensor") and inputs and inputs.get("strategy") == "tensor" and not inputs.get("dynamic"):
        return "FP8", None
    raise CompatibilityError(f"{where}: compressed-tensors with weights {dict(weights)} is not computed here", _HINT)


class UnpackedFiles:
    """The tensors of a directory with `weight` in ModelOpt's packing in place of `weight_packed`.

    Args:
        files: The directory's tensors: `names`, `tensor`, `dtype` and `shape`.
    """

    def __init__(self, files: Any) -> None:
        self._files = files
        self.names = sorted(name.replace(_PACKED, ".weight") for name in files.names if not name.endswith(_SHAPE))
        self._stored = {name.replace(_PACKED, ".weight"): name for name in files.names if name.endswith(_PACKED)}

    def tensor(self, name: str) -> torch.Tensor:
        """Tensor `name`; codes of INT4 as bytes [O/2, I]."""
        packed = self._stored.get(name)
        return self._files.tensor(name) if packed is None else to_row_pairs(self._files.tensor(packed))

    def dtype(self, name: str) -> str:
        """The safetensors type of tensor `name`."""
        return "U8" if name in self._stored else str(self._files.dtype(name))

    def shape(self, name: str) -> list[int]:
        """The shape of tensor `name`."""
        if name not in self._stored:
            return list(self._files.shape(name))
        rows, words = self._files.shape(self._stored[name])
        return [rows // 2, words * 8]


def to_row_pairs(words: torch.Tensor) -> torch.Tensor:
    """Bytes [O/2, I], row r with outputs 2r (low) and 2r+1 (high) in two's complement, of int32 words [O, I/8]."""
    both = words.contiguous().view(torch.uint8)
    codes = torch.stack((both & 15, both >> 4), dim=-1).reshape(words.shape[0], -1) ^ 8
    return codes[0::2] | (codes[1::2] << 4)
