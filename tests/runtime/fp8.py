"""A checkpoint in ModelOpt's FP8 form made by hand: no ModelOpt needed, so that it can be made on a GPU host."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
# Wide enough for the activations of the tiny models, and different for each input.
_INPUT_SCALES = {"q_proj": 0.013, "o_proj": 0.006, "gate_proj": 0.017, "down_proj": 0.021}


def fp8_checkpoint(source: Path, target: Path, *, one_scale: bool = True, kv: bool = False) -> Path:
    """Write `source` with its projections in E4M3 to `target`; with `one_scale` what is fused shares its scales."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    layers = sorted({name.rpartition(".self_attn.")[0] for name in tensors if ".self_attn.q_proj.weight" in name})
    for layer in layers:
        for group in _GROUPS:
            block = "self_attn" if group[0] in ("q_proj", "o_proj") else "mlp"
            names = [f"{layer}.{block}.{projection}" for projection in group]
            largest = [tensors[f"{name}.weight"].float().abs().max() for name in names]
            for index, name in enumerate(names):
                scale = (max(largest) if one_scale else largest[index]) / 448
                codes = (tensors[f"{name}.weight"].float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
                tensors[f"{name}.weight"] = codes
                tensors[f"{name}.weight_scale"] = scale.reshape(1).float()
                tensors[f"{name}.input_scale"] = torch.tensor([_INPUT_SCALES[group[0]]])
        if kv:
            tensors[f"{layer}.self_attn.k_proj.k_scale"] = torch.tensor([0.021])
            tensors[f"{layer}.self_attn.v_proj.v_scale"] = torch.tensor([0.017])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8" if kv else None, "exclude_modules": ["lm_head"]}
    (target / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}), encoding="utf-8")
    return target
