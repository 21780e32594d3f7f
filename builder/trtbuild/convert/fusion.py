"""What TensorRT-LLM joins must go together: formats and scales of the projections that become one layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from trtbuild.convert.experts import is_fp4_experts, tile_problem
from trtbuild.convert.formats import MIXED, Coding, Format
from trtbuild.convert.linear import Linear, Part
from trtbuild.convert.model import Model
from trtbuild.errors import ArtifactError, CompatibilityError

REMEDY = "export the checkpoint again with ModelOpt, or compress the original model"
_SHOWN = 5
_CODE_TYPES = ("F8_E4M3", "U8", "I8")


def several(model: Model, problems: Sequence[str]) -> str:
    """The first problems of a checkpoint and how many there are besides."""
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return f"{model.source.directory}: " + "; ".join(problems[:_SHOWN]) + more


def check_formats(model: Model, linears: Sequence[Linear]) -> None:
    """Check formats and scales of every layer; shapes and types were checked.

    Raises:
        ArtifactError: scales are not finite and positive.
        CompatibilityError: projections that TensorRT-LLM fuses carry unequal scales or formats, or experts a format
            that its mixture-of-experts layer cannot load.
    """
    if model.quantized.algo is None:
        return
    problems: list[str] = []
    damaged: list[str] = []
    for linear in linears:
        coded = {_is_coded(model, part) for part in linear.parts}
        if coded == {True, False}:
            problems.append(f"{_parts(linear)} are one layer in TensorRT-LLM, but only some of them are quantized")
        if coded != {True}:
            continue
        codings = {model.quantized.at(part.prefix) for part in linear.parts}
        if len(codings) > 1:
            problems.append(f"{_parts(linear)} are one layer in TensorRT-LLM, but are quantized in different ways")
            continue
        coding = codings.pop()
        chosen = coding.format
        if chosen is None:  # codes of no format: their type was refused
            continue
        if linear.stacked:
            _check_experts(model, linear, chosen)
        problems += _fusion_problems(model, linear, chosen)
        problems += _division_problems(model, linear, coding, chosen)
        damaged += _scale_problems(model, linear, chosen)
    problems += _gate_problems(model, linears)
    if damaged:
        raise ArtifactError(several(model, damaged), REMEDY)
    if problems:
        raise CompatibilityError(several(model, problems), REMEDY)


def _is_coded(model: Model, part: Part) -> bool:
    return model.source.tensors[f"{part.prefix}.weight"].dtype in _CODE_TYPES


def _check_experts(model: Model, linear: Linear, chosen: Format) -> None:
    """Refuse experts that TensorRT-LLM's mixture-of-experts layer would not load.

    Raises:
        CompatibilityError: saying why.
    """
    hint = "compress the model as fp8 or int4_awq, or exclude the experts"
    if model.quantized.layers is not None:
        # layers/moe.py @c388fec7fe09 makes its parameters from the modes of all layers together (QuantModeWrapper), and
        # PretrainedConfig.to_layer_quant_config (modeling_utils.py @34a267279384) knows the experts of Mixtral alone.
        raise CompatibilityError(
            f"{model.source.directory} is {MIXED}: TensorRT-LLM's mixture-of-experts layer takes its format from all "
            "layers together, not from its own",
            hint,
        )
    if chosen.no_experts is not None:
        raise CompatibilityError(
            f"TensorRT-LLM's mixture-of-experts layer cannot load {chosen.algo} from a checkpoint: {chosen.no_experts}",
            hint,
        )
    if is_fp4_experts(linear, model.source, model.quantized) and (problem := tile_problem(linear)) is not None:
        raise CompatibilityError(problem, "use less tensor parallelism, or exclude the experts")


def _parts(linear: Linear) -> str:
    """The fused projections' names; of stacked experts the first and the last."""
    names = [part.prefix for part in linear.parts]
    return f"{names[0]} to {names[-1]}" if linear.stacked else ", ".join(names)


