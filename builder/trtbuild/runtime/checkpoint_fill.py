"""Put the tensors of a checkpoint into a model that has no storage yet."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from trtbuild.errors import ArtifactError
from trtbuild.runtime.checkpoint_files import REBUILD, TensorSource
from trtbuild.runtime.experts import fused_experts
from trtbuild.runtime.linear import Form, Fp8Linear, Int4Linear

_SHOWN = 5


def replace_linear(
    model: nn.Module, layer: str, source: TensorSource, *, dtype: torch.dtype, form: Form, device: torch.device
) -> None:
    """Put our own layer, filled from the files, in the place of linear layer `layer`."""
    old = model.get_submodule(layer) if _exists(model, layer) else None
    if not isinstance(old, nn.Linear):
        raise ArtifactError(
            f"{layer}: the files hold quantized weights, but the model has no linear layer there", REBUILD
        )
    shape = (old.out_features, old.in_features)
    weight = _required(source, f"{layer}.weight", device)
    scale = _required(source, f"{layer}.weight_scale", device)
    bias = source.take(f"{layer}.bias")
    bias = None if bias is None else bias.to(device, dtype)
    if (old.bias is None) != (bias is None) or (bias is not None and bias.shape != old.bias.shape):
        raise ArtifactError(f"{layer}.bias: the files and the architecture disagree", REBUILD)
    new: nn.Module
    if weight.dtype == torch.float8_e4m3fn:
        input_scale = _required(source, f"{layer}.input_scale", device)
        positive_scale(f"{layer}.weight_scale", scale)
        positive_scale(f"{layer}.input_scale", input_scale)
        _check_shape(layer, tuple(weight.shape), shape)
        new = Fp8Linear(weight=weight, weight_scale=scale, input_scale=input_scale, bias=bias, dtype=dtype, form=form)
    else:
        _check_shape(layer, (weight.shape[0] * 2, weight.shape[1]), shape)
        groups = scale.shape[1] if scale.dim() == 2 else 0
        if scale.shape[:1] != shape[:1] or groups == 0 or shape[1] % groups:
            raise ArtifactError(f"{layer}.weight_scale: shape {list(scale.shape)} does not fit {list(shape)}", REBUILD)
        smooth = source.take(f"{layer}.pre_quant_scale")
        smooth = None if smooth is None else smooth.to(device)
        if smooth is not None and tuple(smooth.shape) != shape[1:]:
            raise ArtifactError(f"{layer}.pre_quant_scale: shape {list(smooth.shape)}, not {[shape[1]]}", REBUILD)
        new = Int4Linear(weight=weight, weight_scale=scale, pre_quant_scale=smooth, bias=bias, dtype=dtype, form=form)
    model.set_submodule(layer, new)


def _exists(model: nn.Module, layer: str) -> bool:
    try:
        model.get_submodule(layer)
    except AttributeError:
        return False
    return True


def _required(source: TensorSource, place: str, device: torch.device) -> torch.Tensor:
    tensor = source.take(place)
    if tensor is None:
        raise ArtifactError(f"{place}: missing from the files", REBUILD)
    return tensor.to(device)


def _check_shape(place: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise ArtifactError(f"{place}: shape {list(found)} in the files, {list(wanted)} in the model", REBUILD)


def fill(model: nn.Module, source: TensorSource, device: torch.device) -> None:
    """Give every remaining parameter and persistent buffer its tensor; tied weights share one."""
    _untie_if_different(model, source)
    tied = dict(model.all_tied_weights_keys)
    for name, module in fused_experts(model):
        _fill_experts(name, module, source, device)
    missing = []
    for place, slot in [(key, value) for key, value in model.state_dict(keep_vars=True).items() if value.is_meta]:
        tensor = source.take(place)
        if place in tied:
            continue
        if tensor is None:
            missing.append(place)
            continue
        _check_shape(place, tuple(tensor.shape), tuple(slot.shape))
        assign(model, place, slot, tensor.to(device, slot.dtype))
    refuse_unmatched(model, missing, [source.disk_name[place] for place in sorted(source.disk_name)])
    model.tie_weights()


def assign(model: nn.Module, place: str, slot: torch.Tensor, value: torch.Tensor) -> None:
    """Put `value` where `slot`, a parameter or a buffer of the dotted name `place`, is in `model`."""
    owner, _, leaf = place.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(slot, nn.Parameter):
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    else:
        module.register_buffer(leaf, value)


def _fill_experts(name: str, module: nn.Module, source: TensorSource, device: torch.device) -> None:
    """Copy per-expert tensors of the files into the 3-D parameters of a fused class, one slice each."""
    if f"{name}.down_proj" in source.disk_name:  # the files are fused too
        return
    experts, double, _ = module.gate_up_proj.shape
    gate_up = torch.empty(module.gate_up_proj.shape, dtype=module.gate_up_proj.dtype, device=device)
    down = torch.empty(module.down_proj.shape, dtype=module.down_proj.dtype, device=device)
    for index in range(experts):
        slices = {
            "gate_proj": gate_up[index, : double // 2],
            "up_proj": gate_up[index, double // 2 :],
            "down_proj": down[index],
        }
        for projection, target in slices.items():
            place = f"{name}.{index}.{projection}.weight"
            tensor = _required(source, place, torch.device("cpu"))
            _check_shape(place, tuple(tensor.shape), tuple(target.shape))
            target.copy_(tensor)
    module.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
    module.down_proj = nn.Parameter(down, requires_grad=False)


def _untie_if_different(model: nn.Module, source: TensorSource) -> None:
    """Keep both weights of a pair that the config ties but the files hold with different values."""
    for target, original in dict(model.all_tied_weights_keys).items():
        names = [source.disk_name.get(place) for place in (target, original)]
        if None not in names and not torch.equal(*(source.files.tensor(cast("str", name)) for name in names)):
            model.config.tie_word_embeddings = False
            del model.all_tied_weights_keys[target]
            owner, _, leaf = target.rpartition(".")
            module = model.get_submodule(owner)
            module.register_parameter(leaf, nn.Parameter(torch.empty_like(getattr(module, leaf))))


def refuse_unmatched(model: nn.Module, missing: list[str], extra: list[str]) -> None:
    """Raise for places without a tensor and tensors without a place, less what the class itself says to ignore.

    Raises:
        ArtifactError: Names them: places of the model in `missing`, tensors of the files in `extra`.
    """
    absent = _not_ignored(missing, model._keys_to_ignore_on_load_missing)  # noqa: SLF001
    if absent:
        raise ArtifactError(f"{_some(absent)} missing from the files", REBUILD)
    # Old checkpoints carry the rotary table, which every class computes by itself.
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]  # noqa: SLF001
    unknown = _not_ignored(extra, patterns)
    if unknown:
        raise ArtifactError(f"{_some(unknown)} in the files, but not in {type(model).__name__}", REBUILD)


def _not_ignored(names: list[str], patterns: Any) -> list[str]:
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns or ())]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def restore_buffers(model: nn.Module, device: torch.device) -> None:
    """Compute the tables that no file holds (rotary frequencies, embedding scales) as the class itself does."""
    restore_tables(model, model.modules(), device)
    left = [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]
    if left:
        raise ArtifactError(f"{_some(left)} could not be filled from the files", REBUILD)


def restore_tables(model: nn.Module, modules: Iterable[nn.Module], device: torch.device) -> None:
    """The same for some `modules` of `model`, whatever else is still without storage."""
    for module in modules:
        lost = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if not lost:
            continue
        for name in lost:
            value = torch.empty_like(getattr(module, name), device=device)
            module.register_buffer(name, value, persistent=name not in module._non_persistent_buffers_set)  # noqa: SLF001
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # noqa: SLF001  keeps `_init_weights` away from what is loaded
        model._init_weights(module)  # noqa: SLF001


def positive_scale(place: str, tensor: torch.Tensor | None) -> float:
    """Return the value of the one-element scale `tensor`; ArtifactError unless it is positive and finite."""
    value = float("nan") if tensor is None or tensor.numel() != 1 else float(tensor)
    if not 0 < value < float("inf"):
        raise ArtifactError(f"{place}: a scale must be one positive finite number", REBUILD)
    return value
