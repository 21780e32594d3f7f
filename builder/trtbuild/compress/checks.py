"""Check an exported checkpoint by its files alone: what the exporter meant does not count, what engines read does.

Required by the readers: NVIDIA/TensorRT-LLM tensorrt_llm/_torch/modules/linear.py (equal input scales of fused
projections, shapes and types per format) and NVIDIA/Model-Optimizer modelopt/torch/export/quant_utils.py @0.47.0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from trtbuild.compress.blocks import TensorBlocks
from trtbuild.compress.export import HF_QUANT_CONFIG
from trtbuild.compress.groups import FUSED_BY_ENGINES
from trtbuild.compress.metadata import read_json
from trtbuild.compress.request import Request
from trtbuild.compress.selection import Selection
from trtbuild.compress.source import read_tensors
from trtbuild.compress.threads import workers
from trtbuild.errors import ToolError
from trtbuild.safetensors_header import TensorInfo
from trtbuild.weight_formats import is_searched, takes_group

Form = tuple[str, tuple[int, ...]]  # type and shape of a tensor
_SHOWN = 3
_E4M3_NAN = 127  # less the sign
_E8M0_NAN = 255


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found in the files."""

    tensors: int
    bytes: int
    quantized_projections: int
    excluded_modules: tuple[str, ...]
    groups: int  # of four weights along the input, in compressed projections
    conforming: int  # with at most two that are not zero


