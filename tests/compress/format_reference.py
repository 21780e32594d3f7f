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

NUMPY_TYPES = {
    "F32": "<f4", "F64": "<f8", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "BF16": "<u2", "F16": "<f2", "I64": "<i8",
}  # fmt: skip
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


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def unpack_e2m1(packed: np.ndarray) -> np.ndarray:
    """Column c of the bytes holds inputs 2c (low nibble) and 2c+1 (high nibble)."""
    values = np.empty((*packed.shape[:-1], packed.shape[-1] * 2))
    values[..., 0::2], values[..., 1::2] = E2M1[packed & 15], E2M1[packed >> 4]
    return values


def round_e2m1(x: np.ndarray) -> np.ndarray:
    """The nearest E2M1 value, ties to the code with an even last bit."""
    distance = np.abs(np.abs(x)[..., None] - E2M1[:8])
    nearest = distance == distance.min(axis=-1, keepdims=True)
    even = np.array([code % 2 == 0 for code in range(8)])
    tie = nearest.sum(axis=-1, keepdims=True) > 1
    code = np.where(tie, nearest & even, nearest).argmax(axis=-1)
    return np.copysign(E2M1[code], x)


def round_nvfp4(x: np.ndarray, scale: float) -> np.ndarray:
    """Blocks of 16 in E2M1, each with an E4M3 scale, all under one scale of the tensor."""
    blocks = x.reshape(*x.shape[:-1], -1, 16)
    inner = round_e4m3(np.abs(blocks).max(axis=-1, keepdims=True) / 6 / scale)
    both = np.where(inner > 0, inner * scale, 1.0)
    return np.where(inner > 0, round_e2m1(np.clip(blocks / both, -6, 6)) * both, 0.0).reshape(x.shape)


def round_mx(x: np.ndarray, largest: float) -> np.ndarray:
    """Blocks of 32 under the least power of two that saturates nothing."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    most = np.abs(blocks).max(axis=-1, keepdims=True)
    scale = 2.0 ** np.clip(np.ceil(np.log2(np.where(most > 0, most, 1e-40) / largest)), -127, 127)
    rounded = round_e4m3(blocks / scale) if largest == E4M3_MAX else round_e2m1(blocks / scale)
    return (rounded * scale).reshape(x.shape)


def by_groups(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Neighbours along the input times the scale of their group."""
    return values * np.repeat(scale, values.shape[1] // scale.shape[1], axis=1)


def weight_of(tensors: dict[str, Stored], layer: str, algo: str | None) -> np.ndarray:
    """The weight of `layer` [out, in] in float64, without its input's pre_quant_scale."""
    stored = tensors[f"{layer}.weight"]
    if f"{layer}.weight_scale" not in tensors:
        return stored.values
    scale = tensors[f"{layer}.weight_scale"].values
    second = tensors.get(f"{layer}.weight_scale_2")
    match algo:
        case "FP8":
            return stored.values * scale
        case "FP8_PER_CHANNEL_PER_TOKEN" | "W8A8_SQ_PER_CHANNEL" | "W8A16":
            return stored.values * scale[:, None]
        case "FP8_PB_WO":
            return stored.values * np.kron(scale.reshape(stored.bits.shape[0] // 128, -1), np.ones((128, 128)))
        case "W4A16_AWQ":
            return by_groups(unpack_int4(stored.bits), scale)
        case "W4A8_AWQ":
            assert second is not None
            return round_e4m3(by_groups(unpack_int4(stored.bits), scale) / second.values) * second.values
        case "NVFP4" | "W4A16_NVFP4" | "NVFP4_AWQ":
            assert second is not None
            return by_groups(unpack_e2m1(stored.bits), scale) * second.values
        case "MXFP4":
            return by_groups(unpack_e2m1(stored.bits), 2.0 ** (scale - 127))
        case "MXFP8":
            return by_groups(stored.values, 2.0 ** (scale - 127))
    raise ValueError(algo)


def input_of(tensors: dict[str, Stored], layer: str, x: np.ndarray, algo: str | None = None) -> np.ndarray:
    """What the format does to the input of `layer`."""
    if f"{layer}.weight_scale" not in tensors:
        return x
    if f"{layer}.pre_quant_scale" in tensors:
        x = x * tensors[f"{layer}.pre_quant_scale"].values
    scale = tensors[f"{layer}.input_scale"].values if f"{layer}.input_scale" in tensors else np.nan
    match algo:
        case "FP8" | "W4A8_AWQ":
            return round_e4m3(x / scale) * scale
        case "FP8_PER_CHANNEL_PER_TOKEN":
            own = np.abs(x).max(axis=-1, keepdims=True) / E4M3_MAX
            own[own == 0] = 1.0
            return round_e4m3(x / own) * own
        case "W8A8_SQ_PER_CHANNEL":
            return np.clip(np.rint(x / scale), -128, 127) * scale
        case "NVFP4" | "NVFP4_AWQ":
            return round_nvfp4(x, float(scale))
        case "MXFP4":
            return round_mx(x, 6.0)
        case "MXFP8":
            return round_mx(x, E4M3_MAX)
    return x


def is_quantized(tensors: dict[str, Stored], layer: str) -> bool:
    return tensors[f"{layer}.weight"].dtype in {"F8_E4M3", "U8", "I8"}


def algorithm(directory: Path) -> str | None:
    """What the checkpoint says of itself, in upper case."""
    path = directory / "hf_quant_config.json"
    name = json.loads(path.read_text())["quantization"]["quant_algo"] if path.exists() else None
    return name.upper() if name else None


class ReferenceExperts(nn.Module):
    """Experts one after another, straight from the files; replaces the fused class of Transformers."""

    def __init__(
        self, tensors: dict[str, Stored], prefix: str, names: Sequence[str], act: Any, algo: str | None
    ) -> None:
        super().__init__()
        self.tensors, self.prefix, self.names, self.act, self.algo = tensors, prefix, names, act, algo

    def project(self, expert: int, name: str, x: torch.Tensor) -> torch.Tensor:
        layer = f"{self.prefix}.{expert}.{name}"
        given = input_of(self.tensors, layer, x.numpy(), self.algo)
        return torch.from_numpy(given @ weight_of(self.tensors, layer, self.algo).T)

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
    tensors, algo = read_checkpoint(directory), algorithm(directory)
    config = AutoConfig.from_pretrained(directory)
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager").eval()
    for name, module in list(model.named_modules()):
        if name.endswith("mlp.experts"):
            mixtral = config.model_type == "mixtral"
            prefix = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
            names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
            model.set_submodule(name, ReferenceExperts(tensors, prefix, names, module.act_fn, algo))
    state = {}
    for name in model.state_dict():
        disk = name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if config.model_type == "mixtral" else name
        if name == "lm_head.weight" and disk not in tensors:
            continue
        layer = disk.removesuffix(".weight")
        value = weight_of(tensors, layer, algo) if disk.endswith(".weight") else tensors[disk].values
        state[name] = torch.from_numpy(np.array(value))
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in tensors and is_quantized(tensors, name):
            module.register_forward_pre_hook(
                lambda _, args, layer=name: (torch.from_numpy(input_of(tensors, layer, args[0].numpy(), algo)),)
            )
    with torch.no_grad():
        return model(input_ids).logits
