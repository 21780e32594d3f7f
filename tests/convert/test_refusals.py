"""What the converter refuses: each with the sentence that helps, the right class, and nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import plain, quantized
from test_roundtrip import convert, silent

from trtbuild.convert.run import run
from trtbuild.convert.values import caster, encode_e4m3, to_float
from trtbuild.errors import ArtifactError, CompatibilityError, HostError, RecipeError, TrtbuildError

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
FIRST = "model.layers.0."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A fresh copy of a checkpoint, its tensors and config changed by the functions given."""
    originals: dict[tuple[str, str], Path] = {}

    def make(
        name: str = "llama",
        algo: str = "bf16",
        tensors: Callable[[Tensors], object] | None = None,
        config: Callable[[Config], object] | None = None,
        quantization: Callable[[Config], object] | None = None,
    ) -> Path:
        for key in ((name, ""), (name, algo)):
            if key not in originals:
                path = tmp_path_factory.mktemp("made") / "checkpoint"
                originals[key] = quantized(originals[name, ""], path, algo) if key[1] else plain(path, name)
        original, path = originals[name, algo], tmp_path_factory.mktemp("changed")
        held = load_file(original / "model.safetensors")
        if tensors is not None:
            tensors(held)
        save_file({key: value.contiguous() for key, value in held.items()}, path / "model.safetensors")
        for file, change in (("config.json", config), ("hf_quant_config.json", quantization)):
            if (original / file).exists():
                content = json.loads((original / file).read_text(encoding="utf-8"))
                if change is not None:
                    change(content)
                (path / file).write_text(json.dumps(content), encoding="utf-8")
        return path

    return make


