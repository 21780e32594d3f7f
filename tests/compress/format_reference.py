"""The formats once more, from their descriptions alone, in numpy and float64: nothing of trtbuild is used here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

NUMPY_TYPES = {"F32": "<f4", "F64": "<f8", "U8": "u1", "F8_E4M3": "u1", "BF16": "<u2", "F16": "<f2", "I64": "<i8"}
E4M3_MAX = 448.0


@dataclass(frozen=True)
class Stored:
    """One tensor as it lies in a file: its type, and its bits as integers or floats."""

    dtype: str
    bits: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """Its values in float64."""
        if self.dtype == "BF16":
            return (self.bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        if self.dtype == "F8_E4M3":
            return decode_e4m3(self.bits)
        return self.bits.astype(np.float64)


def read_checkpoint(directory: Path) -> dict[str, Stored]:
    """Every tensor of a directory, parsed from the bytes of its safetensors files."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            bits = np.frombuffer(raw[begin:end], dtype=NUMPY_TYPES[entry["dtype"]]).reshape(entry["shape"])
            tensors[name] = Stored(entry["dtype"], bits)
    return tensors


def decode_e4m3(codes: np.ndarray) -> np.ndarray:
    """Sign, four exponent bits (bias 7), three mantissa bits; no infinities; 0x7F and 0xFF are NaN."""
    codes = codes.astype(np.int64)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    magnitude = np.where((exponent == 15) & (mantissa == 7), np.nan, magnitude)
    return np.where(codes & 128, -magnitude, magnitude)


def round_e4m3(x: np.ndarray) -> np.ndarray:
    """The nearest E4M3 value, ties to the even mantissa, saturating."""
    x = np.clip(np.asarray(x, dtype=np.float64), -E4M3_MAX, E4M3_MAX)
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 2.0**-12))), -6)
    step = 2.0 ** (exponent - 3)
    return np.clip(np.rint(x / step) * step, -E4M3_MAX, E4M3_MAX)


def unpack_int4(packed: np.ndarray) -> np.ndarray:
    """Row r of the bytes holds outputs 2r (low nibble) and 2r+1 (high nibble), two's complement."""
    low, high = packed.astype(np.int64) & 15, packed.astype(np.int64) >> 4
    codes = np.empty((packed.shape[0] * 2, packed.shape[1]), dtype=np.int64)
    codes[0::2], codes[1::2] = low, high
    return np.where(codes > 7, codes - 16, codes)


def weight_of(tensors: dict[str, Stored], layer: str) -> np.ndarray:
    """The weight of `layer` [out, in] in float64, without its input's pre_quant_scale."""
    stored = tensors[f"{layer}.weight"]
    if stored.dtype == "F8_E4M3":
        return stored.values * tensors[f"{layer}.weight_scale"].values
    if stored.dtype == "U8":
        codes, scale = unpack_int4(stored.bits), tensors[f"{layer}.weight_scale"].values
        return codes * np.repeat(scale, codes.shape[1] // scale.shape[1], axis=1)
    return stored.values


def input_of(tensors: dict[str, Stored], layer: str, x: np.ndarray) -> np.ndarray:
    """What the format does to the input of `layer`."""
    if f"{layer}.input_scale" in tensors:
        scale = tensors[f"{layer}.input_scale"].values
        return round_e4m3(x / scale) * scale
    if f"{layer}.pre_quant_scale" in tensors:
        return x * tensors[f"{layer}.pre_quant_scale"].values
    return x


def is_quantized(tensors: dict[str, Stored], layer: str) -> bool:
    return tensors[f"{layer}.weight"].dtype in {"F8_E4M3", "U8"}


class ReferenceExperts(nn.Module):
    """Experts one after another, straight from the files; replaces the fused class of Transformers."""

    def __init__(self, tensors: dict[str, Stored], prefix: str, names: Sequence[str], act: Any) -> None:
        super().__init__()
        self.tensors, self.prefix, self.names, self.act = tensors, prefix, names, act

    def project(self, expert: int, name: str, x: torch.Tensor) -> torch.Tensor:
        layer = f"{self.prefix}.{expert}.{name}"
        return torch.from_numpy(input_of(self.tensors, layer, x.numpy()) @ weight_of(self.tensors, layer).T)

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        gate, up, down = self.names
        out = torch.zeros_like(hidden)
        for token in range(hidden.shape[0]):
            x = hidden[token : token + 1]
            for slot, expert in enumerate(index[token].tolist()):
                middle = self.act(self.project(expert, gate, x)) * self.project(expert, up, x)
                out[token] += (self.project(expert, down, middle) * weights[token, slot])[0]
        return out


def reference_logits(directory: Path, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits in float64 of the checkpoint in `directory`, every linear layer computed as its format says."""
    tensors = read_checkpoint(directory)
    config = AutoConfig.from_pretrained(directory)
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager").eval()
    for name, module in list(model.named_modules()):
        if name.endswith("mlp.experts"):
            mixtral = config.model_type == "mixtral"
            prefix = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
            names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
            model.set_submodule(name, ReferenceExperts(tensors, prefix, names, module.act_fn))
    state = {}
    for name in model.state_dict():
        disk = name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if config.model_type == "mixtral" else name
        if name == "lm_head.weight" and disk not in tensors:
            continue
        layer = disk.removesuffix(".weight")
        value = weight_of(tensors, layer) if disk.endswith(".weight") else tensors[disk].values
        state[name] = torch.from_numpy(np.array(value))
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in tensors and is_quantized(tensors, name):
            module.register_forward_pre_hook(
                lambda _, args, layer=name: (torch.from_numpy(input_of(tensors, layer, args[0].numpy())),)
            )
    with torch.no_grad():
        return model(input_ids).logits
