"""The converted checkpoint computes what the unified one does: against the embedded engine and Transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from execute import Run, fuse_gate_and_up, round_e4m3, round_int8
from exports import unified
from matrix import DIVISIONS, FORMATS, refused
from safetensors.torch import load_file, save_file
from synthetic import MODELS, SIZES, plain, quantized
from test_roundtrip import convert, silent

from tiny import save_checkpoint
from trtbuild.runtime import Engine, JoinedScales

TOKENS = [3 + (index * 37) % 310 for index in range(24)]
ENGINE: dict[str, Any] = {
    "schema_version": 1, "runtime": "embedded", "max_batch_size": 1, "max_num_tokens": 32, "max_seq_len": 64,
    "kv_cache": {"dtype": "auto", "tokens_per_block": 16, "max_tokens": 64}, "device": "cpu",
    "compute_dtype": "float32",
}  # fmt: skip
# What the embedded engine computes: quant_algo and KV cache.
COMPUTED = (("bf16", None), ("FP8", None), ("FP8", "FP8"), ("W4A16_AWQ", None))


def assert_same_logits(found: torch.Tensor, wanted: torch.Tensor, *, codes: bool = False) -> None:
    """Equal up to the order of sums; with `codes`, activations are rounded to codes on the way, and a rare one that
    falls on the other side of a boundary is let pass, with what it changes in later tokens."""
    assert found.shape == wanted.shape
    error, spread = (found - wanted).abs(), wanted.std()
    assert error.median() < (5e-3 if codes else 1e-5) * spread
    assert error.max() < (0.25 if codes else 1e-3) * spread


def engine_logits(directory: Path, kv_cache: str | None = None, joined: JoinedScales | None = None) -> torch.Tensor:
    cache = ENGINE["kv_cache"] | {"dtype": "fp8" if kv_cache else "auto"}
    (directory / "engine.json").write_text(json.dumps(ENGINE | {"kv_cache": cache}), encoding="utf-8")
    with Engine.load(directory, joined=joined) as engine:
        return engine.logits(TOKENS)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The unquantized checkpoint of a model, made once."""

    @cache
    def make(name: str) -> Path:
        return plain(tmp_path_factory.mktemp("original") / "checkpoint", name)

    return make


@pytest.mark.parametrize(("name", "column"), list(product(MODELS, FORMATS)), ids=str)
def test_same_logits(name: str, column: str, originals: Callable[[str], Path], tmp_path: Path) -> None:
    """Every model in every format, on every division: what is converted computes what the unified checkpoint does.

    The embedded engine is the measure where it computes the format; else Transformers in float32 with the dequantized
    weights, against an execution that leaves activations alone. A cell that `refused` names was tested to be refused.
    """
    algo, kv_cache, dtype = FORMATS[column]
    divisions = [division for division in DIVISIONS if refused((name, column, division)) is None]
    if not divisions:
        assert all(refused((name, column, division)) for division in DIVISIONS)
        return
    source = quantized(originals(name), tmp_path / "unified", algo, kv_cache, equal=True)
    by_engine = name != "qwen2_moe" and (algo, kv_cache) in COMPUTED
    wanted = engine_logits(source, kv_cache) if by_engine else transformers_logits(source, kv_cache)
    for tp, pp in divisions:
        output = tmp_path / f"{tp}-{pp}"
        convert(source, output, tp, pp, dtype)
        found = Run.open(output, activations=by_engine).logits(TOKENS)
        assert_same_logits(found, wanted, codes=algo == "FP8" or kv_cache is not None)
        shutil.rmtree(output)


def transformers_logits(directory: Path, kv_cache: str | None = None) -> torch.Tensor:
    """Of the unified checkpoint's dequantized weights in float32; the cache is rounded as `kv_cache` says."""
    from transformers import AutoModelForCausalLM

    stored = load_file(directory / "model.safetensors")
    expanded = directory / "expanded"
    expanded.mkdir()
    save_file(dequantized(stored), expanded / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    (expanded / "config.json").write_text(json.dumps(config), encoding="utf-8")
    attention = "eager" if kv_cache is None else rounding_attention(stored, kv_cache)
    model = AutoModelForCausalLM.from_pretrained(expanded, dtype=torch.float32, attn_implementation=attention).eval()
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0]


