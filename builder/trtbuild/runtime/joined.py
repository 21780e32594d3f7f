"""The scales of projections that other engines join into one layer, brought together as those engines do at load.

A joined FP8 layer has one weight scale: the largest of its parts, to which the codes of the others are quantized again.
TensorRT engines do it in float32 (NVIDIA/TensorRT-LLM, tensorrt_llm/quantization/layers.py, FP8Linear.postprocess and
models/modeling_utils.py, fuse_gate_mlp @34a267279384), the LLM API with every intermediate result in the model's type
(tensorrt_llm/_torch/modules/linear.py @ed53795b33fc, FP8QDQLinearMethod, and fused_moe/quantization.py @a98a9061d72f).
Both have one input scale for all experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from trtbuild.runtime.experts import UnfusedExperts
from trtbuild.runtime.linear import Fp8Linear

_ATTENTION = ("q_proj", "k_proj", "v_proj")
_GATED = ("gate_proj", "up_proj")
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedScales:
    """What is joined: query, key and value, and gate and up of experts, where `layers` says so.

    Args:
        layers: weight scales at all; other formats than FP8 have none that could differ.
        gate_up: gate and up of other layers too.
        kv_cache: keys and values are stored with the larger of their scales.
        intermediate: the type of intermediate results, "float32" or "bfloat16".
    """

    gate_up: bool
    kv_cache: bool
    intermediate: str
    layers: bool = True


def join_scales(model: nn.Module, joined: JoinedScales) -> int:
    """Bring the scales of `model` together and return how many layers changed."""
    kind, changed = _TYPES[joined.intermediate], 0
    if not joined.layers:
        return 0
    for module in model.modules():
        changed += _join(module, _ATTENTION, kind)
        if isinstance(module, UnfusedExperts):
            changed += sum(_join(expert, _GATED, kind) for expert in module)
            _share_input([getattr(expert, name) for expert in module for name in _GATED])
            _share_input([expert.down_proj for expert in module])
        elif joined.gate_up:
            changed += _join(module, _GATED, kind)
    return changed


def join_kv_scales(scales: dict[int, tuple[float, float]]) -> dict[int, tuple[float, float]]:
    """For each layer the larger of both scales, twice."""
    return {index: (max(pair), max(pair)) for index, pair in scales.items()}


def _join(module: nn.Module, names: Sequence[str], kind: torch.dtype) -> int:
    """Bring the named projections of `module` to their largest weight scale; one that is no FP8 is left, with all."""
    layers = [layer for name in names if isinstance(layer := getattr(module, name, None), Fp8Linear)]
    if len(layers) < len(names):
        return 0
    _share_input(layers)
    largest = max(layer.weight_scale.float() for layer in layers)
    changed = 0
    for layer in layers:
        scale = layer.weight_scale.float()
        if scale != largest or kind != torch.float32:
            codes = ((layer.weight.to(kind) * scale) / largest).to(torch.float8_e4m3fn)
            layer.weight.copy_(codes.to(layer.weight.dtype))
        changed += bool(scale != largest)
        layer.weight_scale.copy_(largest)
    return changed


def _share_input(layers: Sequence[nn.Module]) -> None:
    """Give FP8 layers the largest of their input scales."""
    coded = [layer for layer in layers if isinstance(layer, Fp8Linear)]
    if coded:
        largest = max(layer.input_scale for layer in coded)
        for layer in coded:
            layer.input_scale.copy_(largest)