def _fusion_problems(model: Model, linear: Linear, chosen: Format) -> Iterator[str]:
    """Scales that one fused layer has only once must be equal in its parts (of each expert)."""
    for parts in linear.experts:
        prefixes = [part.prefix for part in parts]
        if chosen.input_scale:
            yield from _unequal(model, prefixes, "input_scale")
        if chosen.second_scale:
            yield from _unequal(model, prefixes, "weight_scale_2")
    if chosen.smoothed:
        yield from _unequal(model, [part.prefix for part in linear.parts], "pre_quant_scale")


def _unequal(model: Model, prefixes: list[str], scale: str) -> Iterator[str]:
    names = [f"{prefix}.{scale}" for prefix in prefixes]
    present = [name for name in names if name in model.source.tensors]
    if not present:
        return
    different = len(present) < len(names)
    first = model.source.values(present[0])
    different = different or any((model.source.values(name) != first).any() for name in present[1:])
    if different:
        yield f"{', '.join(prefixes[:3])} are one layer in TensorRT-LLM, but their {scale} differ"


def _division_problems(model: Model, linear: Linear, coding: Coding, chosen: Format) -> Iterator[str]:
    """Where layers differ in format, each one is held against the parallel sizes; else `shape` did it for all."""
    if model.quantized.layers is None:
        return
    unit, inputs = max(coding.group, chosen.column_packing), linear.columns[1] - linear.columns[0]
    if inputs % unit:
        yield f"{linear.name}: {inputs} inputs of a rank do not divide into groups of {unit} ({chosen.algo})"
    rows = [end for part in linear.parts for span in part.rows for end in span]
    if any(row % chosen.row_packing for row in rows):
        yield f"{linear.name}: outputs of a rank do not divide by the {chosen.row_packing} rows packed in a byte"


def _gate_problems(model: Model, linears: Sequence[Linear]) -> Iterator[str]:
    """Gate and up are two layers in the file but one in the engine (modeling_utils.fuse_gate_mlp)."""
    by_name = {linear.name: linear for linear in linears}
    for name, gate in by_name.items():
        up = by_name.get(f"{name.removesuffix('.fc')}.gate") if name.endswith("mlp.fc") else None
        if up is None:
            continue
        parts = [next(linear.parts) for linear in (gate, up)]
        prefixes = [part.prefix for part in parts]
        coded = {_is_coded(model, part) for part in parts}
        if coded == {True, False}:
            yield f"{', '.join(prefixes)} are fused in TensorRT-LLM, but only one of them is quantized"
        elif coded == {True}:
            yield from _gate_scales(model, prefixes)


def _gate_scales(model: Model, prefixes: list[str]) -> Iterator[str]:
    codings = [model.quantized.at(prefix) for prefix in prefixes]
    if codings[0] != codings[1]:
        yield f"{', '.join(prefixes)} are fused in TensorRT-LLM, but are quantized in different ways"
        return
    chosen = codings[0].format
    if chosen is None:
        return
    for scale, has in (
        ("input_scale", chosen.input_scale),
        ("weight_scale_2", chosen.second_scale),
        ("pre_quant_scale", chosen.smoothed),
    ):
        if has:
            yield from _unequal(model, prefixes, scale)


def _scale_problems(model: Model, linear: Linear, chosen: Format) -> Iterator[str]:
    """Scalars that are zero, negative or not finite."""
    names = ["weight_scale"] if chosen.scale_kind == "tensor" else []
    names += ["weight_scale_2"] if chosen.second_scale else []
    names += ["input_scale"] if chosen.input_scale else []
    for part in linear.parts:
        for name in names:
            value = model.source.scalar(f"{part.prefix}.{name}")
            if not (math.isfinite(value) and value > 0):
                yield f"{part.prefix}.{name} is {value}, scales are finite and positive"
