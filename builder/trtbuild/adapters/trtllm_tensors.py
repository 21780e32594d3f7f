"""The rules of `trtllm_checkpoint` on tensors; each returns its problems and what it looked at.

Shapes are [outputs, inputs]. How formats are stored: NVIDIA/Model-Optimizer, modelopt/torch/export/quant_utils.py
@a2fbac7b.
"""

from __future__ import annotations

import fnmatch
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from trtbuild.checkpoint_files import CheckpointFiles
from trtbuild.safetensors_header import TensorInfo
from trtbuild.support import group_sizes

Found = tuple[list[str], str]
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
ROW_PARALLEL = ("o_proj", "down_proj")
COLUMN_PARALLEL = tuple(name for names in FUSED for name in names)
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# Modules that TensorRT-LLM never builds as quantized linear layers.
_NEVER_QUANTIZED = ("gate", "router", "shared_expert_gate")
_PLAIN = {"BF16", "F16", "F32"}
_SCALES = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
_UNPACK = {"F32": "<f", "F16": "<e", "F64": "<d"}
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Quantized:
    """What ``hf_quant_config.json`` says."""

    algo: str | None = None
    kv_algo: str | None = None
    group_size: int | None = None
    exclude: tuple[str, ...] = ()
    layers: Mapping[str, Quantized] = field(default_factory=dict)  # of MIXED_PRECISION, by the layer's name

    def split(self, linears: Iterable[Linear]) -> list[tuple[Quantized, list[Linear]]]:
        """The layers of each format with what holds for it; those in floating point are among the first."""
        if not self.layers:
            return [(self, list(linears))]
        parts: dict[tuple[str | None, int | None], list[Linear]] = {}
        first = next(iter(self.layers.values()))
        for linear in linears:
            found = self.layers.get(linear.name, first)
            parts.setdefault((found.algo, found.group_size), []).append(linear)
        return [
            (Quantized(algo, self.kv_algo, group, self.exclude), members) for (algo, group), members in parts.items()
        ]


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear layer: its weight and the scales beside it, by suffix."""

    name: str
    weight: TensorInfo
    scales: Mapping[str, TensorInfo]

    @property
    def short(self) -> str:
        """The last part of the name, such as q_proj."""
        return self.name.rpartition(".")[2]

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is stored in a code."""
        return self.weight.dtype not in _PLAIN

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to one expert of a mixture."""
        return ".experts." in self.name


@dataclass(frozen=True, slots=True)
class Storage:
    """How one format stores a weight.

    Args:
        dtype: The type of the codes.
        rows: Outputs in a stored row.
        columns: Inputs in a stored element.
        scalars: Scales of one number that it must have.
        grouped: The scales of groups of inputs, whose size ``group_size`` says.
        rowwise: The scales of single outputs.
        tiled: The scales of tiles of 128 x 128, [O/128, 1, I/128, 1] or without the ones.
    """

    dtype: str
    rows: int = 1
    columns: int = 1
    scalars: tuple[str, ...] = ()
    grouped: str | None = None
    rowwise: str | None = None
    tiled: str | None = None


# By quant_algo as TensorRT-LLM has it. Formats without a linear layer in TensorRT-LLM have no row.
LAYOUTS: Mapping[str, Storage] = {
    "FP8": Storage("F8_E4M3", scalars=("weight_scale", "input_scale")),
    "FP8_PER_CHANNEL_PER_TOKEN": Storage("F8_E4M3", rowwise="weight_scale"),
    "FP8_BLOCK_SCALES": Storage("F8_E4M3", tiled="weight_scale"),
    "W8A16": Storage("I8", rowwise="weight_scale"),
    "W4A16_AWQ": Storage("U8", rows=2, grouped="weight_scale"),
    "W4A8_AWQ": Storage("U8", rows=2, grouped="weight_scale", scalars=("weight_scale_2", "input_scale")),
    "NVFP4": Storage("U8", columns=2, grouped="weight_scale", scalars=("weight_scale_2", "input_scale")),
    "W4A16_NVFP4": Storage("U8", columns=2, grouped="weight_scale", scalars=("weight_scale_2",)),
    "MXFP8": Storage("F8_E4M3", grouped="weight_scale"),
}
_TILE = 128


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads scales."""

    files: CheckpointFiles
    tensors: Mapping[str, TensorInfo]

    def raw(self, tensor: TensorInfo) -> bytes:
        """The bytes of `tensor`."""
        return self.files.read(tensor.shard, tensor.begin, tensor.bytes)

    def number(self, tensor: TensorInfo) -> float:
        """The one value of `tensor`."""
        raw = self.raw(tensor)
        if tensor.dtype == "BF16":  # the upper half of a float32
            return float(struct.unpack("<f", b"\0\0" + raw)[0])
        return float(struct.unpack(_UNPACK[tensor.dtype], raw)[0])


