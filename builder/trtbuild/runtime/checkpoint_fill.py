"""Put the tensors of a checkpoint into a model that has no storage yet."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from trtbuild.errors import ArtifactError
from trtbuild.runtime.checkpoint_files import FP8, REBUILD, TensorSource
from trtbuild.runtime.codes import E8M0_NAN
from trtbuild.runtime.experts import fused_experts
from trtbuild.runtime.linear import CodedLinear, Form, Fp8Linear
from trtbuild.runtime.numerics import GROUP_SIZES, NUMERICS, ONE, ROWS, TILE, TILES

_SHOWN = 5


def replace_linear(
    model: nn.Module, layer: str, algorithm: str, source: TensorSource, *, dtype: torch.dtype, form: Form,
    device: torch.device,
) -> None:  # fmt: skip
    """Put our own layer, filled from the files, in the place of linear layer `layer`, which is coded as `algorithm`."""
    old = model.get_submodule(layer) if _exists(model, layer) else None
    if not isinstance(old, nn.Linear):
        raise ArtifactError(
            f"{layer}: the files hold quantized weights, but the model has no linear layer there", REBUILD
        )
    stored = _stored(layer, algorithm, (old.out_features, old.in_features), source, device)
    bias = source.take(f"{layer}.bias")
    bias = None if bias is None else bias.to(device, dtype)
    if (old.bias is None) != (bias is None) or (bias is not None and bias.shape != old.bias.shape):
        raise ArtifactError(f"{layer}.bias: the files and the architecture disagree", REBUILD)
    if algorithm == FP8:
        new: nn.Module = Fp8Linear(bias=bias, dtype=dtype, form=form, **stored)
    else:
        new = CodedLinear(numerics=NUMERICS[algorithm], stored=stored, bias=bias, dtype=dtype, form=form)
    model.set_submodule(layer, new)


def _stored(
    layer: str, algorithm: str, shape: tuple[int, int], source: TensorSource, device: torch.device
) -> dict[str, torch.Tensor]:
    """The tensors of a coded layer [O, I] by their last names, each of the right shape and with usable values."""
    numerics = NUMERICS[algorithm]
    weight = _required(source, f"{layer}.weight", device)
    rows, columns = weight.shape
    _check_shape(layer, (rows * numerics.rows, columns * numerics.columns), shape)
    stored = {"weight": weight}
    for name, lies in numerics.scales.items():
        place = f"{layer}.{name}"
        scale = _required(source, place, device)
        if not _fits(scale, lies, shape, GROUP_SIZES.get(algorithm)):
            raise ArtifactError(f"{place}: shape {list(scale.shape)} does not fit {list(shape)}", REBUILD)
        _check_scale(place, scale, lies)
        stored[name] = scale
    if numerics.input_scale:
        stored["input_scale"] = _required(source, f"{layer}.input_scale", device)
        positive_scale(f"{layer}.input_scale", stored["input_scale"])
    smooth = source.take(f"{layer}.pre_quant_scale") if numerics.smoothed else None
    if smooth is not None:
        if tuple(smooth.shape) != shape[1:]:
            raise ArtifactError(f"{layer}.pre_quant_scale: shape {list(smooth.shape)}, not {[shape[1]]}", REBUILD)
        stored["pre_quant_scale"] = smooth.to(device)
    return stored


def _fits(scale: torch.Tensor, lies: str, shape: tuple[int, int], group: int | None) -> bool:
    """Whether the scales of a matrix [O, I] have the shape that their format gives them."""
    out, into = shape
    found = tuple(scale.shape)
    if lies == ONE:
        return True  # `positive_scale` counts
    if lies == ROWS:
        return found == (out,)
    if lies == TILES:
        tiles = (out // TILE, 1, into // TILE, 1)
        return not (out % TILE or into % TILE) and (found == tiles or (found == () and tiles == (1, 1, 1, 1)))
    groups = found[1] if len(found) == 2 else 0
    return found[:1] == (out,) and groups > 0 and into % groups == 0 and (group is None or into // groups == group)


def _check_scale(place: str, scale: torch.Tensor, lies: str) -> None:
    """One positive finite number, or many."""
    if lies == ONE:
        positive_scale(place, scale)
    elif scale.dtype == torch.uint8:  # powers of two
        if bool((scale == E8M0_NAN).any()):
            raise ArtifactError(f"{place}: scales must be finite", REBUILD)
    elif not bool((torch.isfinite(scale.float()) & (scale.float() > 0)).all()):
        raise ArtifactError(f"{place}: scales must be positive and finite", REBUILD)


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
