"""Compress a model that is held in memory as a whole: what cannot be done layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from trtbuild.compress.calibrate import calibration_loop, count_expert_tokens, idle_experts, layer_list
from trtbuild.compress.copying import copy_checkpoint
from trtbuild.compress.request import Meter, Request
from trtbuild.compress.selection import Selection, select
from trtbuild.compress.solve import Solved
from trtbuild.compress.source import load_source, pick_device
from trtbuild.safetensors_header import TensorInfo


def compress_whole(
    request: Request,
    source: Mapping[str, TensorInfo],
    ids: Sequence[Sequence[int]],
    meter: Meter,
    phase: Callable[[str], AbstractContextManager[None]],
) -> tuple[Selection, list[str], dict[str, float]]:
    """Prune and quantize the model and write it.

    Return the selection, the experts that no token reached, and what SparseGPT or GPTQ cost every linear layer.

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
    idle: list[str] = []
    solved = Solved()
    if request.sparse and not request.joint:
        with phase("sparsify"):
            solved = _sparsify(model, selection, request, ids, meter)
    if request.quantized:
        from trtbuild.compress.export import export

        with phase("quantize"):
            if request.solved:
                solved = _solve(model, selection, request, ids, meter)
            else:
                idle += _quantize(model, selection, request, ids, meter)
        with phase("export"):
            meter.advance(1, "write the checkpoint")
            export(model, selection, request)
    else:
        with phase("export"):
            copy_checkpoint(request, source, meter, _weights(model, selection))
    from trtbuild.compress.sparsify import experts_of

    errors = {selection.compressed[name]: error for name, error in solved.errors.items()}
    return selection, idle + experts_of(solved.idle), errors


def parts(model: nn.Module, selection: Selection) -> list[str]:
    """Prefixes of the names of the layers that are solved together: the decoder layers, then what lies outside them.

    The calibration text goes through the whole model for each, so that each sees its finished predecessors.
    """
    found = layer_list(model)
    inside = [f"{found[0]}.{index}." for index in range(len(found[1]))] if found else []
    return inside + [name for name in selection.compressed if not name.startswith(tuple(inside))]


def _sparsify(
    model: nn.Module, selection: Selection, request: Request, ids: Sequence[Sequence[int]], meter: Meter
) -> Solved:
    from trtbuild.compress import sparsify

    if not request.by_hessians:
        sparsify.sparsify_by_magnitude(model, selection)
        return Solved()
    run = calibration_loop(ids, meter, sparsify.PASSES)
    return sparsify.sparsify_by_hessians(model, selection, run, parts(model, selection))


def _solve(
    model: nn.Module, selection: Selection, request: Request, ids: Sequence[Sequence[int]], meter: Meter
) -> Solved:
    from trtbuild.compress.gptq import quantize_by_gptq
    from trtbuild.compress.quantize import GPTQ_PASSES

    run = calibration_loop(ids, meter, GPTQ_PASSES)
    layers: int = model.config.get_text_config().num_hidden_layers
    return quantize_by_gptq(model, selection, request, run, layers=layers, parts=parts(model, selection))


def _quantize(
    model: nn.Module, selection: Selection, request: Request, ids: Sequence[Sequence[int]], meter: Meter
) -> list[str]:
    """Return the experts that no calibration token reached."""
    from trtbuild.compress.mixed import passes, quantize_layers

    steps = passes(request, selection)
    run = calibration_loop(ids, meter, steps) if steps else None
    layers: int = model.config.get_text_config().num_hidden_layers
    with count_expert_tokens(model) as counts:
        quantize_layers(model, selection, request, run, layers=layers)
    return idle_experts(counts) if run is not None else []


def _weights(model: nn.Module, selection: Selection) -> dict[str, torch.Tensor]:
    """The selected layers' weights, by their names in files."""
    return {f"{disk}.weight": model.get_submodule(name).weight.detach() for name, disk in selection.compressed.items()}
