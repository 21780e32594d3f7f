"""A checkpoint in ModelOpt's INT4-AWQ form made by hand: no ModelOpt needed, so that it can be made on a GPU host."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def int4_checkpoint(source: Path, target: Path, *, group: int = 32, one_smoothing: bool = True) -> Path:
    """Write `source` with 4-bit projections to `target`; those that read one input share its `pre_quant_scale`."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.rpartition(".")[0].endswith(_PROJECTIONS)]:
        if not name.endswith(".weight"):
            continue
        layer, leaf = name.removesuffix(".weight"), name.split(".")[-2]
        weight = tensors[name].float()
        outputs, inputs = weight.shape
        smooth = torch.linspace(0.7, 1.4, inputs)
        smooth = smooth if one_smoothing or leaf != "k_proj" else smooth.flip(0)
        groups = (weight / smooth).view(outputs, inputs // group, group)
        scale = (groups.abs().amax(-1) / 7).to(torch.bfloat16)
        codes = (groups / scale.float().unsqueeze(-1)).round().clamp(-8, 7).to(torch.int8).view(outputs, inputs)
        tensors[name] = ((codes[0::2] & 15) | (codes[1::2] << 4)).view(torch.uint8)
        tensors[f"{layer}.weight_scale"] = scale
        tensors[f"{layer}.pre_quant_scale"] = smooth.to(torch.bfloat16)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    quantization = {
        "quant_algo": "W4A16_AWQ", "group_size": group, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"],
    }  # fmt: skip
    (target / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}), encoding="utf-8")
    return target