def rounding_attention(stored: dict[str, torch.Tensor], kv_cache: str) -> str:
    """The name of an attention for Transformers whose keys and values go through codes of the larger of their scales.

    ModelOpt 0.47 quantizes an INT8 cache but its unified exporter refuses it: such a checkpoint is made by hand.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    through = round_e4m3 if kv_cache == "FP8" else round_int8

    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *,
        scaling: float, softcap: float | None = None, **_: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        prefix = f"model.layers.{module.layer_idx}.self_attn"
        scale = max(stored[f"{prefix}.{letter}_proj.{letter}_scale"] for letter in "kv")
        groups = query.shape[1] // key.shape[1]
        key, value = (through(part, scale).repeat_interleave(groups, 1) for part in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        assert mask is not None
        return ((scores + mask).softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("rounding", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("rounding", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    return "rounding"


def test_the_rounding_of_the_cache_shows(originals: Callable[[str], Path], tmp_path: Path) -> None:
    source = quantized(originals("llama"), tmp_path / "unified", "bf16", "INT8", equal=True)
    rounded = transformers_logits(source, "INT8")
    shutil.rmtree(source / "expanded")
    assert (rounded - transformers_logits(source)).abs().max() > 1e-3


def dequantized(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The unified export's weights in float32, the factors of inputs multiplied in."""
    made = {}
    for name, tensor in stored.items():
        prefix, _, key = name.rpartition(".")
        if "scale" in key:
            continue
        scale = stored.get(f"{prefix}.weight_scale") if key == "weight" else None
        made[name] = tensor.float() if scale is None else _weight(tensor, scale.float(), stored, prefix)
        if f"{prefix}.pre_quant_scale" in stored and key == "weight":
            made[name] = made[name] * stored[f"{prefix}.pre_quant_scale"].float()
    return made


def _weight(codes: torch.Tensor, scale: torch.Tensor, stored: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    if codes.dtype == torch.float8_e4m3fn:
        return codes.float() * scale
    if codes.dtype == torch.int8:
        return codes.float() * scale[:, None]
    low, high = codes % 16, codes // 16
    if stored[f"{prefix}.weight_scale"].dtype == torch.float8_e4m3fn:  # NVFP4
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        table = torch.cat([values, -values])
        whole = torch.empty(codes.shape[0], codes.shape[1] * 2)
        whole[:, 0::2], whole[:, 1::2] = table[low.long()], table[high.long()]
        return whole * scale.repeat_interleave(16, 1) * stored[f"{prefix}.weight_scale_2"]
    whole = torch.empty(codes.shape[0] * 2, codes.shape[1])
    whole[0::2], whole[1::2] = low.float(), high.float()
    whole -= 16 * (whole > 7)
    return whole * scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1)


