"""What a checkpoint's tensors say against its config: sizes that contradict it, and quantization it has already."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trtbuild.safetensors_header import TensorInfo

# What GPTQ and AWQ tools write beside the weights: vllm-project/vllm, vllm/model_executor/layers/quantization/awq.py,
# AWQConfig.get_config_filenames and from_config @000796acdf1e.
QUANTIZER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_EMBEDDING = "embed_tokens.weight"
_PLAIN = {"F64", "F32", "F16", "BF16"}
_CODES = {"F8_E4M3", "F8_E5M2", "U8", "I8", "F4"}
_PACKED = (".qweight", ".weight_packed")
# Embeddings of another width than the layers, projected up (OPT's word_embed_proj_dim, and older names for it).
_OWN_WIDTH = ("word_embed_proj_dim", "embedding_size")


@dataclass(frozen=True, slots=True)
class Quantization:
    """Quantization that a checkpoint already has."""

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


def contradictions(tensors: Sequence[TensorInfo], text: Mapping[str, Any], numbers: Mapping[str, Any]) -> list[str]:
    """What the tensors say otherwise than the config, for models that name their embedding ``embed_tokens``.

    Args:
        tensors: every tensor of the checkpoint.
        text: the part of the config that describes the language model.
        numbers: ``vocab_size``, ``hidden_size`` and ``num_layers`` as the config has them.
    """
    found = []
    for tensor in tensors:
        if tensor.name == _EMBEDDING or tensor.name.endswith(f".{_EMBEDDING}"):
            found += _embedding(tensor, text, numbers)
            found += _layers(tensor.name.removesuffix(_EMBEDDING), tensors, text, numbers["num_layers"])
    return found


def _embedding(tensor: TensorInfo, text: Mapping[str, Any], numbers: Mapping[str, Any]) -> list[str]:
    """A vocabulary may be padded beyond the config's; fewer rows or another width cannot be."""
    if tensor.dtype not in _PLAIN or len(tensor.shape) != 2:
        return []
    (rows, width), vocabulary, hidden = tensor.shape, numbers["vocab_size"], numbers["hidden_size"]
    fits = width == hidden or any(name in text for name in _OWN_WIDTH)
    if rows >= vocabulary and fits:
        return []
    return [
        f"{tensor.name} has shape [{rows}, {width}], config.json says vocab_size {vocabulary}, hidden_size {hidden}"
    ]


def _layers(prefix: str, tensors: Iterable[TensorInfo], text: Mapping[str, Any], configured: int) -> list[str]:
    """Compare the decoder layers; layers that predict further tokens are stored after them and are not counted."""
    pattern = re.compile(re.escape(f"{prefix}layers.") + r"(\d+)\.")
    layers = {int(match[1]) for tensor in tensors if (match := pattern.match(tensor.name))}
    further = text.get("num_nextn_predict_layers")
    most = configured + (further if isinstance(further, int) else 0)
    if not layers or (set(range(configured)) <= layers and max(layers) < most):
        return []
    missing = sorted(set(range(configured)) - layers)
    if missing:
        return [f"the weights lack decoder layer {missing[0]}, config.json says num_hidden_layers {configured}"]
    return [f"the weights hold {len(layers)} decoder layers, config.json says num_hidden_layers {configured}"]


def find_quantization(
    config: Mapping[str, Any], beside: Mapping[str, Mapping[str, Any]], tensors: Iterable[TensorInfo]
) -> Quantization | None:
    """How a checkpoint is quantized already, from ModelOpt's file, its config, other tools' files, or its tensors.

    Args:
        config: ``config.json``.
        beside: the contents of ``hf_quant_config.json`` and of `QUANTIZER_FILES`, empty where there is no such file.
        tensors: every tensor of the checkpoint.
    """
    nested = beside["hf_quant_config.json"].get("quantization")
    if isinstance(nested, dict):
        return Quantization("modelopt", nested)
    inline = config.get("quantization_config")
    if isinstance(inline, dict):
        parameters = {key: value for key, value in inline.items() if key != "quant_method"}
        return Quantization(str(inline.get("quant_method", "unknown")), parameters)
    for name, method in QUANTIZER_FILES.items():
        if beside[name]:
            likely = "awq" if "w_bit" in beside[name] else method
            return Quantization(str(beside[name].get("quant_method", likely)), beside[name])
    for tensor in tensors:
        coded = tensor.dtype in _CODES and len(tensor.shape) >= 2 and tensor.name.endswith((".weight", "_proj"))
        if coded or tensor.name.endswith(_PACKED):
            return Quantization("by an unknown tool", {"tensor": tensor.name, "dtype": tensor.dtype})
    return None
