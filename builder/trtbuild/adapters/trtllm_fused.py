"""Rules of `trtllm_checkpoint` on projections that TensorRT-LLM joins, and on the scales of their inputs.

Sources in NVIDIA/TensorRT-LLM: tensorrt_llm/_torch/modules/linear.py @ed53795b33fc (separate projections),
_torch/modules/fused_moe/quantization.py @a98a9061d72f (experts), _torch/models/modeling_phi3.py @bd6f83f8d56d
(projections stored as one; an older copy, @000a01de66f0, reads none of their scales).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from trtbuild.adapters.trtllm_tensors import (
    COLUMN_PARALLEL,
    FUSED,
    ROW_PARALLEL,
    Found,
    Linear,
    Quantized,
    Reader,
    few,
)

_PREFUSED = ("qkv_proj", "gate_up_proj")
_INT4 = ("W4A16_AWQ", "W4A8_AWQ")
# Gate and up, and the way down, by the names that architectures give them.
_EXPERT_INPUTS = (("gate_proj", "up_proj"), ("w1", "w3"))


def fused(layers: Iterable[Linear], quantized: Quantized, reader: Reader) -> Found:
    """Projections that TensorRT-LLM joins are quantized together and share their scales.

    NVFP4 and W4A8_AWQ assert that input_scale and weight_scale_2 are equal. FP8 takes the largest input_scale of
    separate projections: other numbers than those that were calibrated. Weight scales of FP8 may differ: all codes are
    brought to the largest.
    """
    layers = list(layers)
    by_name = {layer.name: layer for layer in layers if not layer.is_expert}
    problems, groups = [], 0
    for layer in by_name.values():
        for names in FUSED:
            if layer.short != names[0]:
                continue
            parent = layer.name.removesuffix(names[0])
            members = [by_name[f"{parent}{name}"] for name in names if f"{parent}{name}" in by_name]
            groups += 1
            problems += _unequal(f"{parent}{{{','.join(names)}}}", members, reader)
    prefused = [layer for layer in by_name.values() if layer.short in _PREFUSED]
    problems += _prefused(prefused, quantized)
    experts = [layer for layer in layers if layer.is_expert]
    problems += _experts(experts, quantized, reader)
    shown = f"{groups} groups"
    shown += f", {len(prefused)} projections stored as one" if prefused else ""
    shown += f", {len(experts)} projections of experts" if experts else ""
    return few(problems), shown


def same_formats(layers: Iterable[Linear], quantized: Quantized) -> Found:
    """Joined projections and all experts of a module take one entry of `quantized_layers`, whatever the others say.

    tensorrt_llm/_torch/models/modeling_utils.py, apply_layerwise_quant_config.
    """
    formats: dict[str, set[object]] = defaultdict(set)
    for layer in layers:
        parent, _, short = layer.name.rpartition(".")
        group = next((names for names in FUSED if short in names), (short,))
        name = (
            layer.name.partition(".experts.")[0] + ".experts" if layer.is_expert else f"{parent}.{{{','.join(group)}}}"
        )
        found = quantized.layers.get(layer.name)
        formats[name].add((found.algo, found.group_size) if found else None)
    mixed = [f"{name}: in several formats; TensorRT-LLM joins them into one layer" for name, found in formats.items()
             if len(found) > 1]  # fmt: skip
    return few(mixed), f"{len(quantized.layers)} layers with a format of their own"


def _unequal(
    name: str, members: list[Linear], reader: Reader, scales: Iterable[str] = ("input_scale", "weight_scale_2")
) -> list[str]:
    if len({member.is_quantized for member in members}) > 1:
        return [f"{name}: quantized only in part; TensorRT-LLM joins them into one layer"]
    problems = []
    for suffix in scales:
        present = [member.scales[suffix] for member in members if suffix in member.scales]
        if present and len(present) < len(members):
            problems.append(f"{name}: {suffix} is missing in some")
        values = [reader.number(tensor) for tensor in present if tensor.elements == 1]
        if len(set(values)) > 1:
            shown = ", ".join(f"{value:g}" for value in values)
            problems.append(f"{name}: {suffix} must be equal, but they are {shown}")
        if len({reader.raw(tensor) for tensor in present if tensor.elements > 1}) > 1:
            problems.append(f"{name}: {suffix} must be equal, but they are not")
    return problems


def _prefused(layers: Iterable[Linear], quantized: Quantized) -> Iterator[str]:
    """One scale serves all parts of FP8 and NVFP4. Codes of 4 bits are cut at the wrong rows."""
    if quantized.algo not in _INT4:
        return
    for layer in layers:
        if layer.is_quantized:
            yield (
                f"{layer.name}: TensorRT-LLM takes the rows of query, key and value, or of gate and up, out of one "
                f"matrix as if each held one output; in {quantized.algo} a row holds two"
            )


def _experts(layers: Iterable[Linear], quantized: Quantized, reader: Reader) -> Iterator[str]:
    """All experts of a layer are one module, and gate and up of each are one matrix.

    FP8 takes the largest input_scale of all experts and brings gate and up to their larger weight scale; NVFP4 and
    W4A8_AWQ have one second scale for both.
    """
    modules: dict[str, dict[str, dict[str, Linear]]] = defaultdict(lambda: defaultdict(dict))
    for layer in layers:
        module, _, rest = layer.name.partition(".experts.")
        modules[module][rest.partition(".")[0]][layer.short] = layer
    for module, experts in modules.items():
        kinds = {layer.is_quantized for parts in experts.values() for layer in parts.values()}
        if kinds == {True, False}:
            yield f"{module}.experts: quantized only in part; TensorRT-LLM joins them into one layer"
        elif kinds == {True} and quantized.algo == "W4A16_AWQ":
            yield (
                f"{module}.experts: TensorRT-LLM's experts with weights of 4 bits have inputs in FP8 (W4A8_AWQ) and "
                "do not load without input_scale"
            )
        elif kinds == {True} and quantized.algo in ("NVFP4", "W4A8_AWQ"):
            for number, parts in experts.items():
                yield from _expert(f"{module}.experts.{number}", parts, quantized, reader)


def _expert(name: str, parts: Mapping[str, Linear], quantized: Quantized, reader: Reader) -> Iterator[str]:
    scales = ["input_scale", "weight_scale_2"]
    if quantized.algo == "W4A8_AWQ":
        scales.append("pre_quant_scale")
        lacking = [layer.name for layer in parts.values() if "pre_quant_scale" not in layer.scales]
        yield from (f"{lacks}: pre_quant_scale is missing, TensorRT-LLM does not load the expert" for lacks in lacking)
    for names in _EXPERT_INPUTS:
        members = [parts[short] for short in names if short in parts]
        if len(members) == len(names):
            yield from _unequal(f"{name}.{{{','.join(names)}}}", members, reader, scales)


def pre_quant_scales(layers: Iterable[Linear], quantized: Quantized) -> Found:
    """W4A16_AWQ: joined projections ignore pre_quant_scale, other layers do not load without it."""
    if quantized.algo != "W4A16_AWQ":
        return [], f"not of {quantized.algo or 'an unquantized checkpoint'}"
    problems, count = [], 0
    for layer in layers:
        if not layer.is_quantized or layer.is_expert:
            continue
        scale = layer.scales.get("pre_quant_scale")
        if layer.short in (*COLUMN_PARALLEL, *_PREFUSED) and scale is not None:
            problems.append(f"{layer.name}: pre_quant_scale would be ignored; it belongs into the norm before")
        if layer.short in ROW_PARALLEL:
            count += 1
            if scale is None:
                problems.append(
                    f"{layer.name}: pre_quant_scale is missing, TensorRT-LLM does not load the layer without"
                )
            elif scale.elements != layer.weight.shape[1]:
                problems.append(
                    f"{layer.name}: pre_quant_scale has {scale.elements} numbers, not {layer.weight.shape[1]}"
                )
    return few(problems), f"{count} layers with a scale of their own"
