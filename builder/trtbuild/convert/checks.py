"""What the files must hold before anything is written: tensors, shapes and types; `fusion` judges the scales."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trtbuild.convert.fusion import REMEDY, check_formats, several
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
from trtbuild.errors import ArtifactError

_IGNORED = (".rotary_emb.inv_freq",)


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
    named = set(model.quantized.layers or ()) - {part.prefix for linear in linears for part in linear.parts}
    problems += [f"quantized_layers names {name}, which {model.row.name} does not have" for name in sorted(named)]
    if problems:
        raise ArtifactError(several(model, problems), REMEDY)
    check_formats(model, linears)
    return _kv_notes(model)


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
    coding, stored = model.quantized.at(part.prefix), model.source.tensors.get(weight)
    chosen = coding.format
    if chosen is None or (stored is not None and stored.dtype in PLAIN):
        yield _Expected(weight, (part.outputs, part.inputs), PLAIN)
        return
    packed = (part.outputs // chosen.row_packing, part.inputs // chosen.column_packing)
    yield _Expected(weight, packed, (chosen.weight[0],))
    scale: dict[str, tuple[int, ...]] = {"tensor": (), "row": (part.outputs,)}
    if chosen.scale_kind == "group":
        scale["group"] = (part.outputs, part.inputs // coding.group)
    yield _Expected(f"{part.prefix}.weight_scale", scale[chosen.scale_kind], (chosen.scale,))
    if chosen.second_scale:
        yield _Expected(f"{part.prefix}.weight_scale_2", (), ("F32",))
    if chosen.input_scale:
        yield _Expected(f"{part.prefix}.input_scale", (), ("F32",))
    if chosen.smoothed:
        yield _Expected(f"{part.prefix}.pre_quant_scale", (part.inputs,), PLAIN, needed=False)


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
