"""The other form of a checkpoint: compressed-tensors, which vLLM reads in INT4 where it refuses ModelOpt's.

Format: vllm-project/compressed-tensors 0.20.0, `compressors/pack_quantized/` (int32 words of eight codes along the
input, the first in the lowest bits, each code with 8 added) and `quantization/quant_args.py` (the words of the config).
It has no smoothing scales; `folding` says where they go.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from trtbuild.compress.folding import fold
from trtbuild.compress.metadata import write_metadata
from trtbuild.compress.request import Request
from trtbuild.compress.selection import Selection
from trtbuild.runtime.codes import unpack_int4
from trtbuild.weight_formats import is_packed_int4, is_solved

_CODES_IN_WORD = 8
_INT4_ZERO = 8
_TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def to_compressed_tensors(
    tensors: Mapping[str, torch.Tensor], formats: Mapping[str, str], folds: Iterable[tuple[str, str]]
) -> dict[str, torch.Tensor]:
    """The tensors of one decoder layer in this form, from those that ModelOpt exports.

    Args:
        tensors: By names in files.
        formats: The format of each coded layer.
        folds: (smoothed layer, layer before), where scales are moved.
    """
    made = dict(tensors)
    fold(made, folds)
    for layer, chosen in formats.items():
        if is_packed_int4(chosen):
            if is_solved(chosen):
                made.pop(f"{layer}.pre_quant_scale", None)  # ones, for TensorRT-LLM alone
            packed = made.pop(f"{layer}.weight")
            made[f"{layer}.weight_packed"] = pack_words(unpack_int4(packed))
            made[f"{layer}.weight_shape"] = torch.tensor([packed.shape[0] * 2, packed.shape[1]])
            # The type in which readers hold them: vLLM's kernels take scales of the model's type.
            made[f"{layer}.weight_scale"] = made[f"{layer}.weight_scale"].to(torch.bfloat16)
        else:
            for leaf in ("weight_scale", "input_scale"):
                made[f"{layer}.{leaf}"] = made[f"{layer}.{leaf}"].reshape(1)
    return made


def pack_words(codes: torch.Tensor) -> torch.Tensor:
    """Return int32 words [O, I/8] of int8 codes [O, I] in -8..7; I is a multiple of 8."""
    unsigned = (codes.to(torch.int32) + _INT4_ZERO).reshape(codes.shape[0], -1, _CODES_IN_WORD)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
    return (unsigned << shifts).sum(dim=-1).to(torch.int32)  # the sum is 64 bits wide; its lower half is the word


def write_compressed_config(selection: Selection, request: Request) -> None:
    """Write config.json and everything else that is not a tensor to the request's output."""
    layers: dict[str, list[str]] = defaultdict(list)
    for disk, chosen in selection.disk_formats.items():
        layers[chosen].append(disk)
    groups = {}
    for index, (chosen, names) in enumerate(sorted(layers.items())):
        targets = ["Linear"] if len(layers) == 1 else sorted(names)
        groups[f"group_{index}"] = {"targets": targets, **_scheme(chosen, request)}
    kinds = {str(group["format"]) for group in groups.values()}
    write_metadata(
        request,
        {
            "quant_method": "compressed-tensors",
            "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted(selection.uncompressed),
            "kv_cache_scheme": None,
        },
    )


def _scheme(name: str, request: Request) -> dict[str, Any]:
    if is_packed_int4(name):
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": request.group_size}
        return {
            "format": "pack-quantized",
            "weights": weights | {"symmetric": True, "dynamic": False},
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "format": "float-quantized",
        "weights": dict(_TENSOR),
        "input_activations": dict(_TENSOR),
        "output_activations": None,
    }