def linears(tensors: Mapping[str, TensorInfo]) -> list[Linear]:
    """Every linear layer of the decoder, and the output head; embeddings and norms are none."""
    found = []
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module == name or len(tensor.shape) != 2 or not re.search(r"(^|\.)(layers\.\d+\.|lm_head$)", module):
            continue
        scales = {suffix: tensors[f"{module}.{suffix}"] for suffix in _SCALES if f"{module}.{suffix}" in tensors}
        found.append(Linear(module, tensor, scales))
    return found


def few(problems: list[str]) -> list[str]:
    """The first problems, and how many more there are."""
    more = len(problems) - _SHOWN
    return problems if more <= 0 else [*problems[:_SHOWN], f"and {more} more of this kind"]


def packing(layers: Iterable[Linear], quantized: Quantized) -> Found:
    """Types and shapes of weights and their scales."""
    if quantized.algo is None:
        wrong = [
            f"{layer.name}: {layer.weight.dtype} in a checkpoint without quant_algo"
            for layer in layers
            if layer.is_quantized
        ]
        return few(wrong), "weights in floating point"
    storage, problems, count = LAYOUTS[quantized.algo], [], 0
    for layer in layers:
        if not layer.is_quantized:
            continue
        count += 1
        if layer.weight.dtype != storage.dtype:
            problems.append(
                f"{layer.name}: the weight is {layer.weight.dtype}, {quantized.algo} stores {storage.dtype}"
            )
            continue
        problems += [f"{layer.name}: {name} is missing" for name in storage.scalars if name not in layer.scales]
        problems += _one_number(layer, storage.scalars)
        problems += _grouped(layer, storage, quantized)
        problems += _shaped(layer, storage)
    if not count:
        problems.append(f"quant_algo is {quantized.algo}, but no layer is quantized")
    return few(problems), f"{count} layers in {quantized.algo}"


def _one_number(layer: Linear, names: Iterable[str]) -> list[str]:
    wrong = [name for name in names if name in layer.scales and layer.scales[name].elements != 1]
    return [f"{layer.name}: {name} has shape {list(layer.scales[name].shape)}, not one number" for name in wrong]


