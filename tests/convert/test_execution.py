"""The converted checkpoint computes what the unified one does: against the embedded engine and Transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from execute import Run, round_int8
from exports import GROUP, unified
from safetensors.torch import load_file, save_file
from synthetic import MODELS, SIZES, plain, quantized
from test_roundtrip import convert, silent

from tiny import save_checkpoint
from trtbuild.runtime import Engine

TOKENS = [3 + (index * 37) % 310 for index in range(24)]
ENGINE: dict[str, Any] = {
    "schema_version": 1, "runtime": "embedded", "max_batch_size": 1, "max_num_tokens": 32, "max_seq_len": 64,
    "kv_cache": {"dtype": "auto", "tokens_per_block": 16, "max_tokens": 64}, "device": "cpu",
    "compute_dtype": "float32",
}  # fmt: skip
FORMATS = (("bf16", None), ("FP8", None), ("FP8", "FP8"), ("W4A16_AWQ", None))
DIVISIONS = ((1, 1), (2, 1), (2, 2), (4, 1))


def assert_same_logits(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal up to the order of sums; a rare code that falls on the other side of a rounding boundary is let pass."""
    assert found.shape == wanted.shape
    error, spread = (found - wanted).abs(), wanted.std()
    assert error.median() < 1e-4 * spread
    assert error.max() < 0.25 * spread


def engine_logits(directory: Path, kv_cache: str | None = None) -> torch.Tensor:
    cache = ENGINE["kv_cache"] | {"dtype": "fp8" if kv_cache else "auto"}
    (directory / "engine.json").write_text(json.dumps(ENGINE | {"kv_cache": cache}), encoding="utf-8")
    with Engine.load(directory) as engine:
        return engine.logits(TOKENS)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "qwen2_moe"])
def test_same_logits_as_the_embedded_engine(name: str, tmp_path: Path) -> None:
    original = plain(tmp_path / "plain", name)
    for algo, kv_cache in FORMATS:
        source = quantized(original, tmp_path / f"{algo}-{kv_cache}", algo, kv_cache, equal=True)
        wanted = engine_logits(source, kv_cache)
        for tp, pp in DIVISIONS:
            if name == "phi3" and pp > 1:
                continue
            output = tmp_path / f"{algo}-{kv_cache}-{tp}-{pp}"
            convert(source, output, tp, pp)
            assert_same_logits(Run.open(output).logits(TOKENS), wanted)


def transformers_logits(directory: Path, weights: dict[str, torch.Tensor], attention: str = "eager") -> torch.Tensor:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
    wrong = model.load_state_dict(weights, strict=False)
    assert not wrong.unexpected_keys
    assert set(wrong.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0]


def dequantized(directory: Path, algo: str) -> dict[str, torch.Tensor]:
    """The unified export's weights in float32, the factors of inputs multiplied in."""
    stored = load_file(directory / "model.safetensors")
    made = {}
    for name, tensor in stored.items():
        prefix, _, key = name.rpartition(".")
        if key in {"k_scale", "v_scale"} or "scale" in key:
            continue
        scale = stored.get(f"{prefix}.weight_scale") if key == "weight" else None
        made[name] = tensor.float() if scale is None else _weight(tensor, scale.float(), stored, prefix, algo)
        if f"{prefix}.pre_quant_scale" in stored and key == "weight":
            made[name] = made[name] * stored[f"{prefix}.pre_quant_scale"].float()
    return made


def _weight(
    codes: torch.Tensor, scale: torch.Tensor, stored: dict[str, torch.Tensor], prefix: str, algo: str
) -> torch.Tensor:
    if algo == "W8A8_SQ_PER_CHANNEL":
        return codes.float() * scale[:, None]
    low, high = codes % 16, codes // 16
    if algo == "NVFP4":
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        table = torch.cat([values, -values])
        whole = torch.empty(codes.shape[0], codes.shape[1] * 2)
        whole[:, 0::2], whole[:, 1::2] = table[low.long()], table[high.long()]
        return whole * scale.repeat_interleave(16, 1) * stored[f"{prefix}.weight_scale_2"]
    whole = torch.empty(codes.shape[0] * 2, codes.shape[1])
    whole[0::2], whole[1::2] = low.float(), high.float()
    whole -= 16 * (whole > 7)
    return whole * scale.repeat_interleave(GROUP, 1)


@pytest.mark.parametrize(
    ("name", "algo", "divisions"),
    [
        ("llama", "W4A8_AWQ", ((1, 1), (2, 1), (2, 2))),
        ("llama", "W8A8_SQ_PER_CHANNEL", ((1, 1), (2, 2), (4, 1))),
        ("llama", "NVFP4", ((1, 1), (2, 1), (4, 1))),
        ("qwen3", "W8A8_SQ_PER_CHANNEL", ((2, 1),)),
        ("gemma2", "NVFP4", ((2, 2),)),
        ("phi3", "NVFP4", ((2, 1),)),
        ("qwen2", "W4A8_AWQ", ((2, 1),)),
    ],
)
def test_same_logits_as_transformers_with_the_dequantized_weights(
    name: str, algo: str, divisions: tuple[tuple[int, int], ...], tmp_path: Path
) -> None:
    source = unified(plain(tmp_path / "plain", name), tmp_path / "unified", algo)
    assert json.loads((source / "hf_quant_config.json").read_text())["quantization"]["quant_algo"] == algo
    wanted = transformers_logits(source, dequantized(source, algo))
    for tp, pp in divisions:
        convert(source, tmp_path / f"{tp}-{pp}", tp, pp)
        assert_same_logits(Run.open(tmp_path / f"{tp}-{pp}", activations=False).logits(TOKENS), wanted)


