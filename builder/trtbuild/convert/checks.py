"""What the files must hold before anything is written: tensors, shapes, types, and scales that go together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from trtbuild.convert.formats import Format
from trtbuild.convert.linear import Linear, Part
from trtbuild.convert.model import (
    EMBEDDING,
    LAST_NORM,
    Model,
    head_linear,
    kv_scales,
    layer_linears,
    layer_prefix,
    small_tensors,
)
from trtbuild.convert.values import PLAIN
from trtbuild.errors import ArtifactError, CompatibilityError

_SHOWN = 5
_IGNORED = (".rotary_emb.inv_freq",)
_CODE_TYPES = ("F8_E4M3", "U8", "I8")
_REMEDY = "export the checkpoint again with ModelOpt, or compress the original model"


@dataclass(frozen=True, slots=True)
class _Expected:
    """One tensor as it should be; a scalar may also have the shape [1]."""

    name: str
    shape: tuple[int, ...]
    types: tuple[str, ...]
    needed: bool = True


def check_source(model: Model) -> list[str]:
    """Check every tensor of the checkpoint and return notes for the user.

    Raises:
        ArtifactError: tensors are missing, unexpected, of a wrong shape or type; scales are not finite and positive.
        CompatibilityError: projections that TensorRT-LLM fuses carry unequal scales or formats, or experts a format
            that its mixture-of-experts layer cannot load.
    """
    linears = [
        *(linear for layer in range(model.shape.layers) for linear in layer_linears(model, layer, layer, 0)),
        head_linear(model, 0),
    ]
    problems, known = _shape_problems(model, linears)
    unexpected = sorted(name for name in model.source.tensors if name not in known and not name.endswith(_IGNORED))
    problems += [f"{name} is a tensor that {model.row.name} does not have" for name in unexpected]
    if problems:
        raise _artifact_error(model, problems)
    _check_formats(model, linears)
    return _kv_notes(model)


def _artifact_error(model: Model, problems: list[str]) -> ArtifactError:
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return ArtifactError(f"{model.source.directory}: " + "; ".join(problems[:_SHOWN]) + more, _REMEDY)


def _shape_problems(model: Model, linears: list[Linear]) -> tuple[list[str], set[str]]:
    """What is missing or of a wrong shape or type, and the names of all tensors that belong to the model."""
    expected = [*_plain_tensors(model), *_kv_tensors(model)]
    for linear in linears:
        for part in linear.parts:
            expected += _part_tensors(model, linear, part)
    problems = [problem for tensor in expected if (problem := _problem(model, tensor))]
    return problems, {tensor.name for tensor in expected}


def _problem(model: Model, expected: _Expected) -> str | None:
    stored = model.source.tensors.get(expected.name)
    if stored is None:
        return f"{expected.name} is missing" if expected.needed else None
    if stored.shape != expected.shape and not (not expected.shape and stored.shape == (1,)):
        return f"{expected.name} has shape {list(stored.shape)} instead of {list(expected.shape)}"
    if stored.dtype not in expected.types:
        return f"{expected.name} has type {stored.dtype}, expected {' or '.join(expected.types)}"
    return None


def _plain_tensors(model: Model) -> Iterator[_Expected]:
    """Tables, norms and routers."""
    shape = model.shape
    yield _Expected(EMBEDDING, (shape.vocab, shape.hidden), PLAIN)
    yield _Expected(LAST_NORM, (shape.hidden,), PLAIN)
    for layer in range(shape.layers):
        for stored, made, norm in small_tensors(model, layer, layer):
            if not norm:
                size: tuple[int, ...] = (shape.experts if made.endswith("router.weight") else 1, shape.hidden)
            elif made.endswith(("q_layernorm.weight", "k_layernorm.weight")):
                size = (shape.head_dim,)
            else:
                size = (shape.hidden,)
            yield _Expected(stored, size, PLAIN)


def _kv_tensors(model: Model) -> Iterator[_Expected]:
    """Scales of keys and values; an FP8 cache can do without."""
    if model.quantized.kv_cache is not None:
        for layer in range(model.shape.layers):
            for name in kv_scales(layer):
                yield _Expected(name, (), ("F32",), needed=model.quantized.kv_cache == "INT8")


def _part_tensors(model: Model, linear: Linear, part: Part) -> Iterator[_Expected]:
    """The tensors of one projection; the weight's type says whether it is coded."""
    if linear.bias:
        yield _Expected(f"{part.prefix}.bias", (part.outputs,), PLAIN)
    weight = f"{part.prefix}.weight"
    chosen, stored = model.quantized.format, model.source.tensors.get(weight)
    if chosen is None or (stored is not None and stored.dtype in PLAIN):
        yield _Expected(weight, (part.outputs, part.inputs), PLAIN)
        return
    packed = (part.outputs // chosen.row_packing, part.inputs // chosen.column_packing)
    yield _Expected(weight, packed, (chosen.weight[0],))
    scale: dict[str, tuple[int, ...]] = {"tensor": (), "row": (part.outputs,)}
    if chosen.scale_kind == "group":
        scale["group"] = (part.outputs, part.inputs // model.quantized.group)
    yield _Expected(f"{part.prefix}.weight_scale", scale[chosen.scale_kind], (chosen.scale,))
    if chosen.second_scale:
        yield _Expected(f"{part.prefix}.weight_scale_2", (), ("F32",))
    if chosen.input_scale:
        yield _Expected(f"{part.prefix}.input_scale", (), ("F32",))
    if chosen.smoothed:
        yield _Expected(f"{part.prefix}.pre_quant_scale", (part.inputs,), PLAIN, needed=False)


def _check_formats(model: Model, linears: list[Linear]) -> None:
    chosen = model.quantized.format
    if chosen is None:
        return
    problems: list[str] = []
    damaged: list[str] = []
    for linear in linears:
        coded = {model.source.tensors[f"{part.prefix}.weight"].dtype in _CODE_TYPES for part in linear.parts}
        if coded == {True, False}:
            problems.append(f"{_parts(linear)} are one layer in TensorRT-LLM, but only some of them are quantized")
        if coded != {True}:
            continue
        if linear.stacked and not chosen.experts:
            raise CompatibilityError(
                f"TensorRT-LLM's mixture-of-experts layer cannot load {chosen.algo} from a checkpoint",
                "compress the model as fp8 or int4_awq, or exclude the experts",
            )
        problems += _fusion_problems(model, linear, chosen)
        damaged += _scale_problems(model, linear, chosen)
    problems += _gate_problems(model, linears, chosen)
    if damaged:
        raise _artifact_error(model, damaged)
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CompatibilityError(f"{model.source.directory}: " + "; ".join(problems[:_SHOWN]) + more, _REMEDY)


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


def _gate_problems(model: Model, linears: list[Linear], chosen: Format) -> Iterator[str]:
    """Gate and up are two layers in the file but one in the engine (modeling_utils.fuse_gate_mlp)."""
    by_name = {linear.name: linear for linear in linears}
    for name, gate in by_name.items():
        up = by_name.get(f"{name.removesuffix('.fc')}.gate") if name.endswith("mlp.fc") else None
        if up is None:
            continue
        prefixes = [next(linear.parts).prefix for linear in (gate, up)]
        coded = {model.source.tensors[f"{prefix}.weight"].dtype in _CODE_TYPES for prefix in prefixes}
        if coded == {True, False}:
            yield f"{', '.join(prefixes)} are fused in TensorRT-LLM, but only one of them is quantized"
        elif coded == {True}:
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


def _kv_notes(model: Model) -> list[str]:
    if model.quantized.kv_cache is None:
        return []
    missing = [
        layer for layer in range(model.shape.layers)
        if not any(name in model.source.tensors for name in kv_scales(layer))
    ]  # fmt: skip
    if missing:
        return [f"{len(missing)} layers have no KV scales: 1.0 is used ({layer_prefix(missing[0])[:-1]} is the first)"]
    return []
