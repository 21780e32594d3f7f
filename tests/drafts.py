"""Tiny drafts of EAGLE-3, written without torch: zeros under the names and shapes that upstream loads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tiny import VOCAB_SIZE

DRAFT_VOCAB_SIZE = 96
_WIDTH = {"BF16": 2, "I64": 8}


def eagle3_config(**changes: Any) -> dict[str, Any]:
    """The config.json that ModelOpt 0.47 exports, for a model of `tiny.save_checkpoint`."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
        "vocab_size": VOCAB_SIZE, "draft_vocab_size": DRAFT_VOCAB_SIZE, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2], "next_layer_regular": True},
    }  # fmt: skip
    return config | changes


def eagle3_tensors(layer: str = "midlayer") -> dict[str, tuple[str, list[int]]]:
    """Type and shape of every tensor of that draft, written from the format's description."""
    matrices = {
        "self_attn.q_proj": [64, 128], "self_attn.k_proj": [32, 128], "self_attn.v_proj": [32, 128],
        "self_attn.o_proj": [64, 64], "mlp.gate_proj": [96, 64], "mlp.up_proj": [96, 64], "mlp.down_proj": [64, 96],
        "hidden_norm": [64], "input_layernorm": [64], "post_attention_layernorm": [64],
    }  # fmt: skip
    shapes = {f"{layer}.{name}.weight": shape for name, shape in matrices.items()}
    shapes |= {"fc.weight": [64, 192], "norm.weight": [64], "lm_head.weight": [DRAFT_VOCAB_SIZE, 64]}
    return {name: ("BF16", shape) for name, shape in shapes.items()} | {"d2t": ("I64", [DRAFT_VOCAB_SIZE])}


def save_eagle3(
    path: Path, config: dict[str, Any] | None = None, tensors: dict[str, tuple[str, list[int]]] | None = None
) -> Path:
    """Write a draft to `path` and return it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or eagle3_config()), encoding="utf-8")
    header, data = {}, b""
    for name, (dtype, shape) in (tensors or eagle3_tensors()).items():
        raw = (name[:1] or "x").encode() * (math.prod(shape) * _WIDTH[dtype])  # bytes that a wrong offset would show
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def save_medusa(path: Path, *, heads: int, hidden: int = 64, bias: int | None = None) -> Path:
    """Write Medusa heads of one layer to `path`, for a model of `tiny.save_checkpoint`."""
    tensors: dict[str, tuple[str, list[int]]] = {}
    for head in range(heads):
        tensors[f"{head}.0.linear.weight"] = ("BF16", [hidden, hidden])
        tensors[f"{head}.0.linear.bias"] = ("BF16", [bias or hidden])
        tensors[f"{head}.1.weight"] = ("BF16", [VOCAB_SIZE, hidden])
    save_eagle3(path, {"medusa_num_heads": heads, "medusa_num_layers": 1}, tensors)
    (path / "model.safetensors").rename(path / "medusa_lm_head.safetensors")
    return path
