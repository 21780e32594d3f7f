"""Random checkpoints in the shape of Llama 3.1 8B for engines that load from files: the same weights for each of them.

    bf16        plain
    fp8         ModelOpt's FP8, one scale a tensor
    int4        ModelOpt's INT4-AWQ without pre-quant scaling, groups of 128
    int4-ct     the same codes and scales as compressed-tensors `pack-quantized`: vLLM refuses ModelOpt's INT4

A file a layer. The form of compressed-tensors: vllm-project/compressed-tensors,
src/compressed_tensors/compressors/quantized_compressors/pack_quantized.py @0.15.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 128000, "eos_token_id": 128001,
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
GROUP = 128
_SIZES = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}  # fmt: skip
_COMPRESSED_TENSORS = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {
        "targets": ["Linear"], "input_activations": None, "output_activations": None,
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP,
                    "dynamic": False},
    }},
}  # fmt: skip


def write(form: str, target: Path) -> None:
    """Write the checkpoint of `form` to `target`, unless it is there."""
    if (target / "model.safetensors.index.json").is_file():
        return
    target.mkdir(parents=True, exist_ok=True)
    config = dict(SHAPE)
    quantization = {"fp8": {"quant_algo": "FP8"}, "int4": {"quant_algo": "W4A16_AWQ", "group_size": GROUP}}.get(form)
    if quantization is not None:
        facts = quantization | {"kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
        document = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": facts}
        (target / "hf_quant_config.json").write_text(json.dumps(document))
    if form == "int4-ct":
        config["quantization_config"] = _COMPRESSED_TENSORS
    (target / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    places: dict[str, str] = {}
    parts = [*range(SHAPE["num_hidden_layers"]), "ends"]
    for part in parts:
        tensors = _ends() if part == "ends" else _layer(f"model.layers.{part}", form)
        name = f"model-{part}.safetensors"
        save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, target / name, {"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _normal(*shape: int, scale: float = 0.02) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0.0, scale)


def _ends() -> dict[str, torch.Tensor]:
    return {
        "model.embed_tokens.weight": _normal(128256, 4096),
        "lm_head.weight": _normal(128256, 4096),
        "model.norm.weight": torch.ones(4096, dtype=torch.bfloat16),
    }


def _layer(layer: str, form: str) -> dict[str, torch.Tensor]:
    ones = torch.ones(4096, dtype=torch.bfloat16)
    tensors = {f"{layer}.input_layernorm.weight": ones, f"{layer}.post_attention_layernorm.weight": ones.clone()}
    for name, (outputs, inputs) in _SIZES.items():
        place = f"{layer}.{name}"
        if form == "bf16":
            tensors[f"{place}.weight"] = _normal(outputs, inputs)
        elif form == "fp8":
            tensors[f"{place}.weight"] = _normal(outputs, inputs, scale=60.0).clamp_(-448, 448).to(torch.float8_e4m3fn)
            tensors[f"{place}.weight_scale"] = torch.tensor(0.02 / 60)
            tensors[f"{place}.input_scale"] = torch.tensor(0.02)
        else:
            tensors |= _four_bits(place, outputs, inputs, form)
    return tensors


def _four_bits(place: str, outputs: int, inputs: int, form: str) -> dict[str, torch.Tensor]:
    codes = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int32, device="cuda")
    scale = torch.empty((outputs, inputs // GROUP), dtype=torch.bfloat16, device="cuda").uniform_(2e-3, 6e-3)
    if form == "int4":
        packed = ((codes[0::2] & 15) | ((codes[1::2] & 15) << 4)).to(torch.uint8)
        return {f"{place}.weight": packed, f"{place}.weight_scale": scale}
    shifts = torch.arange(0, 32, 4, device="cuda")
    words = ((codes + 8).view(outputs, inputs // 8, 8).long() << shifts).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    shape = torch.tensor([outputs, inputs])
    return {f"{place}.weight_packed": words, f"{place}.weight_scale": scale, f"{place}.weight_shape": shape}
