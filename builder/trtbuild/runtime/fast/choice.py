"""Whether the fast path takes a model, and the reason where it does not."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trtbuild.runtime.attention import LayerCall
from trtbuild.runtime.linear import CodedLinear, Fp8Linear
from trtbuild.runtime.numerics import NUMERICS

# Decoders of one shape: RMSNorm, rotary positions over whole heads, grouped-query attention, gated MLP with SiLU, the
# same names inside. Other classes need a look at their code first.
CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_CAPABILITY = (8, 0)  # bfloat16 products
_FP8_CAPABILITY = (8, 9)  # conversions from and to E4M3
_HEAD_SIZES = (32, 64, 128, 256)
_GROUPS = (32, 64, 128)
_FUSED = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))
_ALONE = (("self_attn", "o_proj"), ("mlp", "down_proj"))


def why_general(
    model: nn.Module, calls: Sequence[LayerCall], *, device: torch.device, dtype: torch.dtype, cache: str | None
) -> str | None:
    """The reason why `model` runs on the general path, or None: the fast path takes it."""
    return (
        _host_reason(device, dtype)
        or _class_reason(model, calls)
        or _weights_reason(model)
        or _cache_reason(cache)
        or _capability_reason(model, device, fp8_cache=cache == "fp8")
    )


def _host_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"the device is {device}"
    if dtype != torch.bfloat16:
        return f"compute_dtype is {str(dtype).removeprefix('torch.')}, and the kernels compute in bfloat16"
    if importlib.util.find_spec("triton") is None:
        return "the package triton (the language, not the server) is not installed"
    if not (os.environ.get("CC") or any(shutil.which(name) for name in ("gcc", "clang", "cc"))):
        return "there is no C compiler, which the Triton language needs to start its kernels"
    return None


def _class_reason(model: nn.Module, calls: Sequence[LayerCall]) -> str | None:
    kind, config = type(model), _config(model)
    if kind.__name__ not in CLASSES or not kind.__module__.startswith("transformers.models."):
        return f"{kind.__name__} is not one of {', '.join(CLASSES)}"
    if config.hidden_act not in ("silu", "swish"):
        return f"hidden_act is {config.hidden_act}, not silu"
    if any(call.softcap is not None or call.has_sinks for call in calls):
        return "its attention caps scores or has sinks"
    sizes = {size for call in calls for size in (call.key_shape[1], call.value_shape[1])}
    if len(sizes) != 1 or not sizes <= set(_HEAD_SIZES):
        return f"its head size is {sorted(sizes)}, not one of {_HEAD_SIZES}"
    return None


def _weights_reason(model: nn.Module) -> str | None:
    root: Any = model
    if type(root.lm_head) is not nn.Linear or root.lm_head.bias is not None:
        return "its head is quantized or has a bias"
    for index, layer in enumerate(root.model.layers):
        for block, names in (*_FUSED, *((block, (name,)) for block, name in _ALONE)):
            modules = [getattr(getattr(layer, block), name) for name in names]
            reason = _fusing_reason(modules)
            if reason:
                return f"{block}.{'/'.join(names)} of layer {index} {reason}"
    return None


def _fusing_reason(modules: list[nn.Module]) -> str | None:
    """Why `modules`, which read the same input, cannot be one matrix."""
    if all(type(module) is nn.Linear for module in modules):
        return None
    if all(isinstance(module, CodedLinear) and module.numerics is NUMERICS["W4A16_AWQ"] for module in modules):
        return _int4_reason(modules)
    return _fp8_reason(modules)


def _fp8_reason(modules: list[nn.Module]) -> str | None:
    if not all(isinstance(module, Fp8Linear) for module in modules):
        return "is of a format without a kernel here"
    if any(module.form != "packed" for module in modules):
        return "is expanded (weights: expanded)"
    if any(side % 16 for module in modules for side in module.weight.shape):
        return "has sides that are no multiples of 16"
    for name in ("input_scale", "weight_scale"):
        if len({float(getattr(module, name)) for module in modules}) > 1:
            return f"has a different {name} in each part"
    return None


def _int4_reason(modules: list[nn.Module]) -> str | None:
    found: list[Any] = modules
    if any(module.form != "packed" for module in found):
        return "is expanded (weights: expanded)"
    groups = {module.in_features // module.weight_scale.shape[1] for module in found}
    if len(groups) != 1 or not groups <= set(_GROUPS):
        return f"has groups of {sorted(groups)} inputs, not one of {_GROUPS}"
    scales = [module.pre_quant_scale for module in found]
    same = all((one is None) == (scales[0] is None) and (one is None or one.equal(scales[0])) for one in scales)
    return None if same else "has a different pre_quant_scale in each part"


def _cache_reason(cache: str | None) -> str | None:
    """The kernels read bfloat16 and E4M3."""
    return None if cache in (None, "fp8") else f"its KV cache is {cache}"


def _capability_reason(model: nn.Module, device: torch.device, *, fp8_cache: bool) -> str | None:
    found = torch.cuda.get_device_capability(device)
    if found < _CAPABILITY:
        return f"the GPU's compute capability is {found[0]}.{found[1]}, below 8.0"
    fp8 = fp8_cache or any(isinstance(module, Fp8Linear) for module in model.modules())
    if fp8 and found < _FP8_CAPABILITY:
        return f"the GPU's compute capability is {found[0]}.{found[1]}, and FP8 needs 8.9"
    return None


def _config(model: nn.Module) -> Any:
    return model.config
