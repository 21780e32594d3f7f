"""Unified checkpoints of every architecture and format with random codes and scales: no model is quantized for them.

Shapes, types and names are those of ModelOpt's unified export; what a fused layer has only once is equal in its parts.
"""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tiny import save_checkpoint

GROUP = 32
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
# The layers' formats of a MIXED_PRECISION checkpoint, by what their names hold.
MIXED = (("o_proj", "bf16"), ("self_attn", "FP8"), ("down_proj", "NVFP4"), ("", "W4A16_AWQ"))
_QWEN2_MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
}  # fmt: skip
_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
    "full_attention": {"rope_type": "default", "rope_theta": 50000.0},
}
# name: (architecture of tiny.py, what its config needs beyond SIZES)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True, "vocab_size": 321}),
    "llama-tied": ("llama-tied", {"num_key_value_heads": 1}),
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", _QWEN2_MOE),
    "qwen3": ("qwen3", {"head_dim": 64}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 32, "moe_intermediate_size": 256, "norm_topk_prob": True}),
    "gemma2": ("gemma2", {"head_dim": 32}),
    "gemma3": (
        "gemma3",
        {
            "head_dim": 32,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": _ROPE,
        },
    ),
    "phi3": ("phi3", {}),
}
_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.\w+_proj|.*experts?\.(\d+\.)?\w+|mlp\.\w+_proj)\.weight")


def plain(path: Path, name: str, **changes: Any) -> Path:
    """The unquantized checkpoint of `name` in bf16.

    Gemma stores norm weights as offsets from 1, TensorRT-LLM their sum in bf16: these are such that it is exact.
    """
    architecture, settings = MODELS[name]
    save_checkpoint(path, architecture, overrides=SIZES | settings | changes, tokenizer=False)
    if name.startswith("gemma"):
        tensors = load_file(path / "model.safetensors")
        for key, tensor in tensors.items():
            if "norm" in key:
                tensors[key] = ((tensor.float() + 1).bfloat16().float() - 1).bfloat16()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def quantized(source: Path, path: Path, algo: str, kv_cache: str | None = None, *, equal: bool = False) -> Path:
    """`source` with random codes of format `algo` for every linear layer; "bf16" keeps the weights.

    With `equal`, scales that the conversion would merge are equal, so that it changes no value.
    """
    tensors = load_file(source / "model.safetensors")
    made: dict[str, torch.Tensor] = {}
    layers: dict[str, Any] = {}
    for name, tensor in tensors.items():
        prefix = name.removesuffix(".weight")
        own = algorithm(prefix, algo) if _LINEAR.fullmatch(name) else "bf16"
        if own != "bf16":
            codes = _codes(prefix, own, tuple(tensor.shape), equal=equal)
            made |= {f"{prefix}.{key}": value for key, value in codes.items()}
            layers[prefix] = {"quant_algo": own} | _section(own)
        else:
            made[name] = tensor
        if kv_cache and name.endswith("self_attn.o_proj.weight"):
            attention = name.removesuffix("o_proj.weight")
            made[f"{attention}k_proj.k_scale"] = 0.01 + 0.05 * torch.rand((), generator=_random(name + "k"))
            other = _random(name + ("k" if equal else "v"))
            made[f"{attention}v_proj.v_scale"] = 0.01 + 0.05 * torch.rand((), generator=other)
    path.mkdir(parents=True)
    save_file(made, path / "model.safetensors", metadata={"format": "pt"})
    for extra in ("config.json", "generation_config.json"):
        (path / extra).write_bytes((source / extra).read_bytes())
    if algo != "bf16" or kv_cache:
        section: dict[str, Any] = {"quant_algo": None if algo == "bf16" else algo, "kv_cache_quant_algo": kv_cache}
        section |= {"quantized_layers": layers} if algo == "MIXED_PRECISION" else _section(algo)
        config = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": section}
        (path / "hf_quant_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def algorithm(prefix: str, algo: str) -> str:
    """The format of one layer of a checkpoint in `algo`."""
    if algo != "MIXED_PRECISION":
        return algo
    return next(own for part, own in MIXED if part in prefix)


def _section(algo: str) -> dict[str, Any]:
    if "AWQ" in algo:
        return {"group_size": GROUP, "has_zero_point": False, "pre_quant_scale": True}
    return {"group_size": 16} if algo == "NVFP4" else {}


def _random(key: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(key.encode()))


def _shared(prefix: str, *, experts: bool) -> str:
    """The same for projections that share their input; with `experts` also for all experts of a layer."""
    prefix = re.sub(r"[qkv]_proj$", "qkv", prefix)
    prefix = re.sub(r"\.(gate_proj|up_proj|w1|w3)$", ".in", prefix)
    return re.sub(r"experts\.\d+", "experts", prefix) if experts else prefix


def _codes(prefix: str, algo: str, shape: tuple[int, ...], *, equal: bool) -> dict[str, torch.Tensor]:
    rows, columns = shape
    own, together = _random(prefix), _random(_shared(prefix, experts=False))
    everywhere = _random(_shared(prefix, experts=True))
    if equal:
        together = everywhere

    def number(generator: torch.Generator) -> torch.Tensor:
        return 0.001 + 0.003 * torch.rand((), generator=generator)

    def byte(*size: int) -> torch.Tensor:
        return torch.randint(0, 256, size, generator=own, dtype=torch.uint8)

    def factors(*size: int) -> torch.Tensor:
        return 0.5 + torch.rand(size, generator=everywhere)

    if algo == "FP8":
        codes = (60 * torch.randn(rows, columns, generator=own)).clamp(-448, 448).to(torch.float8_e4m3fn)
        scale = number(together if equal else own)
        return {"weight": codes, "weight_scale": scale, "input_scale": 10 * number(together)}
    if algo == "W8A8_SQ_PER_CHANNEL":
        return {
            "weight": byte(rows, columns).view(torch.int8), "weight_scale": 0.01 * torch.rand(rows, generator=own),
            "input_scale": number(together), "pre_quant_scale": factors(columns).bfloat16(),
        }  # fmt: skip
    if algo == "NVFP4":
        scale = (0.5 + 100 * torch.rand(rows, columns // 16, generator=own)).to(torch.float8_e4m3fn)
        return {
            "weight": byte(rows, columns // 2), "weight_scale": scale, "weight_scale_2": number(together),
            "input_scale": number(together),
        }  # fmt: skip
    scale = 0.02 * torch.rand(rows, columns // GROUP, generator=own)
    made = {"weight": byte(rows // 2, columns), "weight_scale": scale}
    if re.search(r"(o_proj|down_proj|w2|experts\.\d+\.\w+)$", prefix):  # elsewhere it was folded into a norm
        made["pre_quant_scale"] = factors(columns).bfloat16()
    if algo == "W4A8_AWQ":
        made |= {"weight_scale_2": number(together), "input_scale": number(together)}
    return made
