"""What a linear layer consists of in each format: in the unified checkpoint and in TensorRT-LLM's.

Sources: for the unified side ModelOpt 0.47, modelopt/torch/export/quant_utils.py; for the other NVIDIA/TensorRT-LLM,
tensorrt_llm/quantization/layers.py, layers/moe.py @9a4ff8834752 and @c388fec7fe09, and models/modeling_utils.py
(preprocess_perlayer_weights, LayerQuantConfig) @34a267279384.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trtbuild.errors import ArtifactError, CompatibilityError


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One quantization of weights.

    Args:
        algo: the name in both checkpoints' configs.
        weight: (type in the unified file, type in ours) of the codes; the bytes are the same.
        row_packing: output rows in one row of codes.
        column_packing: input elements in one element of codes.
        scale: type of ``weight_scale``.
        scale_kind: "tensor" (one number), "row" (one for each output) or "group" (one for each group of a row).
        second_scale: whether there is a ``weight_scale_2``.
        input_scale: whether there is an ``input_scale``.
        smoothed: whether inputs are multiplied by ``pre_quant_scale``, ones where the file has none.
        no_experts: why TensorRT-LLM's mixture-of-experts layer cannot load it from a checkpoint; None where it can.
    """

    algo: str
    weight: tuple[str, str]
    row_packing: int = 1
    column_packing: int = 1
    scale: str = "F32"
    scale_kind: str = "tensor"
    second_scale: bool = False
    input_scale: bool = False
    smoothed: bool = False
    no_experts: str | None = None


# MOEWeightWrapper (layers/moe.py) wants one alpha for each expert, [experts, 1], and group scales interleaved by four.
# The loader makes alpha from the second scale and divides the group scales [experts, groups, outputs] by the same
# tensor, so that no shape of it serves both; and it does not interleave.
_NO_W4A8 = "its loader has no shape of weights_scaling_factor_2 for the second scales of several experts"
_NO_INT8 = "the layer has no scales for 8-bit integers"

FORMATS: Mapping[str, Format] = {
    row.algo: row
    for row in (
        Format(algo="FP8", weight=("F8_E4M3", "F8_E4M3"), input_scale=True),
        Format(algo="W4A16_AWQ", weight=("U8", "I8"), row_packing=2, scale_kind="group", smoothed=True),
        Format(
            algo="W4A8_AWQ", weight=("U8", "I8"), row_packing=2, scale_kind="group", second_scale=True,
            input_scale=True, smoothed=True, no_experts=_NO_W4A8,
        ),
        Format(
            algo="W8A8_SQ_PER_CHANNEL", weight=("I8", "I8"), scale_kind="row", input_scale=True, smoothed=True,
            no_experts=_NO_INT8,
        ),
        Format(
            algo="NVFP4", weight=("U8", "U8"), column_packing=2, scale="F8_E4M3", scale_kind="group",
            second_scale=True, input_scale=True,
        ),
    )
}  # fmt: skip
MIXED = "MIXED_PRECISION"
KV_CACHES = (None, "FP8", "INT8")
_GROUPS = {"NVFP4": 16}
_EXPORT_AGAIN = "export the checkpoint again with ModelOpt 0.47; config.json alone does not say it"


@dataclass(frozen=True, slots=True)
class Coding:
    """How a layer's weights are stored: its format (None: plain) and the group size (0: no groups)."""

    format: Format | None = None
    group: int = 0

    def section(self) -> dict[str, Any]:
        """What TensorRT-LLM's QuantConfig says of such a layer."""
        made: dict[str, Any] = {"quant_algo": self.format.algo if self.format else None}
        if self.group:
            made["group_size"] = self.group
        if self.format is not None and self.format.row_packing == 2:
            made |= {"has_zero_point": False, "pre_quant_scale": True}
        return made


