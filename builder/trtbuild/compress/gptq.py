"""INT4 weights by GPTQ, together with SparseGPT where the recipe asks for both.

Scales are ModelOpt's (the range of each group, nvidia-modelopt 0.47.0), and so is what it exports. Without 2:4 the
codes are those of its own `gptq` in memory, one decoder layer after another (`layerwise`), bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from trtbuild.compress.columns import Grid
from trtbuild.compress.quantize import check_quantizers, insert_quantizers
from trtbuild.compress.request import Request
from trtbuild.compress.selection import Selection
from trtbuild.compress.solve import Solved, Task, solve

Run = Callable[[nn.Module], None]


def quantize_by_gptq(
    model: nn.Module, selection: Selection, request: Request, run: Run, *, layers: int, parts: list[str]
) -> Solved:
    """Quantize `model` in place; its quantizers are switched on afterwards.

    Args:
        model: The whole model, or one with a single decoder layer.
        selection: What of it is compressed.
        request: Says the group size, the KV cache and the sparsity.
        run: Puts the calibration text through the model once.
        layers: How many decoder layers the model has.
        parts: Prefixes of the names of the layers that are solved together, in their order in the model.

    Raises:
        CompatibilityError, ToolError: As `quantize.quantize`.
    """
    import modelopt.torch.quantization as mtq

    insert_quantizers(model, selection, request)
    mtq.calibrate(model, "max", run if request.kv_cache != "none" else None)
    check_quantizers(model, selection, request.kv_cache, layers=layers)
    task = Task(
        prune=request.joint,
        hold=request.sparse and not request.joint,
        grid_of=present_grid if request.joint else grid_of,
    )
    whole = Solved()
    for part in parts:
        chosen = {name: model.get_submodule(name) for name in selection.compressed if name.startswith(part)}
        for module in chosen.values():
            module.weight_quantizer.disable()
        solved = solve(chosen, lambda: run(model), task)
        for module in chosen.values():
            module.weight_quantizer.enable()
        whole.idle += solved.idle
        whole.errors |= solved.errors
    return whole


def grid_of(module: nn.Module) -> Grid:
    """The grid on which ModelOpt's weight quantizer of an INT4 layer puts its weights."""
    size: int = module.weight_quantizer.block_sizes[-1]
    ranges: torch.Tensor = module.weight_quantizer.amax.float().reshape(module.weight.shape[0], -1)
    return Grid(ranges, size)


def present_grid(module: nn.Module) -> Grid:
    """The same, for weights that have changed since it was calibrated."""
    quantizer = module.weight_quantizer
    size: int = quantizer.block_sizes[-1]
    ranges = module.weight.data.float().reshape(module.weight.shape[0], -1, size).abs().amax(dim=2)
    quantizer.amax = ranges.reshape(quantizer.amax.shape).to(quantizer.amax.dtype)
    return Grid(ranges, size)
