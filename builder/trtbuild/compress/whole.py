"""Compress a model that is held in memory as a whole: what cannot be done layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from trtbuild.compress.calibrate import calibration_loop
from trtbuild.compress.copying import copy_checkpoint
from trtbuild.compress.request import Meter, Request
from trtbuild.compress.selection import Selection, select
from trtbuild.compress.source import load_source, pick_device
from trtbuild.safetensors_header import TensorInfo

SPARSEGPT_PASSES = (("measure activations for 2:4", 2),)


def compress_whole(
    request: Request,
    source: Mapping[str, TensorInfo],
    ids: Sequence[Sequence[int]],
    meter: Meter,
    phase: Callable[[str], AbstractContextManager[None]],
) -> tuple[Selection, list[str]]:
    """Prune and quantize the model and write it; return the selection and the experts that no token reached.

    Args:
        request: What to do.
        source: The tensors of the source.
        ids: The calibration samples.
        meter: Told how far the work has come.
        phase: Measures what happens inside, by a name.
    """
    with phase("load"):
        model = load_source(request, pick_device(request.device))
        selection = select(model, source, request)
    layers: int = model.config.get_text_config().num_hidden_layers
    idle: list[str] = []
    if request.sparse:
        from trtbuild.compress import sparsify

        with phase("sparsify"):
            loop = calibration_loop(ids, meter, SPARSEGPT_PASSES) if request.sparsity_method == "sparsegpt" else None
            idle += sparsify.sparsify(model, selection, request, loop)
    if request.quantized:
        from trtbuild.compress.export import export
        from trtbuild.compress.mixed import passes, quantize_layers

        with phase("quantize"):
            steps = passes(request, selection)
            run = calibration_loop(ids, meter, steps) if steps else None
            idle += quantize_layers(model, selection, request, run, layers=layers)
        with phase("export"):
            meter.advance(1, "write the checkpoint")
            export(model, selection, request)
    else:
        with phase("export"):
            copy_checkpoint(request, source, meter, _weights(model, selection))
    return selection, idle


def _weights(model: nn.Module, selection: Selection) -> dict[str, torch.Tensor]:
    """The selected layers' weights, by their names in files."""
    return {f"{disk}.weight": model.get_submodule(name).weight.detach() for name, disk in selection.compressed.items()}
