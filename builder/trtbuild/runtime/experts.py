"""Mixture-of-experts layers: one linear layer per projection and expert, and the names these have in files.

Transformers 5 keeps all experts of a layer in two 3-D parameters, while checkpoints on disk name every expert's
projection (transformers/conversion_mapping.py @5.14.1). Quantized experts have scales of their own, so we undo the
fusion; bf16 experts may stay fused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming, rename_source_key

from trtbuild.errors import CompatibilityError

# Leaves that belong to a quantized linear layer and follow its `weight` through every renaming.
SCALE_LEAVES = frozenset({"weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "k_scale", "v_scale"})
_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class UnfusedExperts(nn.ModuleList):
    """The experts of one layer as separate linear layers, with the routing of the fused class.

    Children are "0", "1", ...; each has `gate_proj`, `up_proj` (hidden to intermediate) and `down_proj`.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__(
            Expert(fused.gate_up_proj[index], fused.down_proj[index]) for index in range(fused.num_experts)
        )
        self.activate = fused.act_fn.__call__  # not the module itself, which this list would count as an expert
        self.num_experts = fused.num_experts

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of the chosen experts [T, hidden] for `top_k_index`, `top_k_weights` [T, k]."""
        out = torch.zeros_like(hidden_states)
        for index in torch.unique(top_k_index).tolist():
            if index >= self.num_experts:  # the sentinel of expert parallelism
                continue
            token, slot = torch.where(top_k_index == index)
            expert = self[index]
            x = hidden_states[token]
            y = expert.down_proj(self.activate(expert.gate_proj(x)) * expert.up_proj(x))
            out.index_add_(0, token, (y * top_k_weights[token, slot, None]).to(out.dtype))
        return out


class Expert(nn.Module):
    """One expert's three projections."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        middle = gate_up.shape[0] // 2
        self.gate_proj = _linear(gate_up[:middle])
        self.up_proj = _linear(gate_up[middle:])
        self.down_proj = _linear(down)

    # ModelOpt's export asks the experts of most classes for these names (modelopt/torch/export/layer_utils.py @0.47.0,
    # get_expert_linear_names).

    @property
    def w1(self) -> nn.Module:
        """The gate projection."""
        return self.gate_proj

    @property
    def w2(self) -> nn.Module:
        """The down projection."""
        return self.down_proj

    @property
    def w3(self) -> nn.Module:
        """The up projection."""
        return self.up_proj


def _linear(weight: torch.Tensor) -> nn.Linear:
    """A linear layer around `weight` [out, in] itself: no copy, also on the meta device."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of every module that keeps its experts in 3-D parameters."""
    for name, module in model.named_modules():
        down = getattr(module, "down_proj", None)
        if isinstance(down, nn.Parameter) and down.dim() == 3:
            yield name, module


def unfuse_experts(model: nn.Module) -> list[str]:
    """Replace every fused experts module by `UnfusedExperts` on the same weights; return their names.

    Raises:
        CompatibilityError: The class computes something else than act(gate) * up, has biases or transposed weights.
    """
    names = []
    for name, module in list(fused_experts(model)):
        _check_layout(name, module)
        model.set_submodule(name, UnfusedExperts(module))
        names.append(name)
    return names


def _check_layout(name: str, module: nn.Module) -> None:
    from transformers.integrations import moe

    gate = getattr(type(module), "_apply_gate", None)
    plain = (
        isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)
        and getattr(module, "has_gate", True)
        and getattr(module, "is_concatenated", True)
        and not getattr(module, "is_transposed", False)
        and not getattr(module, "has_bias", False)
        and (gate is None or gate is moe._default_apply_gate)  # noqa: SLF001
        and not any(True for _ in module.act_fn.parameters())
    )
    if not plain:
        raise CompatibilityError(
            f"{name}: experts of class {type(module).__name__} cannot be split into separate linear layers",
            "use format: none, or exclude the experts from compression",
        )


class DiskNames:
    """From the names of tensors in checkpoint files to the names in a model, experts as in `UnfusedExperts`."""

    def __init__(self, model: nn.Module) -> None:
        conversions = get_model_conversion_mapping(model)
        self._renamings = [item for item in conversions if isinstance(item, WeightRenaming)]
        self._converters = [item for item in conversions if isinstance(item, WeightConverter)]

    def in_model(self, name: str) -> str:
        """Return the model's name of tensor `name` of a file.

        Raises:
            CompatibilityError: Transformers converts this tensor in a way that we do not follow.
        """
        module, _, leaf = name.rpartition(".")
        if leaf in SCALE_LEAVES:
            return f"{self.in_model(f'{module}.weight').removesuffix('.weight')}.{leaf}"
        renamed, pattern = rename_source_key(name, self._renamings, self._converters)
        if pattern is None:
            return renamed
        converter = next(item for item in self._converters if pattern in item.source_patterns)
        container, _, fused = renamed.rpartition(".")
        projections = _PROJECTIONS.get(fused, ())
        numbers = re.findall(r"\.(\d+)(?=\.)", name)
        merged = any(isinstance(operation, MergeModulelist) for operation in converter.operations)
        if not merged or len(projections) != len(converter.source_patterns) or not numbers:
            raise CompatibilityError(
                f"{name}: this architecture's files need a conversion that trtbuild does not have",
                "report the architecture; every projection in a tensor of its own, or experts by name, are supported",
            )
        return f"{container}.{numbers[-1]}.{projections[converter.source_patterns.index(pattern)]}.weight"