class Values:
    """Tensor values of a checkpoint directory, whole or block by block."""

    def __init__(self, directory: Path, infos: Mapping[str, TensorInfo]) -> None:
        self._blocks = TensorBlocks(directory, infos, finite=False)
        self._infos = infos

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._blocks.value(self._infos[name])

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The elements of a tensor, flat; a block is gone when the next comes."""
        return self._blocks.blocks(self._infos[name])


def check_export(request: Request, selection: Selection, source: Mapping[str, TensorInfo]) -> Checked:
    """Check every tensor of the request's output; `source` describes the tensors that it was made from.

    Raises:
        ToolError: Names the tensor: not quantized although no pattern excludes it, missing, of a wrong type or shape,
            with an unusable scale, not pruned to the wanted pattern, or with scales that differ where engines need one.
    """
    infos = read_tensors(request.output)
    values = Values(request.output, infos)
    weights = {name.removesuffix(".weight"): info for name, info in infos.items() if name.endswith(".weight")}
    quantized = sorted(name for name, info in weights.items() if info.dtype in {"F8_E4M3", "U8", "I8"})
    wanted = sorted(selection.compressed.values())
    formats = selection.disk_formats
    if formats:
        refuse("not quantized, although compress.exclude does not name it", set(formats) - set(quantized))
        refuse("quantized, although it has no format", set(quantized) - set(formats))
        _check_every_matrix(request, infos, selection, quantized)
        with workers() as pool:
            checking = [
                pool.submit(_check_layer, request, layer, formats[layer], infos, values, source) for layer in quantized
            ]
            for checked in checking:
                checked.result()
        _check_shared_inputs(quantized, values, infos)
    check_source_is_covered(infos, source)
    if request.kv_cache != "none":
        _check_kv_scales(request, infos, values)
    groups, conforming = _check_pattern(formats, wanted, values) if request.sparse else (0, 0)
    return Checked(
        tensors=len(infos),
        bytes=sum(info.bytes for info in infos.values()),
        quantized_projections=len(quantized),
        excluded_modules=tuple(sorted(selection.uncompressed)),
        groups=groups,
        conforming=conforming,
    )


def refuse(problem: str, names: set[str]) -> None:
    """Raise a ToolError that says what is wrong with these tensors or layers, if there are any."""
    if names:
        shown = sorted(names)
        more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        raise ToolError(f"ModelOpt's export: {', '.join(shown[:_SHOWN])}{more}: {problem}")


def _check_every_matrix(
    request: Request, infos: Mapping[str, TensorInfo], selection: Selection, quantized: list[str]
) -> None:
    """Count from the files: what has two dimensions or more is quantized, or named as left alone."""
    matrices = {name.rpartition(".")[0] for name, info in infos.items() if len(info.shape) >= 2}
    alone = matrices - set(quantized)
    refuse("not quantized, although no exclude pattern names it", alone - selection.uncompressed)
    # The exporter lists in its config what it has left alone; readers skip exactly that.
    listed = read_json(request.output / HF_QUANT_CONFIG)["quantization"]["exclude_modules"]
    covered = {name for name in matrices if any(fnmatchcase(name, pattern) for pattern in listed)}
    refuse("named in exclude_modules, although it is quantized", covered & set(quantized))
    refuse("not quantized, and exclude_modules does not say so", alone - covered)


def check_source_is_covered(infos: Mapping[str, TensorInfo], source: Mapping[str, TensorInfo]) -> None:
    """Every tensor of the source is there again, experts by their names on disk."""
    lost = {name for name, info in source.items() if name not in infos and len(info.shape) < 3}
    refuse("in the source, but not exported", {name for name in lost if not name.endswith("rotary_emb.inv_freq")})


def _check_layer(
    request: Request,
    layer: str,
    name_of_format: str,
    infos: Mapping[str, TensorInfo],
    values: Values,
    source: Mapping[str, TensorInfo],
) -> None:
    original = source.get(f"{layer}.weight")
    weight = infos[f"{layer}.weight"]
    out, into = original.shape if original is not None else _logical_shape(name_of_format, weight)
    expected = expected_tensors(name_of_format, out, into, request.group_size or into)
    if is_searched(name_of_format) and f"{layer}.pre_quant_scale" in infos:
        expected["pre_quant_scale"] = ("BF16", (into,))
    for leaf, form in expected.items():
        name = f"{layer}.{leaf}"
        check_form(name, infos, form)
        if leaf != "weight":
            check_scale(name, values[name])
    if weight.dtype == "F8_E4M3":
        check_codes(f"{layer}.weight", values)


def expected_tensors(name: str, out: int, into: int, group: int) -> dict[str, Form]:
    """Type and shape of every tensor that a layer [out, into] must have in a format; AWQ's smoothing may be absent."""
    one: Form = ("F32", ())
    rows: Form = ("F32", (out,))
    fp8: Form = ("F8_E4M3", (out, into))
    int4: dict[str, Form] = {"weight": ("U8", (out // 2, into)), "weight_scale": ("F32", (out, into // group))}
    fp4: dict[str, Form] = {
        "weight": ("U8", (out, into // 2)),
        "weight_scale": ("F8_E4M3", (out, into // 16)),
        "weight_scale_2": one,
    }
    blocks: tuple[int, ...] = (out // 128, 1, into // 128, 1)
    if blocks == (1, 1, 1, 1):
        blocks = ()  # the exporter drops the sides of whatever has one element
    table: dict[str, dict[str, Form]] = {
        "fp8": {"weight": fp8, "weight_scale": one, "input_scale": one},
        "fp8_per_channel_per_token": {"weight": fp8, "weight_scale": rows},
        "fp8_block": {"weight": fp8, "weight_scale": ("F32", blocks)},
        "int8_sq": {
            "weight": ("I8", (out, into)),
            "weight_scale": rows,
            "input_scale": one,
            "pre_quant_scale": ("BF16", (into,)),
        },
        "int8_weight_only": {"weight": ("I8", (out, into)), "weight_scale": rows},
        "int4_awq": int4,
        "int4_gptq": int4,
        "w4a8_awq": int4 | {"weight_scale_2": one, "input_scale": one},
        "nvfp4": fp4 | {"input_scale": one},
        "nvfp4_awq": fp4 | {"input_scale": one},
        "w4a16_nvfp4": fp4,
        "mxfp4": {"weight": ("U8", (out, into // 2)), "weight_scale": ("U8", (out, into // 32))},
        "mxfp8": {"weight": fp8, "weight_scale": ("U8", (out, into // 32))},
    }
    return table[name]


def _logical_shape(name: str, info: TensorInfo) -> tuple[int, ...]:
    if info.dtype != "U8":
        return info.shape
    return (info.shape[0] * 2, info.shape[1]) if takes_group(name) else (info.shape[0], info.shape[1] * 2)


def check_form(name: str, infos: Mapping[str, TensorInfo], form: Form) -> None:
    """Refuse a tensor that is missing, or of another type or shape."""
    info, (dtype, shape) = infos.get(name), form
    if info is None:
        refuse("missing from the export", {name})
    elif (info.dtype, info.shape) != form:
        refuse(f"{info.dtype} {list(info.shape)}, must be {dtype} {list(shape)}", {name})


def check_codes(name: str, values: Values) -> None:
    """Refuse FP8 codes that are no numbers."""
    if any(int((block.view(torch.uint8) & _E4M3_NAN).max()) == _E4M3_NAN for block in values.blocks(name)):
        refuse("holds NaN codes", {name})


def check_scale(name: str, scale: torch.Tensor) -> None:
    """Refuse scales that are zero, negative, infinite or NaN."""
    if scale.dtype == torch.uint8:  # an exponent of two
        if bool((scale == _E8M0_NAN).any()):
            refuse("scales must be finite", {name})
        return
    scale = scale.float()
    if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
        refuse("scales must be positive and finite", {name})


def _check_shared_inputs(quantized: list[str], values: Values, infos: Mapping[str, TensorInfo]) -> None:
    for layers in _groups(quantized):
        scales = [name for layer in layers if (name := f"{layer}.input_scale") in infos]
        if len({float(values[name]) for name in scales}) > 1:
            refuse("engines load them as one matrix, so their input scales must be equal", set(scales))
        seconds = [name for layer in layers if (name := f"{layer}.weight_scale_2") in infos]
        if len({float(values[name]) for name in seconds}) > 1:
            refuse("engines load them as one matrix, so their weight_scale_2 must be equal", set(seconds))
        smooth = [name for layer in layers if (name := f"{layer}.pre_quant_scale") in infos]
        if smooth and not all(torch.equal(values[smooth[0]], values[name]) for name in smooth[1:]):
            refuse("engines load them as one matrix, so their pre_quant_scale must be equal", set(smooth))


def _groups(layers: list[str]) -> Iterator[list[str]]:
    """Layers that take the same input and that engines fuse."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for layer in layers:
        parent, _, leaf = layer.rpartition(".")
        for group in FUSED_BY_ENGINES:
            if leaf in group:
                found[parent, group].append(layer)
    return iter(found.values())


def _check_kv_scales(request: Request, infos: Mapping[str, TensorInfo], values: Values) -> None:
    config: Any = read_json(request.output / "config.json")
    count = config.get("text_config", config)["num_hidden_layers"]
    for leaf in ("k_scale", "v_scale"):
        names = [name for name in infos if name.endswith(f".{leaf}")]
        if len(names) != count:
            raise ToolError(f"ModelOpt's export has {len(names)} {leaf} for {count} layers")
        for name in names:
            check_scale(name, values[name])


def _check_pattern(formats: Mapping[str, str], layers: list[str], values: Values) -> tuple[int, int]:
    """Groups of four neighbouring weights along the input, and how many have at most two that are not zero: all."""
    groups = conforming = 0
    dense = []
    for layer in layers:
        found = fitting = 0
        for block in values.blocks(f"{layer}.weight"):
            used = (_codes(formats.get(layer, "none"), block).reshape(-1, 4) != 0).sum(dim=1)
            found += used.numel()
            fitting += int((used <= 2).sum())
        groups += found
        conforming += fitting
        if fitting != found:
            dense.append(f"{layer}.weight ({found - fitting:,} of {found:,} groups)")
    refuse(f"not 2:4, only {conforming:,} of {groups:,} groups have at most two weights that are not zero", set(dense))
    return groups, conforming


def _codes(name: str, block: torch.Tensor) -> torch.Tensor:
    """What is zero where a weight is, neighbours along the input beside each other.

    A byte of INT4 holds two outputs, a byte of FP4 two inputs, each with a sign.
    """
    if block.dtype == torch.uint8 and takes_group(name):
        return torch.stack((block & 15, block >> 4))
    if block.dtype == torch.uint8:
        return torch.stack((block & 7, block >> 4 & 7), dim=1)
    return block.view(torch.int8) & 127 if block.dtype == torch.float8_e4m3fn else block