@pytest.mark.parametrize(
    ("name", "algo", "divisions"),
    [
        ("llama", "W4A8_AWQ", ((1, 1), (2, 2))),
        ("llama", "W8A8_SQ_PER_CHANNEL", ((2, 2), (4, 1))),
        ("llama", "NVFP4", ((2, 1),)),
        ("phi3", "NVFP4", ((2, 1),)),
        ("qwen2", "W4A8_AWQ", ((2, 1),)),
        ("qwen2", "MIXED_PRECISION", ((2, 2),)),
    ],
)
def test_exports_of_modelopt(name: str, algo: str, divisions: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    """ModelOpt's own checkpoints of the formats that the compress step does not make."""
    source = unified(plain(tmp_path / "plain", name), tmp_path / "unified", algo)
    assert json.loads((source / "hf_quant_config.json").read_text())["quantization"]["quant_algo"] == algo
    for tp, pp in divisions:
        convert(source, tmp_path / f"{tp}-{pp}", tp, pp)
    bring_to_common_scales(source)
    wanted = transformers_logits(source)
    for tp, pp in divisions:
        assert_same_logits(Run.open(tmp_path / f"{tp}-{pp}", activations=False).logits(TOKENS), wanted)


YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize("name", ["llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma2"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3},
        {"mscale": 1.2, "mscale_all_dim": 0.7},
        {"original_max_position_embeddings": 16},
    ],
    ids=["defaults", "attention_factor", "mscale", "short"],
)
def test_yarn(name: str, more: dict[str, float], tmp_path: Path) -> None:
    """Against Transformers, with every way to give the attention factor; ``short``: beyond the trained length."""
    # Transformers 5.14 does not find the head size of Mixtral for yarn by itself.
    sizes = {"head_dim": 32} if name == "mixtral" else {}
    source = plain(tmp_path / "plain", name, rope_parameters=YARN | more, **sizes)
    wanted = transformers_logits(source)
    convert(source, tmp_path / "out", 2, 1)
    assert_same_logits(Run.open(tmp_path / "out").logits(TOKENS), wanted)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_linear_scaling(name: str, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
    source = plain(tmp_path / "plain", name, rope_parameters=rope)
    wanted = transformers_logits(source)
    convert(source, tmp_path / "out", 1, 1)
    assert_same_logits(Run.open(tmp_path / "out").logits(TOKENS), wanted)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_dynamic_scaling(name: str, tmp_path: Path) -> None:
    """It begins beyond max_position_embeddings, which is as far as an engine is built."""
    rope = {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 4.0}
    source = plain(tmp_path / "plain", name, rope_parameters=rope)
    wanted = transformers_logits(source)
    convert(source, tmp_path / "out", 2, 1)
    assert_same_logits(Run.open(tmp_path / "out").logits(TOKENS), wanted)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert (config["rotary_base"], config["rotary_scaling"]) == (5000.0, None)
    assert config["max_position_embeddings"] >= len(TOKENS)


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
        if tensors[f"{prefix}self_attn.q_proj.weight"].dtype != torch.float8_e4m3fn:
            continue
        names = [f"{prefix}self_attn.{letter}_proj" for letter in "qkv"]
        common = max(tensors[f"{name}.weight_scale"] for name in names)
        for name in names:
            values = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]
            tensors[f"{name}.weight"] = (values / common).to(torch.float8_e4m3fn)
            tensors[f"{name}.weight_scale"] = common.clone()
        scales = [name for name in (f"{names[1]}.k_scale", f"{names[2]}.v_scale") if name in tensors]
        larger = max((tensors[name] for name in scales), default=None)
        tensors |= {name: larger.clone() for name in scales if larger is not None}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


AS_ENGINES_DO = JoinedScales(gate_up=True, kv_cache=True, intermediate="float32")


@pytest.mark.parametrize("name", ["llama", "llama-bias", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "phi3"])
def test_evidence_has_the_scales_of_the_engine(name: str, originals: Callable[[str], Path], tmp_path: Path) -> None:
    """Quality is measured with scales joined as TensorRT-LLM joins them: the embedded engine then computes what the
    converted checkpoint does, gate and up joined as trtllm-build does; with the files' own scales it does not."""
    source = quantized(originals(name), tmp_path / "unified", "FP8", "FP8")
    gate_up = not name.startswith("gemma")
    joined = engine_logits(source, "FP8", replace(AS_ENGINES_DO, gate_up=gate_up))
    for tp, pp in ((1, 1), (2, 1)):
        convert(source, tmp_path / f"{tp}", tp, pp)
        run = Run.open(tmp_path / f"{tp}")
        if gate_up:
            fuse_gate_and_up(run.reader)
        assert_same_logits(run.logits(TOKENS), joined, codes=True)
    own = engine_logits(source, "FP8")
    assert (own - joined).abs().median() > 5e-3 * own.std()


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
        found = Run.open(tmp_path / f"{tp}").logits(TOKENS)
        assert_same_logits(found, wanted, codes=settings["format"] == "fp8")
