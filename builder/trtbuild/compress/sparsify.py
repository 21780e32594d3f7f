"""Prune linear layers to 2:4: at most two of four neighbouring weights along the input are not zero.

`sparsegpt` is the paper's whole algorithm, ours (`solve`, `columns`), and a least-squares fit after it: it chooses by
the Hessians of the layers' inputs which weights stay, and changes those. (ModelOpt 0.47's keeps the mask alone, from
activations of the dense model.)
`magnitude` is ModelOpt's (NVIDIA/Model-Optimizer, modelopt/torch/sparsity/weight_sparsity @0.47.0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from trtbuild.compress.selection import Selection
from trtbuild.compress.solve import Solved, Task, solve

PASSES = (("measure activations for 2:4", 2), ("run the changed layer", 1))


def sparsify_by_hessians(
    model: nn.Module, selection: Selection, run: Callable[[nn.Module], None], parts: Sequence[str]
) -> Solved:
    """Prune the selected layers of `model` in place by SparseGPT.

    Args:
        model: The whole model, or one with a single decoder layer; experts unfused.
        selection: Only its compressed layers are pruned.
        run: Puts the calibration text through the model once.
        parts: Prefixes of the names of the layers that are solved together, in their order in the model.
    """
    whole = Solved()
    for part in parts:
        layers = {name: model.get_submodule(name) for name in selection.compressed if name.startswith(part)}
        solved = solve(layers, lambda: run(model), Task(prune=True))
        whole.idle += solved.idle
        whole.errors |= solved.errors
    return whole


def sparsify_by_magnitude(model: nn.Module, selection: Selection) -> None:
    """Prune the selected layers of `model` in place: the two smallest of four go."""
    import modelopt.torch.sparsity as mts

    # In these rules None leaves a layer dense; later patterns win.
    rules: dict[str, dict[str, str] | None] = {"*": {}}
    rules.update(dict.fromkeys(selection.excluded))
    mts.sparsify(model, [("sparse_magnitude", {"nn.Linear": rules})], config={"verbose": False, "forward_loop": None})
    mts.export(model)


def experts_of(idle: Iterable[str]) -> list[str]:
    """The experts, or layers beside experts, to which idle linear layers belong."""
    return sorted({name.rpartition(".")[0] if ".experts." in name else name for name in idle})