def test_int8_kv_cache(tmp_path: Path) -> None:
    """Keys and values go through 8-bit integers of the larger scale, in Transformers as in the checkpoint.

    ModelOpt 0.47 quantizes such a cache but its unified exporter refuses it: the checkpoint is made by hand.
    """
    from transformers import AttentionInterface
    from transformers.models.llama.modeling_llama import eager_attention_forward

    source = quantized(plain(tmp_path / "plain", "llama"), tmp_path / "unified", "bf16", "INT8")
    stored = load_file(source / "model.safetensors")
    scales = [
        max(stored[f"model.layers.{layer}.self_attn.{letter}_proj.{letter}_scale"] for letter in "kv")
        for layer in range(2)
    ]

    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any
    ) -> Any:
        scale = scales[module.layer_idx]
        return eager_attention_forward(module, query, round_int8(key, scale), round_int8(value, scale), *rest, **more)

    AttentionInterface.register("through_int8", attend)
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    ALL_MASK_ATTENTION_FUNCTIONS.register("through_int8", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    weights = {name: tensor.float() for name, tensor in stored.items() if "scale" not in name}
    wanted = transformers_logits(source, weights, "through_int8")
    exact = transformers_logits(source, weights)
    assert (wanted - exact).abs().max() > 1e-3  # the cache's rounding shows
    for tp, pp in ((1, 1), (2, 1), (2, 2)):
        convert(source, tmp_path / f"{tp}-{pp}", tp, pp)
        assert_same_logits(Run.open(tmp_path / f"{tp}-{pp}").logits(TOKENS), wanted)


def test_experts_beside_shared_ones(tmp_path: Path) -> None:
    """Qwen2-MoE, which the embedded engine was not tried with: against Transformers."""
    from transformers import AutoModelForCausalLM

    source = plain(tmp_path / "plain", "qwen2_moe")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(torch.tensor([TOKENS])).logits[0]
    for tp, pp in ((1, 1), (2, 2)):
        convert(source, tmp_path / f"{tp}-{pp}", tp, pp)
        assert_same_logits(Run.open(tmp_path / f"{tp}-{pp}").logits(TOKENS), wanted)


def test_llama3_rope_and_a_real_window_are_carried(tmp_path: Path) -> None:
    """Rotary scaling of Llama 3 reaches the config and the logits; a window becomes a note."""
    rope = {
        "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    source = plain(tmp_path / "plain", "llama", rope_parameters=rope)
    wanted = engine_logits(source)
    convert(source, tmp_path / "out", 2, 1)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["rotary_base"] == 5000.0
    assert config["rotary_scaling"]["type"] == "llama3"
    assert_same_logits(Run.open(tmp_path / "out").logits(TOKENS), wanted)
    result = convert(plain(tmp_path / "mistral", "mistral"), tmp_path / "window", 1, 1)
    assert any("max_attention_window" in note and "48" in note for note in result["notes"])


def bring_to_common_scales(directory: Path) -> None:
    """What the conversion is defined to do to FP8, done to the unified checkpoint: query, key and value on the largest
    of their scales, keys and values in the cache on the larger of theirs."""
    tensors = load_file(directory / "model.safetensors")
    for prefix in {name.rpartition("self_attn.")[0] for name in tensors if name.endswith("q_proj.weight_scale")}:
        names = [f"{prefix}self_attn.{letter}_proj" for letter in "qkv"]
        common = max(tensors[f"{name}.weight_scale"] for name in names)
        for name in names:
            values = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]
            tensors[f"{name}.weight"] = (values / common).to(torch.float8_e4m3fn)
            tensors[f"{name}.weight_scale"] = common.clone()
        scales = [f"{names[1]}.k_scale", f"{names[2]}.v_scale"]
        larger = max(tensors[name] for name in scales)
        tensors |= {name: larger.clone() for name in scales}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"format": "fp8", "kv_cache": "fp8"}),
        ("phi3", {"format": "fp8"}),
        ("mixtral", {"format": "int4_awq", "group_size": 32}),
        ("qwen2", {"format": "int4_awq", "group_size": 64}),
    ],
)
def test_what_the_compress_step_makes(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """The compress step's own checkpoints, through conversion and execution, against the embedded engine."""
    from trtbuild.compress.run import run as compress

    architecture, sizes = MODELS[name]
    source = save_checkpoint(tmp_path / "source", architecture, overrides=SIZES | sizes)
    calibration = {"data": None, "column": None, "count": 4, "length": 32, "seed": 1}
    request = {
        "source": str(source), "output": str(tmp_path / "compressed"), "group_size": None, "sparsity": "none",
        "kv_cache": "none", "calibration": calibration,
    }  # fmt: skip
    compress(request | settings, silent)
    for tp in (1, 2):
        convert(tmp_path / "compressed", tmp_path / f"{tp}", tp, 1)
    if name == "llama":
        bring_to_common_scales(tmp_path / "compressed")
    wanted = engine_logits(tmp_path / "compressed", settings.get("kv_cache"))
    for tp in (1, 2):
        assert_same_logits(Run.open(tmp_path / f"{tp}").logits(TOKENS), wanted)