def set_tensor(name: str, value: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda held: held.__setitem__(FIRST + name, value)


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda held: held.pop(FIRST + name)


def set_key(name: str, value: object) -> Callable[[Config], object]:
    return lambda config: config.__setitem__(name, value)


def set_algo(name: str, value: object) -> Callable[[Config], object]:
    return lambda config: config["quantization"].__setitem__(name, value)


def plain_query(held: Tensors) -> None:
    for key in [key for key in held if key.startswith(FIRST + Q)]:
        del held[key]
    held[f"{FIRST}{Q}weight"] = torch.zeros(128, 128).bfloat16()


def rope(**parameters: object) -> Callable[[Config], object]:
    known = {"rope_theta": 1e4, "original_max_position_embeddings": 128}
    return set_key("rope_parameters", known | parameters)


def set_layer(name: str, value: object) -> Callable[[Config], object]:
    return lambda config: config["quantization"]["quantized_layers"].__setitem__(FIRST + name, value)


def drop_layer(name: str) -> Callable[[Config], object]:
    return lambda config: config["quantization"]["quantized_layers"].pop(FIRST + name)


def int4(name: str, group: int = 32) -> Callable[[Tensors], object]:
    """A layer of 128 inputs and outputs in codes of 4 bits."""

    def change(held: Tensors) -> None:
        for key in [key for key in held if key.startswith(FIRST + name)]:
            del held[key]
        held[f"{FIRST}{name}weight"] = torch.zeros(64, 128, dtype=torch.uint8)
        held[f"{FIRST}{name}weight_scale"] = torch.ones(128, 128 // group)

    return change


def coarse(name: str) -> Callable[[Tensors], object]:
    """The scales of every second group."""
    return lambda held: held.__setitem__(f"{FIRST}{name}weight_scale", held[f"{FIRST}{name}weight_scale"][:, ::2])


Q = "self_attn.q_proj."
CASES: list[tuple[str, dict[str, Any], tuple[int, int], type[TrtbuildError], str]] = [
    ("missing", {"tensors": drop("mlp.up_proj.weight")}, (1, 1), ArtifactError, "mlp.up_proj.weight is missing"),
    ("unexpected", {"tensors": set_tensor("mlp.extra.weight", torch.zeros(2))}, (1, 1), ArtifactError,
     "mlp.extra.weight is a tensor that LlamaForCausalLM does not have"),
    ("shape", {"tensors": set_tensor(f"{Q}weight", torch.zeros(64, 128).bfloat16())}, (1, 1), ArtifactError,
     "q_proj.weight has shape [64, 128] instead of [128, 128]"),
    ("type", {"tensors": set_tensor(f"{Q}weight", torch.zeros(128, 128, dtype=torch.int32))}, (1, 1), ArtifactError,
     "q_proj.weight has type I32, expected BF16 or F16 or F32"),
    ("no bias", {"name": "qwen2", "tensors": drop("self_attn.k_proj.bias")}, (1, 1), ArtifactError,
     "k_proj.bias is missing"),
    ("no scale", {"algo": "FP8", "tensors": drop(f"{Q}weight_scale")}, (1, 1), ArtifactError,
     "q_proj.weight_scale is missing"),
    ("scale zero", {"algo": "FP8", "tensors": set_tensor(f"{Q}weight_scale", torch.zeros(()))}, (1, 1), ArtifactError,
     "weight_scale is 0.0, scales are finite and positive"),
    ("input scales", {"algo": "FP8", "tensors": set_tensor(f"{Q}input_scale", torch.tensor(0.5))}, (1, 1),
     CompatibilityError, "are one layer in TensorRT-LLM, but their input_scale differ"),
    ("gate and up", {"algo": "FP8", "tensors": set_tensor("mlp.up_proj.input_scale", torch.tensor(0.5))}, (1, 1),
     CompatibilityError, "mlp.gate_proj, model.layers.0.mlp.up_proj are one layer"),
    ("second scales", {"algo": "NVFP4", "tensors": set_tensor(f"{Q}weight_scale_2", torch.tensor(0.5))}, (1, 1),
     CompatibilityError, "their weight_scale_2 differ"),
    ("smoothing", {"algo": "W4A16_AWQ", "tensors": set_tensor(f"{Q}pre_quant_scale", torch.ones(128).bfloat16())},
     (1, 1), CompatibilityError, "their pre_quant_scale differ"),
    ("some quantized", {"algo": "W8A8_SQ_PER_CHANNEL", "tensors": plain_query}, (1, 1),
     CompatibilityError, "are one layer in TensorRT-LLM, but only some of them are quantized"),
    ("architecture", {"config": set_key("architectures", ["FalconForCausalLM"])}, (1, 1), CompatibilityError,
     "FalconForCausalLM (llama) has no conversion"),
    ("unknown rope", {"config": rope(rope_type="longrope")}, (1, 1), CompatibilityError,
     "'longrope' has no form in a TensorRT-LLM checkpoint: it computes linear, llama3, yarn"),
    ("rope of Phi-3", {"name": "phi3", "config": rope(rope_type="yarn", factor=4.0)}, (1, 1), CompatibilityError,
     "Phi-3's layers pass no scaling"),
    ("yarn not truncated", {"config": rope(rope_type="yarn", factor=4.0, truncate=False)}, (1, 1), CompatibilityError,
     "truncate: false: TensorRT-LLM rounds"),
    ("yarn without stretch", {"config": rope(rope_type="yarn", factor=1.0, attention_factor=1.2)}, (1, 1),
     CompatibilityError, "has an attention factor only for factors above 1"),
    # The larger Gemma 3: linear by 8 where a layer attends to everything.
    ("rope of Gemma 3", {"name": "gemma3", "config": set_key("rope_parameters", {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}})}, (1, 1), CompatibilityError,
     "'linear' has no form in a TensorRT-LLM checkpoint: its tables for full-attention and for sliding layers share"),
    ("pattern", {"name": "gemma3", "config": set_key("layer_types", ["full_attention", *["sliding_attention"] * 2])},
     (1, 1), CompatibilityError, "follow no regular pattern"),
    ("dense layers", {"name": "qwen3_moe", "config": set_key("mlp_only_layers", [0])}, (1, 1), CompatibilityError,
     "layers without experts"),
    ("format", {"algo": "FP8", "quantization": set_algo("quant_algo", "MXFP8")}, (1, 1), CompatibilityError,
     "is quantized as MXFP8; convertible are FP8"),
    ("cache", {"algo": "FP8", "quantization": set_algo("kv_cache_quant_algo", "NVFP4")}, (1, 1), CompatibilityError,
     "KV cache in NVFP4"),
    ("group", {"algo": "W4A16_AWQ", "quantization": set_algo("group_size", None)}, (1, 1), ArtifactError,
     "the group size None"),
    ("tool", {"config": set_key("quantization_config", {"quant_method": "gptq"})}, (1, 1), CompatibilityError,
     "is quantized by gptq"),
    ("no layers", {"algo": "MIXED_PRECISION", "quantization": set_algo("quantized_layers", {})}, (1, 1), ArtifactError,
     "says MIXED_PRECISION, but its quantized_layers names no layer"),
    ("unknown layer", {"algo": "MIXED_PRECISION", "quantization": set_layer("mlp.other_proj", {"quant_algo": "FP8"})},
     (1, 1), ArtifactError, "quantized_layers names model.layers.0.mlp.other_proj, which LlamaForCausalLM does not"),
    ("format of a layer", {"algo": "MIXED_PRECISION", "quantization": set_layer(Q[:-1], {"quant_algo": "MXFP8"})},
     (1, 1), CompatibilityError, "model.layers.0.self_attn.q_proj is quantized as MXFP8"),
    ("codes of no layer", {"algo": "MIXED_PRECISION", "quantization": drop_layer(Q[:-1])}, (1, 1), ArtifactError,
     "q_proj.weight has type F8_E4M3, expected BF16"),
    ("fused in two ways", {"algo": "MIXED_PRECISION", "quantization": set_layer(
        "mlp.up_proj", {"quant_algo": "W4A16_AWQ", "group_size": 64}), "tensors": coarse("mlp.up_proj.")}, (1, 1),
     CompatibilityError, "mlp.up_proj are fused in TensorRT-LLM, but are quantized in different ways"),
    ("joined in two ways", {"algo": "MIXED_PRECISION", "quantization": set_layer(
        Q[:-1], {"quant_algo": "W4A16_AWQ", "group_size": 32}), "tensors": int4(Q)}, (1, 1), CompatibilityError,
     "v_proj are one layer in TensorRT-LLM, but are quantized in different ways"),
    ("groups of one layer", {"algo": "MIXED_PRECISION", "quantization": set_layer(
        "self_attn.o_proj", {"quant_algo": "W4A16_AWQ", "group_size": 64}), "tensors": int4("self_attn.o_proj.", 64)},
     (4, 1), CompatibilityError, "attention.dense: 32 inputs of a rank do not divide into groups of 64 (W4A16_AWQ)"),
    ("stages in two ways", {"algo": "MIXED_PRECISION", "quantization": set_layer(
        "self_attn.o_proj", {"quant_algo": "W4A16_AWQ", "group_size": 64}), "tensors": int4("self_attn.o_proj.", 64)},
     (1, 2), CompatibilityError, "attention.dense is quantized differently in different pipeline stages"),
    ("heads", {}, (3, 1), CompatibilityError, "4 attention heads do not divide by 3"),
    ("mlp", {"config": set_key("intermediate_size", 254)}, (4, 1), CompatibilityError,
     "the intermediate size 254 does not divide by 4"),
    ("groups", {"algo": "W4A16_AWQ", "quantization": set_algo("group_size", 128)}, (4, 1), CompatibilityError,
     "the intermediate size of a rank, 64, does not divide into groups of 128 (W4A16_AWQ)"),
    ("more stages", {}, (1, 4), CompatibilityError, "there are only 3 layers for 4 pipeline stages"),
    ("stages of Phi-3", {"name": "phi3"}, (1, 2), CompatibilityError, "cannot split this model over pipeline stages"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "change", "division", "kind", "sentence"), CASES, ids=[case[0] for case in CASES])
def test_refused_before_anything_is_written(
    what: str, change: dict[str, Any], division: tuple[int, int], kind: type[TrtbuildError], sentence: str,
    made: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    assert what
    with pytest.raises(kind) as caught:
        convert(made(**change), tmp_path / "out", *division)
    assert type(caught.value) is kind
    assert sentence in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_experts_of_no_whole_tiles(tmp_path: Path) -> None:
    """Block scales of NVFP4 experts lie in tiles of 128 outputs by 64 inputs, on every rank."""
    source = quantized(plain(tmp_path / "plain", "qwen3_moe", moe_intermediate_size=128), tmp_path / "fp4", "NVFP4")
    convert(source, tmp_path / "two", 2, 1)
    with pytest.raises(
        CompatibilityError, match=r"has 64 outputs and 128 inputs in .*mlp\.fc; NVFP4 experts of Tensor"
    ):
        convert(source, tmp_path / "four", 4, 1)


def test_key_heads_that_neither_divide_nor_spread(tmp_path: Path) -> None:
    source = plain(tmp_path / "plain", "llama", num_attention_heads=12, num_key_value_heads=6, hidden_size=192)
    with pytest.raises(CompatibilityError, match="6 key and value heads can neither be divided by nor spread over 4"):
        convert(source, tmp_path / "out", 4, 1)


def test_excluded_layers(made: Callable[..., Path], tmp_path: Path) -> None:
    """An excluded projection is named in the config; stages that differ cannot be."""

    def exclude(layers: tuple[int, ...]) -> Callable[[Tensors], object]:
        def change(held: Tensors) -> None:
            for layer in layers:
                for key in [key for key in held if key.startswith(f"model.layers.{layer}.mlp.down_proj.")]:
                    del held[key]
                held[f"model.layers.{layer}.mlp.down_proj.weight"] = torch.ones(128, 256).bfloat16()

        return change

    convert(made(algo="FP8", tensors=exclude((1,))), tmp_path / "one", 1, 1)
    config = json.loads((tmp_path / "one" / "config.json").read_text(encoding="utf-8"))
    assert "transformer.layers.1.mlp.proj" in config["quantization"]["exclude_modules"]
    assert (
        load_file(tmp_path / "one" / "rank0.safetensors")["transformer.layers.1.mlp.proj.weight"].dtype
        == torch.bfloat16
    )
    # Stages of two layers and of one: the second layer is only in the first stage, the others are first in theirs.
    for number, layers in enumerate(((0, 2), (1,), (0, 1, 2))):
        convert(made(algo="FP8", tensors=exclude(layers)), tmp_path / f"alike{number}", 1, 2)
    with pytest.raises(CompatibilityError, match="pipeline stages exclude different layers"):
        convert(made(algo="FP8", tensors=exclude((2,))), tmp_path / "none", 1, 2)


def test_requests() -> None:
    with pytest.raises(RecipeError) as caught:
        run({"source": "x", "tp_size": 0, "pp_size": True, "dtype": "int8"}, silent)
    paths = [problem.path for problem in caught.value.problems]
    assert paths == ["convert.output", "convert.tp_size", "convert.pp_size", "convert.dtype"]
    with pytest.raises(RecipeError, match="does not exist"):
        run({"source": "/nowhere", "output": "/nowhere/out"}, silent)


def test_an_output_that_is_taken(made: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="is a file"):
        convert(made(), tmp_path / "file", 1, 1)
    convert(made(), tmp_path / "out", 1, 1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(RecipeError, match="holds config.json already"):
        convert(made(), tmp_path / "out", 2, 1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_nothing_remains_of_a_failure_half_way(
    made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = made(tensors=lambda held: held["model.norm.weight"].fill_(1e20))
    with pytest.raises(CompatibilityError, match="which float16 cannot; convert to bfloat16"):
        convert(big, tmp_path / "out", 2, 1, "float16")
    assert list((tmp_path / "out").iterdir()) == []

    original, calls = os.pwrite, []

    def full(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) > 20:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(HostError, match="the disk is full"):
        convert(made(), tmp_path / "out", 2, 1)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_is_too_small(made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.statvfs

    class Small:
        f_bavail, f_frsize = 3, original(tmp_path).f_frsize

    monkeypatch.setattr(os, "statvfs", lambda path: Small())
    with pytest.raises(HostError, match="are free"):
        convert(made(), tmp_path / "out", 1, 1)
    assert list((tmp_path / "out").iterdir()) == []


def test_as_a_child_process(made: Callable[..., Path], tmp_path: Path) -> None:
    """The package runs by itself, without torch, and answers errors as errors."""
    request = tmp_path / "request.json"
    for tp, key in ((2, "result"), (3, "error")):
        request.write_text(json.dumps({"source": str(made()), "output": str(tmp_path / f"{tp}"), "tp_size": tp}))
        code = "import sys; sys.modules['torch'] = None; import runpy; runpy.run_module('trtbuild.convert')"
        command = [sys.executable, "-c", code, str(request)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert key in json.loads(done.stdout.splitlines()[-1])


def test_numbers_are_those_of_torch() -> None:
    """Every E4M3 code, every bf16 and fp16 value, and rounding at and beside every middle."""
    codes = torch.arange(256, dtype=torch.uint8)
    wanted = codes.view(torch.float8_e4m3fn).float()
    assert np.array_equal(to_float(codes.numpy(), "F8_E4M3"), wanted.numpy(), equal_nan=True)
    values = wanted[~wanted.isnan()].sort().values
    middles = (values[1:] + values[:-1]) / 2
    probes = torch.cat([values, middles, middles.nextafter(torch.tensor(1e9)), middles.nextafter(torch.tensor(-1e9))])
    assert np.array_equal(encode_e4m3(probes.numpy()), probes.to(torch.float8_e4m3fn).view(torch.uint8).numpy())
    floats = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 100
    for name, kind in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        cast = caster("F32", name)
        assert cast is not None
        assert np.array_equal(cast(floats.numpy()).view(np.uint16), floats.to(kind).view(torch.uint16).numpy())
        bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
        finite = bits[~bits.view(kind).float().isnan()]
        back = caster(name, "F32")
        assert back is not None
        assert np.array_equal(back(finite.numpy().view("<u2" if name == "BF16" else "<f2")), finite.view(kind).float())
