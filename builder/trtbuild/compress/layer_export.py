"""The tensors of one compressed decoder layer, in the form that the request wants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from trtbuild.compress import folding
from trtbuild.compress.blocks import rounded_type
from trtbuild.compress.compressed_tensors import to_compressed_tensors
from trtbuild.compress.selection import Selection
from trtbuild.compress.skeleton import Skeleton
from trtbuild.errors import CompatibilityError


def export_layer(
    frame: nn.Module, layer: str, selection: Selection, folds: Mapping[str, str] | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors by names in files, and what the journal keeps: for ModelOpt's config, and layers without smoothing.

    Args:
        frame: A model with one decoder layer, quantized; it cannot be used afterwards.
        layer: The layer's name.
        selection: Of this layer.
        folds: What `folding.exact_folds` found, where the form has no smoothing scales; None for ModelOpt's form.
    """
    from trtbuild.compress.export import export_frame

    undone = [] if folds is None else folding.unsmooth(frame, selection, folds)
    with torch.no_grad():
        exported = export_frame(frame, layer, selection)
        found: dict[str, Any] = {"layers": exported.layers, "kv_cache": exported.kv_cache}
        if folds is None:
            return exported.tensors, found
        disk = selection.compressed
        pairs = [(disk[name], disk[before]) for name, before in folds.items()]
        tensors = to_compressed_tensors(exported.tensors, selection.disk_formats, pairs)
    return tensors, found | {"unsmoothed": [disk[name] for name in undone]}


def plain_tensors(skeleton: Skeleton, name: str, layer: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the layer `name` that is not quantized, by names in files, in the types in which they are kept.

    Raises:
        CompatibilityError: The source holds its experts in one tensor.
    """
    tensors = {}
    for leaf, value in layer.state_dict().items():
        info = skeleton.parts[f"{name}.{leaf}"].info
        if info.name in tensors or info.elements != value.numel():
            raise CompatibilityError(
                f"{info.name} holds all experts of a layer, which 2:4 without a format cannot write yet",
                "choose a compress.format too",
            )
        tensors[info.name] = value.to(rounded_type(info))
    return tensors
