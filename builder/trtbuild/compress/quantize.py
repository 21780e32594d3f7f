"""Insert ModelOpt's quantizers and calibrate them (nvidia-modelopt 0.47.0, modelopt.torch.quantization)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from trtbuild.compress.calibrate import Loop
from trtbuild.compress.request import Request
from trtbuild.compress.selection import Selection
from trtbuild.errors import CompatibilityError, ToolError
from trtbuild.runtime.experts import UnfusedExperts
from trtbuild.weight_formats import WEIGHT_FORMATS, is_searched, is_solved, needs_text, takes_group

_CONFIGS = {
    "fp8": "FP8_DEFAULT_CFG",
    "fp8_per_channel_per_token": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "fp8_block": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "int8_sq": "INT8_SMOOTHQUANT_CFG",
    "int8_weight_only": "INT8_WEIGHT_ONLY_CFG",
    "int4_awq": "INT4_AWQ_CFG",
    "int4_gptq": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",  # the algorithm is ours: `gptq`
    "w4a8_awq": "W4A8_AWQ_BETA_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "nvfp4_awq": "NVFP4_AWQ_LITE_CFG",
    "w4a16_nvfp4": "W4A16_NVFP4_CFG",
    "mxfp4": "MXFP4_DEFAULT_CFG",
    "mxfp8": "MXFP8_DEFAULT_CFG",
}
_KV_CONFIGS = {"fp8": "FP8_KV_CFG", "nvfp4": "NVFP4_KV_CFG"}
_INT8_KV = [{"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": 8, "axis": None}, "enable": True}]
# What one decoder layer costs in each pass over the samples, a plain forward pass being 1. AWQ's second pass tries
# eleven scales for every layer.
FP8_PASSES = (("calibrate", 1),)
AWQ_PASSES = (("measure activations", 1), ("search AWQ scales", 12))
GPTQ_PASSES = (("measure activations for GPTQ", 2), ("run the changed layer", 1))


def format_passes(name: str, kv_cache: str) -> tuple[tuple[str, int], ...]:
    """The passes over the calibration samples that a weight format and a format of the KV cache take."""
    if not needs_text(name, kv_cache):
        return ()
    if is_solved(name):
        return GPTQ_PASSES
    return AWQ_PASSES if is_searched(name) else FP8_PASSES


def quantize(model: nn.Module, selection: Selection, request: Request, loop: Loop | None, *, layers: int) -> None:
    """Quantize `model` in place as the request says.

    Args:
        model: The whole model, or one with a single decoder layer.
        selection: What of it is compressed.
        request: Says the format.
        loop: Runs the calibration text; None for formats that need none.
        layers: How many decoder layers the model has.

    Raises:
        CompatibilityError: The KV cache of a class whose attention ModelOpt does not know.
        ToolError: A quantizer that is needed has no scale, or a layer was passed over.
    """
    import modelopt.torch.quantization as mtq

    algorithm = insert_quantizers(model, selection, request)
    mtq.calibrate(model, algorithm, loop)
    share_input_scales(model)
    check_quantizers(model, selection, request.kv_cache, layers=layers)


def insert_quantizers(model: nn.Module, selection: Selection, request: Request) -> Any:
    """Put ModelOpt's quantizers into `model`, not calibrated; return the algorithm that calibrates them."""
    import modelopt.torch.quantization as mtq

    config = _config(request)
    mtq.quantize(model, {"quant_cfg": config["quant_cfg"], "algorithm": None})
    for name in (*selection.excluded, *(name for name in selection.compressed if name not in selection.formats)):
        _disable(model.get_submodule(name))
    return config["algorithm"]


def _config(request: Request) -> dict[str, Any]:
    """ModelOpt's own configuration of the format, and the KV cache's after it."""
    config = format_config(request.single, request.group_size)
    if request.kv_cache != "none":
        config["algorithm"] = config["algorithm"] or "max"  # the MX formats alone need none
        config["quant_cfg"] = [*config["quant_cfg"], *kv_config(request.kv_cache)]
    return config


