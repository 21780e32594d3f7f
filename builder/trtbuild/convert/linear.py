"""One linear layer of one rank: which tensors it has in the output, and from what they are taken.

A linear layer is given in logical sizes, as [outputs, inputs] of the unquantized matrix. Its parts are the projections
that TensorRT-LLM fuses, in order, each with the outputs that this rank gets; its experts are stacked. Packing, group
scales and smoothing follow from the format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trtbuild.convert.formats import Format, Quantized
from trtbuild.convert.plan import Output, Piece, Span, numbers, ones
from trtbuild.convert.source import Source
from trtbuild.convert.values import caster, rescaler


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one stored projection; `inputs` and `outputs` are its whole logical sizes."""

    prefix: str
    rows: tuple[Span, ...]
    outputs: int
    inputs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A linear layer of one rank.

    Args:
        name: without ``.weight``.
        experts: the parts of each expert; one entry for a layer that is not stacked.
        columns: the inputs that this rank gets.
        total_rows: rows of the output; more than the parts have means padding with zeros.
        bias: the part's bias goes along, split as the rows are.
    """

    name: str
    experts: tuple[tuple[Part, ...], ...]
    stacked: bool
    columns: Span
    total_rows: int
    bias: bool = False

    @property
    def parts(self) -> Iterator[Part]:
        """The parts of all experts."""
        return (part for parts in self.experts for part in parts)


def is_quantized(linear: Linear, source: Source) -> bool:
    """Whether the files hold codes for this layer; the checks made sure that its parts agree."""
    weight = source.tensors[f"{next(linear.parts).prefix}.weight"]
    return weight.dtype in {"F8_E4M3", "U8", "I8"}


def outputs_of(linear: Linear, source: Source, quantized: Quantized, dtype: str) -> list[Output]:
    """Every tensor of `linear`; `dtype` is the safetensors type of what is not quantized."""
    made = []
    if linear.bias:
        made.append(_vector(linear, source, "bias", "bias", dtype))
    coding = quantized.at(next(linear.parts).prefix)
    chosen = coding.format
    if chosen is None or not is_quantized(linear, source):
        return [*made, matrix(linear, source, "weight", "weight", dtype, (1, 1))]
    packing = (chosen.row_packing, chosen.column_packing)
    made.append(matrix(linear, source, "weight", "weight", chosen.weight[1], packing))
    made += _scales(linear, source, chosen, coding.group)
    if chosen.smoothed:
        made.append(_smoothing(linear, source, dtype))
    return made


def _scales(linear: Linear, source: Source, chosen: Format, group: int) -> list[Output]:
    made = []
    if chosen.scale_kind == "group":
        made.append(matrix(linear, source, "weight_scale", "weights_scaling_factor", chosen.scale, (1, group)))
    elif chosen.scale_kind == "row":
        made.append(_vector(linear, source, "weight_scale", "weights_scaling_factor", "F32"))
    else:
        made.append(_largest(linear, source, "weight_scale", "weights_scaling_factor"))
    if chosen.second_scale:
        made.append(_largest(linear, source, "weight_scale_2", "weights_scaling_factor_2"))
    if chosen.input_scale:
        made.append(numbers(f"{linear.name}.activation_scaling_factor", [largest_input_scale(linear, source)], (1,)))
    return made


def largest_input_scale(linear: Linear, source: Source) -> float:
    """One for all experts, as layers/moe.py, MOEWeightWrapper.postprocess, has it."""
    return max(source.scalar(f"{part.prefix}.input_scale") for part in linear.parts)


def _largest(linear: Linear, source: Source, stored: str, name: str) -> Output:
    """One number for each expert, the largest of its parts."""
    values = [max(source.scalar(f"{part.prefix}.{stored}") for part in parts) for parts in linear.experts]
    return numbers(f"{linear.name}.{name}", values, (len(values), 1) if linear.stacked else (1,))


def matrix(linear: Linear, source: Source, stored: str, name: str, dtype: str, packing: tuple[int, int]) -> Output:
    """Codes, group scales or plain weights: logical rows and columns divided by `packing`."""
    by_row, by_column = packing
    columns = (linear.columns[0] // by_column, linear.columns[1] // by_column)
    width, rows = columns[1] - columns[0], linear.total_rows // by_row
    pieces = []
    for index, parts in enumerate(linear.experts):
        at = index * rows * width
        target = _common_scale(parts, source, dtype, stored)
        for part in parts:
            full = f"{part.prefix}.{stored}"
            if target is None:
                transform = caster(source.tensors[full].dtype, dtype) if _plain(dtype) else None
            else:
                transform = rescaler(source.scalar(f"{part.prefix}.weight_scale"), target)
            for begin, end in part.rows:
                span = (begin // by_row, end // by_row)
                pieces.append(Piece(source=full, rows=span, columns=columns, at=at, transform=transform))
                at += (span[1] - span[0]) * width
    shape = (len(linear.experts), rows, width) if linear.stacked else (rows, width)
    return Output(name=f"{linear.name}.{name}", dtype=dtype, shape=shape, pieces=pieces)


def _plain(dtype: str) -> bool:
    return dtype in {"BF16", "F16", "F32"}


def _common_scale(parts: Sequence[Part], source: Source, dtype: str, stored: str) -> float | None:
    """The scale that fused FP8 codes are brought to; None where codes stay as they are."""
    if dtype != "F8_E4M3" or stored != "weight":
        return None
    return max(source.scalar(f"{part.prefix}.weight_scale") for part in parts)


def _vector(linear: Linear, source: Source, stored: str, name: str, dtype: str) -> Output:
    """One number for each output, of a layer that is not stacked."""
    pieces, at = [], 0
    for part in linear.parts:
        full = f"{part.prefix}.{stored}"
        for span in part.rows:
            cast = caster(source.tensors[full].dtype, dtype)
            pieces.append(Piece(source=full, rows=span, columns=(0, 1), at=at, transform=cast))
            at += span[1] - span[0]
    return Output(name=f"{linear.name}.{name}", dtype=dtype, shape=(linear.total_rows,), pieces=pieces)


def _smoothing(linear: Linear, source: Source, dtype: str) -> Output:
    """The factors of the inputs: those of the first part, for the checks made sure that all parts have the same."""
    name, size = f"{linear.name}.prequant_scaling_factor", linear.columns[1] - linear.columns[0]
    shape = (len(linear.experts), size) if linear.stacked else (size,)
    first = f"{next(linear.parts).prefix}.pre_quant_scale"
    if first not in source.tensors:
        return ones(name, dtype, shape)
    pieces = []
    for index, parts in enumerate(linear.experts):
        full = f"{parts[0].prefix}.pre_quant_scale"
        cast = caster(source.tensors[full].dtype, dtype)
        pieces.append(Piece(source=full, rows=linear.columns, columns=(0, 1), at=index * size, transform=cast))
    return Output(name=name, dtype=dtype, shape=shape, pieces=pieces)