@dataclass(frozen=True, slots=True)
class Quantized:
    """How a checkpoint is quantized: all layers alike, or (`layers`) each one in its own way; and its KV cache."""

    coding: Coding
    kv_cache: str | None
    layers: Mapping[str, Coding] | None = None

    @property
    def algo(self) -> str | None:
        """The name in the config."""
        if self.layers is not None:
            return MIXED
        return self.coding.format.algo if self.coding.format else None

    def at(self, prefix: str) -> Coding:
        """How the layer `prefix` is stored, if the file holds codes for it."""
        return self.coding if self.layers is None else self.layers.get(prefix, Coding())

    def section(self, excluded: list[str]) -> dict[str, Any]:
        """The ``quantization`` section of TensorRT-LLM's config; `excluded` are names and patterns of modules."""
        made = {"quant_algo": self.algo, "kv_cache_quant_algo": self.kv_cache}
        if self.layers is not None or self.coding.format is None:
            return made
        return made | self.coding.section() | {"exclude_modules": excluded}


def read_quantization(section: Mapping[str, Any], where: str) -> Quantized:
    """What the quantization section of a unified checkpoint says (`Source.quantization`).

    Raises:
        CompatibilityError: another tool's quantization, or a format that is not in `FORMATS`.
        ArtifactError: the section lacks the group size that its format has, or the layers that it speaks of.
    """
    if not section:
        return Quantized(Coding(), None)
    if section["quant_method"] != "modelopt":
        raise CompatibilityError(
            f"{where} is quantized by {section['quant_method']}, the conversion reads ModelOpt's unified format",
            "compress the original model",
        )
    kv_cache = _kv_cache(section)
    if kv_cache not in KV_CACHES:
        raise CompatibilityError(
            f"{where} has a KV cache in {kv_cache}; TensorRT-LLM's engines take FP8, INT8 or none", "choose fp8"
        )
    if section.get("quant_algo") == MIXED:
        return Quantized(Coding(), kv_cache, _read_layers(section.get("quantized_layers"), where))
    return Quantized(_read_coding(section, where), kv_cache)


def _read_layers(layers: Any, where: str) -> dict[str, Coding]:
    if not isinstance(layers, dict) or not layers:
        raise ArtifactError(
            f"{where}: hf_quant_config.json says {MIXED}, but its quantized_layers names no layer", _EXPORT_AGAIN
        )
    return {name: _read_coding(entry, f"{where}, {name}") for name, entry in layers.items()}


def _read_coding(section: Mapping[str, Any], where: str) -> Coding:
    """The format and group size of a checkpoint or of one layer."""
    algo = section.get("quant_algo")
    if algo not in (None, "NO_QUANT", *FORMATS):
        raise CompatibilityError(
            f"{where} is quantized as {algo}; convertible are {', '.join(FORMATS)} and unquantized checkpoints",
            "choose another format, or the runtime trtllm",
        )
    chosen = FORMATS.get(str(algo))
    if chosen is None or chosen.scale_kind != "group":
        return Coding(chosen)
    group = section.get("group_size", _GROUPS.get(chosen.algo))
    if not isinstance(group, int) or group < 1:
        raise ArtifactError(
            f"{where}: hf_quant_config.json gives {chosen.algo} the group size {group!r}", _EXPORT_AGAIN
        )
    if chosen.algo == "NVFP4" and group != _GROUPS["NVFP4"]:
        raise CompatibilityError(f"{where} has NVFP4 in groups of {group}; TensorRT-LLM reads groups of 16")
    return Coding(chosen, group)


def _kv_cache(section: Mapping[str, Any]) -> str | None:
    """The KV cache's type, from the nested shape (a name) or the flat one (bits and kind)."""
    if "kv_cache_quant_algo" in section:
        name = section["kv_cache_quant_algo"]
        return None if name is None else str(name)
    scheme = section.get("kv_cache_scheme")
    if scheme is None or isinstance(scheme, str):
        return scheme
    kinds = {("float", 8): "FP8", ("int", 8): "INT8"}
    return kinds.get((scheme.get("type"), scheme.get("num_bits")), f"{scheme.get('num_bits')}-bit {scheme.get('type')}")
