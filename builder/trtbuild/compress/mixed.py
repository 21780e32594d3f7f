"""Quantize layers in several formats, as ModelOpt's AutoQuantize does once it has chosen them.

Each format is calibrated by its own method while every other layer computes with its original numbers, and smoothing
scales are folded into weights when all formats are done (nvidia-modelopt 0.47.0,
modelopt/torch/quantization/algorithms.py, _AutoQuantizeBaseSearcher). So no format depends on another one, nor on the
order, and one decoder layer alone gets what it gets in the whole model. The KV cache comes first, before anything else
is rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from trtbuild.compress.calibrate import Loop
from trtbuild.compress.quantize import (
    check_quantizers,
    format_config,
    format_passes,
    kv_config,
    quantize,
    share_input_scales,
)
from trtbuild.compress.request import Request
from trtbuild.compress.selection import Selection
from trtbuild.weight_formats import WEIGHT_FORMATS

_QUANTIZERS = ("input_quantizer", "weight_quantizer", "output_quantizer")
_KV_PASS = ("calibrate the KV cache", 1)
_Quantizers = Mapping[str, nn.Module]


def passes(request: Request, selection: Selection | None = None) -> tuple[tuple[str, int], ...]:
    """The passes over the calibration samples, in order; without a selection those that there are at most."""
    if selection is None and len(request.formats) > 1:
        return _mixed_passes(request.formats, request)
    if selection is None or not selection.mixed:
        return format_passes(request.single, request.kv_cache)
    return _mixed_passes(set(selection.formats.values()), request)


def layer_passes(request: Request, selection: Selection) -> tuple[tuple[str, int], ...]:
    """The passes for one decoder layer; one that needs none still runs for the layers behind it."""
    return passes(request, selection) or (("run", 1),)


def _mixed_passes(formats: Iterable[str], request: Request) -> tuple[tuple[str, int], ...]:
    found = [step for name in sorted(formats) for step in format_passes(name, "none")]
    return ((_KV_PASS,) if request.kv_cache != "none" else ()) + tuple(found)


def quantize_layers(
    model: nn.Module, selection: Selection, request: Request, loop: Loop | None, *, layers: int
) -> None:
    """Quantize `model` in place, each selected layer in its format; see `quantize`, which does it for one format."""
    if not selection.mixed:
        quantize(model, selection, request, loop, layers=layers)
        return
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.algorithms import QuantRecipe

    mtq.quantize(model, {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": None})
    if request.kv_cache != "none":
        mtq.set_quantizer_by_cfg(model, kv_config(request.kv_cache))
        mtq.calibrate(model, "max", loop)
        _switch_kv(model, enabled=False)
    QuantRecipe.disable_folding_pqs_to_weights()
    try:
        found = [_calibrate(model, selection, request, loop, name) for name in sorted(set(selection.formats.values()))]
        for quantizers in found:
            _put(model, quantizers)
    finally:
        QuantRecipe.fold_pqs_to_weights(model)
    share_input_scales(model)
    if request.kv_cache != "none":
        _switch_kv(model, enabled=True)
    check_quantizers(model, selection, request.kv_cache, layers=layers)


def _calibrate(
    model: nn.Module, selection: Selection, request: Request, loop: Loop | None, name: str
) -> dict[str, _Quantizers]:
    """The quantizers of all layers in the format `name`, calibrated; the model is left as it was."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.algorithms import QuantRecipe
    from modelopt.torch.quantization.nn import TensorQuantizer

    config = format_config(name, request.group_size)
    members = [layer for layer, chosen in selection.formats.items() if chosen == name]
    before = _take(model, members)
    for layer in members:
        module = model.get_submodule(layer)
        for attribute in _QUANTIZERS:
            setattr(module, attribute, TensorQuantizer())
        mtq.set_quantizer_by_cfg(module, QuantRecipe(quant_cfg=config, name=name).config.quant_cfg)
    mtq.calibrate(model, config["algorithm"], loop if WEIGHT_FORMATS[name].activations else None)
    found = _take(model, members)
    _put(model, before)
    return found


def _take(model: nn.Module, layers: Iterable[str]) -> dict[str, _Quantizers]:
    return {layer: {name: getattr(model.get_submodule(layer), name) for name in _QUANTIZERS} for layer in layers}


def _put(model: nn.Module, quantizers: Mapping[str, _Quantizers]) -> None:
    for layer, of_layer in quantizers.items():
        for name, quantizer in of_layer.items():
            setattr(model.get_submodule(layer), name, quantizer)


def _switch_kv(model: nn.Module, *, enabled: bool) -> None:
    for module in model.modules():
        for name in ("k_bmm_quantizer", "v_bmm_quantizer"):
            quantizer: Any = getattr(module, name, None)
            if quantizer is not None:
                (quantizer.enable if enabled else quantizer.disable)()
