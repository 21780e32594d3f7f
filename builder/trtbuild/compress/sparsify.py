"""Prune linear layers to 2:4: at most two of four neighbouring weights along the input are not zero.

Method: NVIDIA/Model-Optimizer, modelopt/torch/sparsity/weight_sparsity @0.47.0. Its SparseGPT chooses which weights
stay by the Hessian of the layer's input, and leaves the values of those that stay as they are.
"""

from __future__ import annotations

from torch import nn

from trtbuild.compress.calibrate import Loop, count_expert_tokens, idle_experts
from trtbuild.compress.request import Request
from trtbuild.compress.selection import Selection

_MODES = {"sparsegpt": "sparsegpt", "magnitude": "sparse_magnitude"}


def sparsify(model: nn.Module, selection: Selection, request: Request, loop: Loop | None) -> list[str]:
    """Prune the selected layers of `model` in place; return experts that had to be pruned by magnitude.

    Args:
        model: Experts unfused.
        selection: Only its compressed layers are pruned.
        request: Says the method.
        loop: Runs the calibration text; needed by sparsegpt only.
    """
    import modelopt.torch.sparsity as mts

    # In these rules None leaves a layer dense; later patterns win.
    rules: dict[str, dict[str, str] | None] = {"*": {}}
    rules.update(dict.fromkeys(selection.excluded))
    mode = _MODES[request.sparsity_method]
    with count_expert_tokens(model) as counts:
        mts.sparsify(model, [(mode, {"nn.Linear": rules})], config={"verbose": False, "forward_loop": loop})
    idle = idle_experts(counts) if loop is not None else []
    for name in idle:
        _prune_by_magnitude(model.get_submodule(name))
    mts.export(model)
    return idle


def _prune_by_magnitude(expert: nn.Module) -> None:
    """Give an expert without calibration tokens another mask: its Hessian is zero, which prunes every weight."""
    from modelopt.torch.sparsity.weight_sparsity.magnitude import create_asp_mask
    from modelopt.torch.sparsity.weight_sparsity.module import SparseModule

    for layer in expert.modules():
        if isinstance(layer, SparseModule) and layer.is_sparse:
            layer.set_mask(None)
            layer.set_mask(create_asp_mask(layer.weight, "2:4 sparsity"))
