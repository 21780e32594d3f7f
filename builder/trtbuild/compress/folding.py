"""Smoothing scales that no layer can apply at run time: put into what comes before, where that is exact.

ModelOpt's exporter puts the scales of layers behind a norm into the norm's weight. The other inputs of a decoder layer
are products of a layer before, channel by channel: of `up_proj` for `down_proj`, of `v_proj` for `o_proj` where every
query head has its own values. Whether a class really is like that is found out by trying it on the layer itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from trtbuild.compress.selection import Selection
from trtbuild.weight_formats import is_smoothed

_BEFORE: Mapping[str, str] = {"down_proj": "up_proj", "o_proj": "v_proj"}
_SHOWN = 5
_CLOSE = 1e-4  # relative; scaling by powers of two changes nothing at all where sums are taken in the same order


def exact_folds(frame: nn.Module, selection: Selection) -> dict[str, str]:
    """For each smoothed layer whose scales the layer before can take up exactly, that layer; names in the model.

    Both must be coded in a format that is searched for smoothing scales: a row of such a layer is scaled by its scales
    alone, and its codes stay as they are.

    Args:
        frame: A model with one decoder layer, not quantized yet, whose `forward` runs it on a few tokens.
        selection: Of this layer.
    """
    smoothed = {name for name, chosen in selection.formats.items() if is_smoothed(chosen)}
    folds: dict[str, str] = {}
    for leaf, before in _BEFORE.items():
        pairs = {}
        for name in smoothed:
            parent, _, last = name.rpartition(".")
            if last == leaf and f"{parent}.{before}" in smoothed and _fit(frame, name, f"{parent}.{before}"):
                pairs[name] = f"{parent}.{before}"
        if pairs and _is_exact(frame, pairs):
            folds |= pairs
    return folds


def unsmooth(frame: nn.Module, selection: Selection, folds: Mapping[str, str]) -> list[str]:
    """Undo the smoothing of layers whose scales can go nowhere, and round their weights again; return their names.

    Args:
        frame: A model with one decoder layer, quantized by `quantize_layers`.
        selection: Of this layer.
        folds: What `exact_folds` found.
    """
    from modelopt.torch.export.unified_export_hf import collect_shared_input_modules
    from modelopt.torch.quantization.model_calib import disable_pre_quant_scale_and_resmooth

    inputs, norms = collect_shared_input_modules(frame, frame.forward, collect_layernorms=True)
    behind_norm = {id(module) for tensor, modules in inputs.items() if tensor in (norms or ()) for module in modules}
    undone = []
    for name, chosen in sorted(selection.formats.items()):
        layer: Any = frame.get_submodule(name)
        if is_smoothed(chosen) and name not in folds and id(layer) not in behind_norm:
            if layer.input_quantizer.pre_quant_scale is not None:
                disable_pre_quant_scale_and_resmooth(layer, delete_pre_quant_scale=True)
            undone.append(name)
    return undone


def fold(tensors: dict[str, torch.Tensor], pairs: Iterable[tuple[str, str]]) -> None:
    """Move smoothing scales into the group scales and the bias of the layer before, in place.

    Args:
        tensors: One decoder layer as ModelOpt exports it.
        pairs: (smoothed layer, layer before) by names in files.
    """
    for name, before in pairs:
        smooth = tensors.pop(f"{name}.pre_quant_scale", None)
        if smooth is None:
            continue
        for leaf in ("weight_scale", "bias"):
            scaled = tensors.get(f"{before}.{leaf}")
            if scaled is not None:
                rows = smooth.float().reshape(-1, *[1] * (scaled.dim() - 1))
                tensors[f"{before}.{leaf}"] = (scaled.float() * rows).to(scaled.dtype)


def smoothing_notes(undone: Iterable[str], selection: Selection) -> list[str]:
    """What the result says of layers without smoothing, by their names in files."""
    names = sorted(set(undone))
    if not names:
        return []
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    of_all = f"{len(names)} of {len(selection.formats)} layers"
    return [f"{of_all} have no smoothing, since nothing before them takes up the scales exactly: {shown}"]


def _fit(frame: nn.Module, name: str, before: str) -> bool:
    rows: int = frame.get_submodule(before).weight.shape[0]
    columns: int = frame.get_submodule(name).weight.shape[1]
    return rows == columns


def _is_exact(frame: nn.Module, pairs: Mapping[str, str]) -> bool:
    """Scale rows of the layers before by powers of two and columns of these by the inverse, run, and undo it."""
    with torch.no_grad():
        expected = frame.forward()
        _scale(frame, pairs, 1)
        found = frame.forward()
        _scale(frame, pairs, -1)
    return torch.allclose(expected, found, rtol=_CLOSE, atol=_CLOSE * float(expected.abs().max()))


def _scale(frame: nn.Module, pairs: Mapping[str, str], sign: int) -> None:
    for name, before in pairs.items():
        layer, first = frame.get_submodule(name), frame.get_submodule(before)
        channels = torch.arange(layer.weight.shape[1], device=layer.weight.device)
        factors = torch.exp2((sign * (channels * 7 % 5 - 2)).to(layer.weight.dtype))
        layer.weight.div_(factors)
        first.weight.mul_(factors[:, None])
        if first.bias is not None:
            first.bias.mul_(factors)