def _grouped(layer: Linear, storage: Storage, quantized: Quantized) -> list[str]:
    """The scales of groups: one per output and group of inputs."""
    if storage.grouped is None:
        return []
    size, algo = quantized.group_size, quantized.algo or ""
    if not isinstance(size, int) or size < 1:
        return [f"{layer.name}: hf_quant_config.json names no group_size for {algo}"]
    allowed = group_sizes(algo)
    if allowed and size not in allowed:
        return [f"{layer.name}: groups of {size}; TensorRT-LLM's kernels take {' or '.join(map(str, allowed))}"]
    outputs, inputs = logical_shape(layer, storage)
    if inputs % size:
        return [f"{layer.name}: {inputs} inputs are no whole number of groups of {size}"]
    scale, expected = layer.scales.get(storage.grouped), (outputs, inputs // size)
    found = None if scale is None else scale.shape
    if found == expected:
        return []
    shown = "is missing" if found is None else f"has shape {list(found)}, not {list(expected)}"
    return [f"{layer.name}: {storage.grouped} {shown}"]


def _shaped(layer: Linear, storage: Storage) -> list[str]:
    """The scales of outputs and of tiles."""
    outputs, inputs = logical_shape(layer, storage)
    tiles = (-(-outputs // _TILE), -(-inputs // _TILE))
    wanted = {
        storage.rowwise: ((outputs,),),
        storage.tiled: (tiles, (tiles[0], 1, tiles[1], 1)),
    }
    problems = []
    for name, shapes in wanted.items():
        if name is None:
            continue
        scale = layer.scales.get(name)
        if scale is None:
            problems.append(f"{layer.name}: {name} is missing")
        elif scale.shape not in shapes:
            problems.append(f"{layer.name}: {name} has shape {list(scale.shape)}, not {list(shapes[0])}")
    return problems


def logical_shape(layer: Linear, storage: Storage | None) -> tuple[int, int]:
    """Outputs and inputs of a layer, unpacked."""
    rows, columns = layer.weight.shape
    packed = storage if layer.is_quantized and storage is not None else Storage("")
    return rows * packed.rows, columns * packed.columns


def exclusions(layers: Iterable[Linear], quantized: Quantized) -> Found:
    """A layer is left in floating point exactly where ``exclude_modules`` names it; patterns heed the case."""
    if quantized.algo is None:
        return [], "nothing is quantized"
    problems, plain = [], 0
    for layer in layers:
        named = any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in quantized.exclude)
        if named and layer.is_quantized:
            problems.append(f"{layer.name} is quantized, but exclude_modules names it")
        if not layer.is_quantized and not named and layer.short not in _NEVER_QUANTIZED:
            problems.append(f"{layer.name} is not quantized, but exclude_modules does not name it")
        plain += not layer.is_quantized
    return few(problems), f"{plain} layers left in floating point"


def scales(layers: Iterable[Linear], reader: Reader) -> Found:
    """Scales of one number are positive and finite."""
    problems, count = [], 0
    for layer in layers:
        for name, tensor in layer.scales.items():
            if tensor.elements != 1:
                continue
            count += 1
            value = reader.number(tensor)
            if not (math.isfinite(value) and value > 0):
                problems.append(f"{layer.name}.{name} is {value}")
    return few(problems), f"{count} numbers, positive and finite"


def kv_scales(tensors: Mapping[str, TensorInfo], quantized: Quantized, reader: Reader) -> Found:
    """k_scale and v_scale come for every layer or for none, and only with a quantized KV cache."""
    pattern = re.compile(r"(.*\.layers\.\d+\.).*\.([kv]_scale)$")
    found: dict[str, set[str]] = {}
    problems = []
    for name, tensor in tensors.items():
        match = pattern.match(name)
        if match is None:
            continue
        found.setdefault(match[1], set()).add(match[2])
        value = reader.number(tensor) if tensor.elements == 1 else math.nan
        if not (math.isfinite(value) and value > 0):
            problems.append(f"{name} is {value}" if tensor.elements == 1 else f"{name} is no single number")
    if found and quantized.kv_algo is None:
        problems.append("there are k_scale and v_scale, but kv_cache_quant_algo is not set")
    every = {match[1] for name in tensors if (match := re.match(r"(.*\.layers\.\d+\.)self_attn\.", name))}
    partial = sorted(layer for layer in every if found and found.get(layer) != {"k_scale", "v_scale"})
    problems += [f"{layer}self_attn: k_scale or v_scale is missing, other layers have both" for layer in partial]
    return few(problems), f"{len(found)} layers with scales"


def divisions(layers: Iterable[Linear], quantized: Quantized, size: int, attention_dp: bool) -> Found:  # noqa: FBT001
    """Every rank gets whole rows, columns and groups."""
    if size == 1:
        return [], "one rank"
    storage = LAYOUTS.get(quantized.algo or "")
    group = quantized.group_size or 1
    problems = []
    for layer in layers:
        if layer.is_expert or (attention_dp and layer.short in _ATTENTION):
            continue
        outputs, inputs = logical_shape(layer, storage)
        shared = layer.short in {"k_proj", "v_proj"}  # key-value heads may be repeated over ranks
        if layer.short in ROW_PARALLEL and inputs % size:
            problems.append(f"{layer.name}: {inputs} inputs are not divided by {size}")
        elif layer.short in ROW_PARALLEL and layer.is_quantized and (inputs // size) % group:
            problems.append(f"{layer.name}: {inputs} inputs are not divided by {size} into whole groups of {group}")
        if layer.short in COLUMN_PARALLEL and outputs % size and not shared:
            problems.append(f"{layer.name}: {outputs} outputs are not divided by {size}")
    return few(problems), f"{size} ranks"
