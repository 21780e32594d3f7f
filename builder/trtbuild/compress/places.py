"""Where every tensor of a model lies in the files of its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from trtbuild.errors import ArtifactError
from trtbuild.runtime.experts import DiskNames, UnfusedExperts
from trtbuild.safetensors_header import TensorInfo


@dataclass(frozen=True, slots=True)
class Part:
    """Where one tensor of the model lies: in a tensor of the files, from its element `first` on."""

    info: TensorInfo
    first: int = 0

    def fits(self, slot: torch.Tensor) -> bool:
        """Whether the tensor of the files, or one expert of it, has the shape of `slot`."""
        shape = self.info.shape
        of_experts = len(shape) == slot.dim() + 1 and shape[-1] == slot.shape[-1]
        return shape == tuple(slot.shape) or of_experts

    def is_whole(self, slot: torch.Tensor) -> bool:
        """Whether the tensor of the files is all of it `slot`'s."""
        return self.info.elements == slot.numel()


def locate(model: nn.Module, source: Mapping[str, TensorInfo]) -> tuple[dict[str, Part], list[str]]:
    """Where every tensor of the model lies, experts one by one; and the tensors of the files that have no place."""
    names = DiskNames(model)
    parts: dict[str, Part] = {}
    for name, info in source.items():
        place = names.in_model(name)
        if place in parts:
            raise ArtifactError(f"tensors {parts[place].info.name} and {name} are the same weight")
        parts[place] = Part(info)
    for name, module in model.named_modules():
        if isinstance(module, UnfusedExperts) and f"{name}.down_proj" in parts:
            gate_up, down = parts.pop(f"{name}.gate_up_proj").info, parts.pop(f"{name}.down_proj").info
            parts.update(_expert_parts(name, module.num_experts, gate_up, down))
    known = model.state_dict(keep_vars=True).keys()
    extra = sorted(part.info.name for place, part in parts.items() if place not in known)
    return {place: part for place, part in parts.items() if place in known}, extra


def _expert_parts(name: str, experts: int, gate_up: TensorInfo, down: TensorInfo) -> dict[str, Part]:
    """The projections of experts whose files keep them in two 3-D tensors, gate before up."""
    half, whole = gate_up.elements // experts // 2, down.elements // experts
    parts = {}
    for index in range(experts):
        parts[f"{name}.{index}.gate_proj.weight"] = Part(gate_up, 2 * index * half)
        parts[f"{name}.{index}.up_proj.weight"] = Part(gate_up, (2 * index + 1) * half)
        parts[f"{name}.{index}.down_proj.weight"] = Part(down, index * whole)
    return parts
