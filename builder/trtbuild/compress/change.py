"""Prune and quantize one decoder layer, and store the states behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from trtbuild.compress.passes import LayerLoop
from trtbuild.compress.request import Request
from trtbuild.compress.selection import Selection
from trtbuild.compress.solve import Solved


class Loops(Protocol):
    """Makes what runs the samples through the layer; `kept` says whether the states behind it are stored."""

    def __call__(self, passes: Sequence[tuple[str, int]], *, kept: bool = True) -> LayerLoop:
        """The loop for these passes."""


def change_layer(
    frame: nn.Module, name: str, selection: Selection, request: Request, loops: Loops, *, last: bool
) -> dict[str, float]:
    """Change the decoder layer `name` of `frame` in place.

    Behind a layer that SparseGPT or GPTQ changed, the states are those of the changed layer; where ModelOpt calibrates
    afterwards, its first pass stores them.

    Args:
        frame: A model with this layer alone.
        name: The layer's name.
        selection: Of this layer.
        request: What to do.
        loops: Runs the samples.
        last: No layer follows, and no states are stored.

    Returns:
        What pruning and rounding by Hessians cost every linear layer, by its name in files.
    """
    from trtbuild.compress import sparsify

    solved = Solved()
    if request.sparse and not request.by_hessians:
        sparsify.sparsify_by_magnitude(frame, selection)
    if request.by_hessians and not request.joint:
        solved = sparsify.sparsify_by_hessians(frame, selection, loops(sparsify.PASSES[:1], kept=False), [name])
        if not (request.reads_text or last):
            loops(sparsify.PASSES[1:]).finish()
    if request.solved:
        from trtbuild.compress.gptq import quantize_by_gptq
        from trtbuild.compress.quantize import GPTQ_PASSES

        run = loops(GPTQ_PASSES[:1], kept=False)
        solved = quantize_by_gptq(frame, selection, request, run, layers=1, parts=[name])
        if not last:
            loops(GPTQ_PASSES[1:]).finish()
    elif request.quantized:
        _quantize(frame, selection, request, loops)
    return {selection.compressed[module]: error for module, error in solved.errors.items()}


def _quantize(frame: nn.Module, selection: Selection, request: Request, loops: Loops) -> None:
    from trtbuild.compress.mixed import layer_passes, quantize_layers

    loop = loops(layer_passes(request, selection)) if request.reads_text else None
    quantize_layers(frame, selection, request, loop, layers=1)
    if loop is not None:
        loop.finish()
