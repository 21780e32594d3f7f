"""Our conversion of ModelOpt's unified export against ModelOpt's own TensorRT-LLM export of the same quantization.

Equal tensor by tensor and key by key, but for the differences that are listed here with their reasons. Mixtures of
experts are not compared: ModelOpt 0.47's TensorRT-LLM export does not know how Transformers 5 keeps experts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deconvert import Tensors, bits, read_safetensors
from exports import engine_checkpoint, engine_tensors, unified
from synthetic import plain
from test_roundtrip import convert

# Keys that ModelOpt alone writes: its own fields ("Model Optimizer customized fields", tensorrt_llm_utils.py), some of
# which say what another key says. TensorRT-LLM's config classes do not declare them, but for rotary_pct (default 1.0).
THEIRS = {"bias", "rotary_pct", "rank", "decoder", "rmsnorm", "lm_head_bias", "residual_mlp"}
# Keys that we add: declared by TensorRT-LLM's config class of the family, which ModelOpt leaves at the defaults.
OURS = {
    "llama": {"rotary_scaling", "qk_layernorm", "attn_bias", "mlp_bias"},
    "qwen": {"rotary_scaling", "qk_layernorm", "attn_bias", "mlp_bias", "qwen_type", "seq_length", "use_logn_attn"},
}  # fmt: skip
# producer: who wrote it. logits_dtype: ModelOpt writes float16 for bf16 models, the classes' default is float32.
# mapping: ours names the parts that are 1 or the tensor-parallel size. quantization: compared below.
DIFFERENT = {"producer", "logits_dtype", "mapping", "quantization"}


STEP = 32.0  # between the largest codes of E4M3


def compare_configs(ours: dict[str, Any], theirs: dict[str, Any], family: str) -> None:
    assert theirs.keys() - ours.keys() <= THEIRS
    assert ours.keys() - theirs.keys() <= OURS[family]
    for key in (ours.keys() & theirs.keys()) - DIFFERENT - THEIRS:
        assert ours[key] == theirs[key], key
    assert theirs["mapping"].items() <= ours["mapping"].items()
    extra = ours["mapping"].keys() - theirs["mapping"].keys()
    assert {ours["mapping"][key] for key in extra} <= {1, ours["mapping"]["tp_size"]}
    made, wanted = dict(ours["quantization"]), dict(theirs["quantization"])
    # A list of exclusions replaces TensorRT-LLM's own, so ours repeats the modules that are never quantized.
    assert set(wanted.pop("exclude_modules", ())) <= set(made.pop("exclude_modules", ()))
    assert made == wanted


def compare_tensors(ours: Tensors, theirs: Tensors, algo: str) -> set[str]:
    """The names of tensors whose bits differ; sets of names, types and shapes must be equal."""
    # TensorRT-LLM's loader merges these two into kv_cache_scaling_factor, which both files have.
    merged = (".k_cache_scaling_factor", ".v_cache_scaling_factor")
    theirs = {name: value for name, value in theirs.items() if not name.endswith(merged)}
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        wanted = theirs[name]
        assert value.dtype == wanted.dtype, name
        # ModelOpt's NVFP4 scalars have no dimension, TensorRT-LLM's parameters have one.
        assert value.shape == (wanted.shape or (1,)) if algo == "NVFP4" else value.shape == wanted.shape, name
    return {name for name in ours if not bits(ours[name]).equal(bits(theirs[name]))}


def both(name: str, algo: str, tp: int, pp: int, tmp_path: Path, kv_cache: str | None = None) -> tuple[Path, Path]:
    source = plain(tmp_path / "plain", name)
    theirs = engine_checkpoint(name, source, tmp_path / "theirs", algo, tp, pp, kv_cache)
    convert(unified(source, tmp_path / "unified", algo, kv_cache), tmp_path / "ours", tp, pp)
    return tmp_path / "ours", theirs


def ranks(ours: Path, theirs: Path) -> list[tuple[Tensors, Tensors]]:
    names = sorted(path.name for path in ours.glob("rank*"))
    assert names == sorted(path.name for path in theirs.glob("rank*"))
    from safetensors.torch import load_file

    return [(read_safetensors(ours / name), load_file(theirs / name)) for name in names]


def read(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "algo", "tp", "pp"),
    [
        ("llama", "bf16", 1, 1), ("llama", "bf16", 2, 3), ("llama", "bf16", 4, 1), ("llama-tied", "bf16", 2, 1),
        ("mistral", "bf16", 2, 1), ("qwen2", "bf16", 2, 1), ("qwen3", "bf16", 2, 3),
        ("llama", "W8A8_SQ_PER_CHANNEL", 2, 3), ("mistral", "W8A8_SQ_PER_CHANNEL", 2, 1),
        ("qwen2", "W8A8_SQ_PER_CHANNEL", 1, 3), ("qwen3", "W8A8_SQ_PER_CHANNEL", 2, 1),
        ("llama", "NVFP4", 2, 1), ("mistral", "NVFP4", 1, 3), ("qwen2", "NVFP4", 1, 1), ("qwen3", "NVFP4", 4, 1),
    ],
)  # fmt: skip
def test_equal(name: str, algo: str, tp: int, pp: int, tmp_path: Path) -> None:
    ours, theirs = both(name, algo, tp, pp, tmp_path)
    made, wanted = read(ours), read(theirs)
    if name == "llama-tied":
        # ModelOpt writes the table twice and says that it is not shared; ours writes it twice and says what is true.
        assert made.pop("share_embedding_table")
        assert not wanted.pop("share_embedding_table")
    compare_configs(made, wanted, "qwen" if name.startswith("qwen") else "llama")
    for mine, other in ranks(ours, theirs):
        assert compare_tensors(mine, other, algo) == set()


@pytest.mark.parametrize(
    ("name", "algo", "tp"),
    [
        ("gemma2", "bf16", 2), ("gemma2", "W8A8_SQ_PER_CHANNEL", 2), ("gemma2", "NVFP4", 1),
        ("gemma3", "bf16", 1), ("gemma3", "W8A8_SQ_PER_CHANNEL", 1), ("gemma3", "NVFP4", 2),
        ("phi3", "bf16", 1), ("phi3", "W8A8_SQ_PER_CHANNEL", 1), ("phi3", "NVFP4", 1),
    ],
)  # fmt: skip
def test_equal_tensors(name: str, algo: str, tp: int, tmp_path: Path) -> None:
    """Architectures for which ModelOpt makes tensors, but a config only inside TensorRT-LLM.

    Phi-3 on one rank only: with more, ModelOpt gives the first ranks up and the last ones gate (its division of
    ``mlp.fc`` does not know that the matrix is two), which the fused layer cannot use. Ours divides each of both.
    """
    source = plain(tmp_path / "plain", name)
    theirs = engine_tensors(name, source, algo, tp)
    convert(unified(source, tmp_path / "unified", algo), tmp_path / "ours", tp, 1)
    for rank, other in enumerate(theirs):
        mine = read_safetensors(tmp_path / "ours" / f"rank{rank}.safetensors")
        if name != "phi3":  # ModelOpt leaves out Gemma's head, which is the embedding
            head = mine.pop("lm_head.weight")
            assert bits(head).equal(bits(mine["transformer.vocab_embedding.weight"]))
        assert compare_tensors(mine, other, algo) == set()


@pytest.mark.parametrize(
    ("name", "algo", "tp", "pp"),
    [
        ("llama", "FP8", 2, 1), ("mistral", "FP8", 1, 3), ("qwen2", "FP8", 4, 1), ("qwen3", "FP8", 2, 3),
        ("llama", "MIXED_PRECISION", 2, 1), ("qwen3", "MIXED_PRECISION", 1, 3),
    ],
)  # fmt: skip
def test_fp8_differs_only_in_merged_scales(name: str, algo: str, tp: int, pp: int, tmp_path: Path) -> None:
    """Also where the attention alone is FP8 and the MLP NVFP4: quant_cfg.json then has the same layers."""
    ours, theirs = both(name, algo, tp, pp, tmp_path, "FP8" if algo == "FP8" else None)
    compare_configs(read(ours), read(theirs), "qwen" if name.startswith("qwen") else "llama")
    compare_layers(ours, theirs)
    for mine, other in ranks(ours, theirs):
        # NVFP4's scalars have no dimension in theirs: see compare_tensors.
        for name in compare_tensors(mine, other, "NVFP4" if algo == "MIXED_PRECISION" else algo):
            if name.endswith("kv_cache_scaling_factor"):
                # ModelOpt raises scales below 1 to 1 in this export, but not in the unified one, which ours keeps.
                assert mine[name] < other[name] == 1
            elif name.endswith("qkv.weight"):
                # ModelOpt codes the original weights with the common scale, ours the stored codes: rounded twice.
                scale = other[name.replace("weight", "weights_scaling_factor")]
                assert scale == mine[name.replace("weight", "weights_scaling_factor")]
                error = (mine[name].float() - other[name].float()).abs()
                assert error.max() <= STEP
                assert error.mean() < 0.03 * other[name].float().abs().mean()
            else:
                # ModelOpt gives gate and up a common scale here, in the unified export each its own; as numbers equal.
                assert ".mlp.fc." in name or ".mlp.gate." in name
                prefix = name.rpartition(".")[0]
                scales = [side[f"{prefix}.weights_scaling_factor"] for side in (mine, other)]
                values = [
                    side[f"{prefix}.weight"].float() * scale for side, scale in zip((mine, other), scales, strict=True)
                ]
                assert (values[0] - values[1]).abs().max() <= STEP * max(scales)


def compare_layers(ours: Path, theirs: Path) -> None:
    """Equal but for what NVFP4 is: ModelOpt names its group size, 16, in the same way as ours."""
    files = [directory / "quant_cfg.json" for directory in (ours, theirs)]
    assert files[0].exists() == files[1].exists()
    if files[0].exists():
        made, wanted = (json.loads(file.read_text(encoding="utf-8")) for file in files)
        assert made == wanted


@pytest.mark.parametrize(
    ("name", "algo", "tp", "pp"),
    [
        ("llama", "W4A16_AWQ", 2, 1), ("llama", "W4A8_AWQ", 1, 3), ("mistral", "W4A16_AWQ", 1, 3),
        ("mistral", "W4A8_AWQ", 2, 1), ("qwen3", "W4A16_AWQ", 1, 1), ("qwen3", "W4A8_AWQ", 2, 1),
    ],
)  # fmt: skip
def test_awq_differs_only_in_smoothing(name: str, algo: str, tp: int, pp: int, tmp_path: Path) -> None:
    """The unified export folds the factors of query, key, value, gate and up into the norm before them, and brings
    gate and up to common factors; the TensorRT-LLM export keeps the factors beside the weights. Codes of the attention
    are equal, and norm times factor is; gate and up were rounded anew."""
    ours, theirs = both(name, algo, tp, pp, tmp_path)
    compare_configs(read(ours), read(theirs), "qwen" if name.startswith("qwen") else "llama")
    for mine, other in ranks(ours, theirs):
        changed = compare_tensors(mine, other, algo)
        assert {name for name in changed if not name.endswith("layernorm.weight") and ".mlp." not in name} == {
            name for name in mine if name.endswith("qkv.prequant_scaling_factor")
        }
        assert not any(".mlp.proj." in name for name in changed)
        for name in changed:
            if name.endswith("input_layernorm.weight"):
                factor = other[name.replace("input_layernorm.weight", "attention.qkv.prequant_scaling_factor")]
                product = other[name].float() * factor.float()
                assert torch.allclose(mine[name].float(), product, rtol=2**-7)