def format_config(name: str, group_size: int | None) -> dict[str, Any]:
    """ModelOpt's own configuration of a weight format, with our group size."""
    import modelopt.torch.quantization as mtq

    if name == "none":
        return {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": "max"}
    config: dict[str, Any] = copy.deepcopy(getattr(mtq, _CONFIGS[name]))
    for entry in config["quant_cfg"] if takes_group(name) else ():
        quantizers = entry.get("cfg") or {}
        for settings in quantizers if isinstance(quantizers, list) else [quantizers]:
            if "block_sizes" in settings:
                settings["block_sizes"][-1] = group_size
    return config


def kv_config(kv_cache: str) -> list[dict[str, Any]]:
    """What ModelOpt's configuration has for a format of the KV cache."""
    import modelopt.torch.quantization as mtq

    found = _INT8_KV if kv_cache == "int8" else getattr(mtq, _KV_CONFIGS[kv_cache])["quant_cfg"]
    return copy.deepcopy(list(found))


def _disable(layer: nn.Module) -> None:
    for name in ("input_quantizer", "weight_quantizer", "output_quantizer"):
        quantizer = getattr(layer, name, None)  # a router of a class of its own has none
        if quantizer is not None:
            quantizer.disable()


def share_input_scales(model: nn.Module) -> None:
    """Give experts without calibration tokens the largest input range of their layer, as ModelOpt's export does."""
    for module in model.modules():
        if not isinstance(module, UnfusedExperts):
            continue
        for projection in ("gate_proj", "up_proj", "down_proj"):
            quantizers = [getattr(expert, projection).input_quantizer for expert in module]
            enabled = [quantizer for quantizer in quantizers if quantizer.is_enabled]
            ranges = [quantizer.amax for quantizer in enabled if quantizer.amax is not None]
            for quantizer in enabled:
                if quantizer.amax is None and ranges:
                    quantizer.amax = torch.stack(ranges).max()


def check_quantizers(model: nn.Module, selection: Selection, kv_cache: str, *, layers: int) -> None:
    """Refuse a model of which anything that has a format has no positive, finite ranges.

    Raises:
        CompatibilityError, ToolError: As `quantize`.
    """
    for name, chosen in selection.formats.items():
        layer, disk, weight_format = model.get_submodule(name), selection.compressed[name], WEIGHT_FORMATS[chosen]
        if not (hasattr(layer, "weight_quantizer") and layer.weight_quantizer.is_enabled):
            raise ToolError(
                f"ModelOpt did not quantize {disk}, which compress.exclude does not name",
                "add it to compress.exclude if it must stay in bf16",
            )
        if weight_format.weight_range:
            _check_range(f"{disk}: its weights", layer.weight_quantizer, may_be_zero=True)
        if weight_format.input_range:
            _check_range(f"{disk}: its inputs", layer.input_quantizer, may_be_zero=False)
    if kv_cache != "none":
        _check_kv_quantizers(model, kv_cache, layers)


def _check_kv_quantizers(model: nn.Module, kv_cache: str, layers: int) -> None:
    found = [module for module in model.modules() if hasattr(module, "k_bmm_quantizer")]
    if len(found) != layers:
        raise CompatibilityError(
            f"kv_cache: {kv_cache}: ModelOpt found {len(found)} attention layers to calibrate in "
            f"{type(model).__name__}",
            "use compress.kv_cache: none",
        )
    for module in found:
        _check_range("keys", module.k_bmm_quantizer, may_be_zero=False)
        _check_range("values", module.v_bmm_quantizer, may_be_zero=False)


def _check_range(what: str, quantizer: Any, *, may_be_zero: bool) -> None:
    amax = quantizer.amax
    good = amax is not None and bool(torch.isfinite(amax).all())
    if not good or (not may_be_zero and not bool((amax > 0).all())):
        raise ToolError(
            f"{what} have no usable range after calibration", "calibrate with more text, or exclude the module"
        )
