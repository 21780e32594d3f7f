"""Check a checkpoint in the form of compressed-tensors by its files alone, as `checks` does for ModelOpt's."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trtbuild.compress.checks import (
    Checked,
    Form,
    Values,
    check_codes,
    check_form,
    check_scale,
    check_source_is_covered,
    refuse,
)
from trtbuild.compress.request import Request
from trtbuild.compress.selection import Selection
from trtbuild.compress.source import read_tensors
from trtbuild.safetensors_header import TensorInfo
from trtbuild.weight_formats import is_packed_int4

_LEAVES = ("weight_packed", "weight_shape", "weight_scale", "input_scale", "pre_quant_scale")


def check_compressed(request: Request, selection: Selection, source: Mapping[str, TensorInfo]) -> Checked:
    """Check every tensor of the request's output; `source` describes the tensors that it was made from.

    Raises:
        ToolError: Names the tensor: missing, of a wrong type or shape, with an unusable scale or code, not pruned, or
            no part of this form.
    """
    infos = read_tensors(request.output)
    values = Values(request.output, infos)
    formats = selection.disk_formats
    expected = {
        f"{layer}.{leaf}": form
        for layer, chosen in formats.items()
        for leaf, form in _forms(chosen, _shape(layer, infos, source), request).items()
    }
    scales = {name for name in infos if name.rpartition(".")[2] in _LEAVES}
    refuse("no part of a compressed-tensors checkpoint of these layers", scales - expected.keys())
    for name, form in expected.items():
        check_form(name, infos, form)
        if name.endswith("_scale"):
            check_scale(name, values[name])
        elif name.endswith(".weight"):
            check_codes(name, values)
    packed = {name for name, chosen in formats.items() if is_packed_int4(chosen)}
    matrices = {name.removesuffix(".weight") for name, info in infos.items() if len(info.shape) >= 2} - set(expected)
    plain = {name for name in matrices if name not in formats}
    refuse("not quantized, although no exclude pattern names it", plain - selection.uncompressed)
    written = dict(infos) | {f"{name}.weight": infos[f"{name}.weight_packed"] for name in packed}
    check_source_is_covered(written, source)
    groups, conforming = _pattern(selection, values) if request.sparse else (0, 0)
    return Checked(
        tensors=len(infos),
        bytes=sum(info.bytes for info in infos.values()),
        quantized_projections=len(formats),
        excluded_modules=tuple(sorted(selection.uncompressed)),
        groups=groups,
        conforming=conforming,
    )


def _shape(layer: str, infos: Mapping[str, TensorInfo], source: Mapping[str, TensorInfo]) -> tuple[int, ...]:
    """Outputs and inputs; a source that keeps all experts in one tensor does not say it for one of them."""
    original = source.get(f"{layer}.weight")
    if original is not None:
        return original.shape
    packed, plain = infos.get(f"{layer}.weight_packed"), infos.get(f"{layer}.weight")
    if packed is not None:
        return packed.shape[0], packed.shape[1] * 8
    return plain.shape if plain is not None else (0, 0)


def _forms(name: str, shape: tuple[int, ...], request: Request) -> dict[str, Form]:
    out, into = shape
    if is_packed_int4(name):
        return {
            "weight_packed": ("I32", (out, into // 8)),
            "weight_shape": ("I64", (2,)),
            "weight_scale": ("BF16", (out, into // (request.group_size or into))),
        }
    return {"weight": ("F8_E4M3", (out, into)), "weight_scale": ("F32", (1,)), "input_scale": ("F32", (1,))}


def _pattern(selection: Selection, values: Values) -> tuple[int, int]:
    """Groups of four neighbouring weights along the input, and how many have at most two that are not zero: all."""
    groups = conforming = 0
    for layer in selection.compressed.values():
        found = fitting = 0
        packed = is_packed_int4(selection.disk_formats.get(layer, "none"))
        for block in values.blocks(f"{layer}.weight_packed" if packed else f"{layer}.weight"):
            used = _used(block).reshape(-1, 4).sum(dim=1)
            found += used.numel()
            fitting += int((used <= 2).sum())
        groups, conforming = groups + found, conforming + fitting
        if fitting != found:
            refuse(f"not 2:4, only {fitting:,} of {found:,} groups have at most two that are not zero", {layer})
    return groups, conforming


def _used(block: torch.Tensor) -> torch.Tensor:
    """Whether each weight of a flat block is not zero, in the order of the inputs."""
    if block.dtype == torch.int32:
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        return (block[:, None] >> shifts & 15) != 8
    return (block.view(torch.int8) & 127 if block.dtype == torch.float8_e4m3fn else block) != 0
