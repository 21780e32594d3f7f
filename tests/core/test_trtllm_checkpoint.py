"""The rules by which TensorRT-LLM takes a checkpoint: one good checkpoint for each format, and what breaks it."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trtbuild.adapters.trtllm_checkpoint import CheckpointCheck, Layout, check
from trtbuild.checkpoint_files import LocalFiles
from trtbuild.safetensors_header import DTYPE_BITS

HIDDEN, INNER, GROUP, LAYERS = 256, 512, 64, 2
ROWS = {"q_proj": 256, "k_proj": 128, "v_proj": 128, "o_proj": 256, "gate_proj": 512, "up_proj": 512, "down_proj": 256}
Tensors = dict[str, tuple[str, list[int], bytes]]


def number(value: float, dtype: str = "F32") -> tuple[str, list[int], bytes]:
    raw = struct.pack("<f", value)
    return dtype, [], raw[2:] if dtype == "BF16" else raw


number_of = number


def zeros(dtype: str, *shape: int) -> tuple[str, list[int], bytes]:
    return dtype, list(shape), bytes(math.prod(shape) * DTYPE_BITS[dtype] // 8)


def linear(algo: str | None, short: str, outputs: int, inputs: int) -> Tensors:
    if algo is None:
        return {"weight": zeros("BF16", outputs, inputs)}
    if algo == "FP8":
        return {
            "weight": zeros("F8_E4M3", outputs, inputs),
            "weight_scale": number(0.5),
            "input_scale": number(0.25, "BF16"),
        }
    if algo == "NVFP4":
        scales = {"weight_scale_2": number(0.5), "input_scale": number(0.25)}
        return scales | {
            "weight": zeros("U8", outputs, inputs // 2),
            "weight_scale": zeros("F8_E4M3", outputs, inputs // 16),
        }
    packed = {
        "weight": zeros("U8", outputs // 2, inputs),
        "weight_scale": zeros("F32", outputs, inputs // (128 if algo == "W4A8_AWQ" else GROUP)),
    }
    if algo == "W4A8_AWQ":
        packed |= {"weight_scale_2": number(0.5), "input_scale": number(0.25)}
    return packed | ({"pre_quant_scale": zeros("BF16", inputs)} if short in {"o_proj", "down_proj"} else {})


def tensors_of(algo: str | None, *, kv: bool = True) -> Tensors:
    found: Tensors = {
        "model.embed_tokens.weight": zeros("BF16", 32, HIDDEN),
        "lm_head.weight": zeros("BF16", 32, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        found[f"{prefix}.input_layernorm.weight"] = zeros("BF16", HIDDEN)
        for short, outputs in ROWS.items():
            place = "mlp" if short in {"gate_proj", "up_proj", "down_proj"} else "self_attn"
            inputs = INNER if short == "down_proj" else HIDDEN
            for suffix, tensor in linear(algo, short, outputs, inputs).items():
                found[f"{prefix}.{place}.{short}.{suffix}"] = tensor
        if kv:
            found |= {f"{prefix}.self_attn.{name}": number(1.0) for name in ("k_proj.k_scale", "v_proj.v_scale")}
    return found


def experts_of(algo: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Tensors:
    """A good checkpoint whose layers have two experts instead of an MLP; FP8 has scales of its own everywhere."""
    found = {name: tensor for name, tensor in tensors_of(algo).items() if ".mlp." not in name}
    for number in range(LAYERS * 2):
        prefix = f"model.layers.{number // 2}.mlp.experts.{number % 2}"
        for index, short in enumerate(names):
            outputs, inputs = (HIDDEN, INNER) if index == 2 else (INNER, HIDDEN)
            for suffix, tensor in linear(algo, short, outputs, inputs).items():
                found[f"{prefix}.{short}.{suffix}"] = tensor
            if algo == "FP8":
                found[f"{prefix}.{short}.weight_scale"] = number_of(0.1 + number + index)
                found[f"{prefix}.{short}.input_scale"] = number_of(0.2 + number)
            if algo == "W4A8_AWQ":
                found[f"{prefix}.{short}.pre_quant_scale"] = zeros("BF16", inputs)
    return found


def prefused_of(algo: str) -> Tensors:
    """A good checkpoint of Phi-3's shape: query, key and value, and gate and up, stored as one."""
    found = {
        name: tensor
        for name, tensor in tensors_of(algo, kv=False).items()
        if not any(f".{short}." in name for short in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
    }
    for layer in range(LAYERS):
        for short, outputs in (("self_attn.qkv_proj", 512), ("mlp.gate_up_proj", 2 * INNER)):
            for suffix, tensor in linear(algo, short, outputs, HIDDEN).items():
                found[f"model.layers.{layer}.{short}.{suffix}"] = tensor
    return found


def write(path: Path, tensors: Tensors, quantization: dict[str, Any] | None, **config: Any) -> Path:
    path.mkdir()
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (path / "config.json").write_text(json.dumps(config))
    if quantization is not None:
        beside = {"producer": {"name": "modelopt"}, "quantization": quantization}
        (path / "hf_quant_config.json").write_text(json.dumps(beside))
    return path


def said(algo: str | None, **changes: Any) -> dict[str, Any]:
    group = {"W4A16_AWQ": GROUP, "W4A8_AWQ": 128, "NVFP4": 16}.get(algo or "")
    usual = {"quant_algo": algo, "kv_cache_quant_algo": "FP8", "group_size": group, "exclude_modules": ["lm_head"]}
    return usual | changes


def problems(path: Path, version: str = "1.2.1", **layout: Any) -> dict[str, list[str]]:
    checks = check(LocalFiles(path), version, Layout(**layout))
    return {found.name: list(found.problems) for found in checks if found.problems}


FORMATS = ["FP8", "W4A16_AWQ", "NVFP4"]


@pytest.mark.parametrize("algo", FORMATS)
def test_good_checkpoints(tmp_path: Path, algo: str) -> None:
    path = write(tmp_path / "c", tensors_of(algo), said(algo), quantization_config={"quant_algo": algo})
    gpu = "B200" if algo == "NVFP4" else "H100"
    assert problems(path, gpu=gpu, tensor_parallel_size=2) == {}
    found = check(LocalFiles(path), "1.2.1", Layout())
    assert [rule.name for rule in found] == [
        *("recognition", "packing", "excluded modules", "scales", "fused projections", "AWQ input scales"),
        *("KV cache scales", "tensor parallel", "release", "GPU"),
    ]
    assert found[1] == CheckpointCheck("packing", (), f"14 layers in {algo}")
    assert found[-1].detail == "target.gpu is not set: not checked"


def test_a_checkpoint_in_bf16(tmp_path: Path) -> None:
    path = write(tmp_path / "c", tensors_of(None, kv=False), None)
    assert problems(path, gpu="A100", tensor_parallel_size=4) == {}
    assert problems(path, gpu="V100") == {"GPU": ["TensorRT-LLM runs bf16 from SM80 on"]}
    coded = write(tmp_path / "d", tensors_of("FP8", kv=False), None)
    assert problems(coded)["packing"][0] == (
        "model.layers.0.self_attn.q_proj: F8_E4M3 in a checkpoint without quant_algo"
    )


Q, K, OUT, DOWN = (
    f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")
)
GATE = "model.layers.1.mlp.gate_proj"


def drop(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def put(name: str, tensor: tuple[str, list[int], bytes]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: tensor}


@pytest.mark.parametrize(
    ("algo", "change", "rule", "sentence"),
    [
        ("FP8", put(f"{K}.input_scale", number(0.5)), "fused projections",
         "model.layers.1.self_attn.{q_proj,k_proj,v_proj}: input_scale must be equal, but they are 0.25, 0.5, 0.25"),
        ("FP8", put(f"{GATE}.input_scale", number(0.5)), "fused projections",
         "model.layers.1.mlp.{gate_proj,up_proj}: input_scale must be equal, but they are 0.5, 0.25"),
        ("NVFP4", put(f"{K}.weight_scale_2", number(0.7)), "fused projections", "weight_scale_2 must be equal, but th"),
        ("FP8", put(f"{OUT}.weight_scale", number(0.0)), "scales", f"{OUT}.weight_scale is 0.0"),
        ("FP8", put(f"{OUT}.input_scale", number(math.nan)), "scales", f"{OUT}.input_scale is nan"),
        ("FP8", put(f"{OUT}.weight_scale", number(-1.0, "BF16")), "scales", f"{OUT}.weight_scale is -1.0"),
        ("FP8", drop(f"{OUT}.input_scale"), "packing", f"{OUT}: input_scale is missing"),
        ("FP8", put(f"{OUT}.weight_scale", zeros("F32", 256)), "packing", f"{OUT}: weight_scale has shape [256], not"),
        ("FP8", put(f"{OUT}.weight", zeros("I8", 256, 256)), "packing", f"{OUT}: the weight is I8, FP8 stores F8_E4M3"),
        ("W4A16_AWQ", drop(f"{OUT}.pre_quant_scale"), "AWQ input scales",
         f"{OUT}: pre_quant_scale is missing, TensorRT-LLM does not load the layer without"),
        ("W4A16_AWQ", put(f"{DOWN}.pre_quant_scale", zeros("BF16", 256)), "AWQ input scales",
         f"{DOWN}: pre_quant_scale has 256 numbers, not 512"),
        ("W4A16_AWQ", put(f"{Q}.pre_quant_scale", zeros("BF16", 256)), "AWQ input scales",
         f"{Q}: pre_quant_scale would be ignored; it belongs into the norm before"),
        ("W4A16_AWQ", put(f"{Q}.weight_scale", zeros("F32", 4, 256)), "packing",
         f"{Q}: weight_scale has shape [4, 256], not [256, 4]"),
        ("W4A16_AWQ", put(f"{Q}.weight", zeros("I32", 32, 256)), "packing", f"{Q}: the weight is I32, W4A16_AWQ store"),
        ("FP8", put(f"{Q}.weight", zeros("BF16", 256, 256)), "fused projections",
         "quantized only in part; TensorRT-LLM joins them into one layer"),
        ("FP8", put(f"{OUT}.weight", zeros("BF16", 256, 256)), "excluded modules",
         f"{OUT} is not quantized, but exclude_modules does not name it"),
        ("FP8", drop(f"{K}.k_scale"), "KV cache scales",
         "model.layers.1.self_attn: k_scale or v_scale is missing, other layers have both"),
        ("FP8", put(f"{K}.k_scale", number(math.inf)), "KV cache scales", f"{K}.k_scale is inf"),
    ],
)  # fmt: skip
def test_broken_tensors(
    tmp_path: Path, algo: str, change: Callable[[Tensors], Tensors], rule: str, sentence: str
) -> None:
    found = problems(write(tmp_path / "c", change(tensors_of(algo)), said(algo)))
    assert any(sentence in problem for problem in found[rule]), found


E0 = "model.layers.1.mlp.experts.0"
E1 = "model.layers.1.mlp.experts.1"


@pytest.mark.parametrize(
    ("made", "detail"),
    [
        (experts_of("FP8"), "2 groups, 12 projections of experts"),
        (experts_of("FP8", ("w1", "w3", "w2")), "2 groups, 12 projections of experts"),
        (experts_of("NVFP4"), "2 groups, 12 projections of experts"),
        (experts_of("W4A8_AWQ"), "2 groups, 12 projections of experts"),
        (prefused_of("FP8"), "0 groups, 4 projections stored as one"),
        (prefused_of("NVFP4"), "0 groups, 4 projections stored as one"),
    ],
    ids=["FP8", "FP8 of Mixtral", "NVFP4", "W4A8", "FP8 as one", "NVFP4 as one"],
)
def test_experts_and_projections_stored_as_one(tmp_path: Path, made: Tensors, detail: str) -> None:
    """FP8 may differ from expert to expert, and gate from up: the largest scale is taken."""
    weight = next(tensor for name, tensor in made.items() if name.endswith("o_proj.weight"))
    algo = {"F8_E4M3": "FP8", "U8": "NVFP4" if weight[1][1] < HIDDEN else "W4A8_AWQ"}[weight[0]]
    path = write(tmp_path / "c", made, said(algo, kv_cache_quant_algo="FP8" if "0 groups" not in detail else None))
    assert problems(path) == {}
    found = {rule.name: rule.detail for rule in check(LocalFiles(path), "1.2.1", Layout())}
    assert found["fused projections"] == detail


@pytest.mark.parametrize(
    ("algo", "made", "sentence"),
    [
        ("NVFP4", experts_of("NVFP4") | {f"{E1}.up_proj.weight_scale_2": number(0.7)},
         f"{E1}.{{gate_proj,up_proj}}: weight_scale_2 must be equal, but they are 0.5, 0.7"),
        ("NVFP4", experts_of("NVFP4", ("w1", "w3", "w2")) | {f"{E1}.w3.input_scale": number(0.7)},
         f"{E1}.{{w1,w3}}: input_scale must be equal, but they are 0.25, 0.7"),
        ("W4A8_AWQ", experts_of("W4A8_AWQ") | {f"{E0}.up_proj.pre_quant_scale": ("BF16", [256], b"\1" * 512)},
         f"{E0}.{{gate_proj,up_proj}}: pre_quant_scale must be equal, but they are not"),
        ("W4A8_AWQ", drop(f"{E0}.down_proj.pre_quant_scale")(experts_of("W4A8_AWQ")),
         f"{E0}.down_proj: pre_quant_scale is missing, TensorRT-LLM does not load the expert"),
        ("W4A16_AWQ", experts_of("W4A16_AWQ"),
         "model.layers.0.mlp.experts: TensorRT-LLM's experts with weights of 4 bits have inputs in FP8"),
        ("FP8", experts_of("FP8") | {f"{E1}.up_proj.weight": zeros("BF16", 512, 256)},
         "model.layers.1.mlp.experts: quantized only in part; TensorRT-LLM joins them into one layer"),
        ("W4A16_AWQ", prefused_of("W4A16_AWQ"),
         "model.layers.0.self_attn.qkv_proj: TensorRT-LLM takes the rows of query, key and value"),
        ("W4A16_AWQ", prefused_of("W4A16_AWQ"), "in W4A16_AWQ a row holds two"),
    ],
)  # fmt: skip
def test_broken_experts(tmp_path: Path, algo: str, made: Tensors, sentence: str) -> None:
    found = problems(write(tmp_path / "c", made, said(algo)))["fused projections"]
    assert any(sentence in problem for problem in found), found


@pytest.mark.parametrize(
    ("changes", "rule", "sentence"),
    [
        (
            {"quant_algo": "INT8"},
            "recognition",
            "quant_algo INT8 has no linear layer in TensorRT-LLM's LLM API, only FP8, ",
        ),
        ({"quant_algo": None, "kv_cache_quant_algo": None}, "recognition", "names no quant_algo"),
        ({"quant_algo": None}, "recognition", "names no quant_algo"),
        ({"kv_cache_quant_algo": "INT8"}, "recognition", "kv_cache_quant_algo INT8 is not FP8"),
        (
            {"kv_cache_quant_algo": None},
            "KV cache scales",
            "there are k_scale and v_scale, but kv_cache_quant_algo is not",
        ),
        (
            {"exclude_modules": ["LM_HEAD"]},
            "excluded modules",
            "lm_head is not quantized, but exclude_modules does not na",
        ),
        (
            {"exclude_modules": ["lm_head", "*.o_proj"]},
            "excluded modules",
            "o_proj is quantized, but exclude_modules name",
        ),
        ({"group_size": 128}, "packing", "weight_scale has shape [256, 4], not [256, 2]"),
        ({"group_size": 32}, "packing", "groups of 32; TensorRT-LLM's kernels take 64 or 128"),
        ({"group_size": None}, "packing", "hf_quant_config.json names no group_size for W4A16_AWQ"),
    ],
)
def test_broken_quantization(tmp_path: Path, changes: dict[str, Any], rule: str, sentence: str) -> None:
    found = problems(write(tmp_path / "c", tensors_of("W4A16_AWQ"), said("W4A16_AWQ", **changes)))
    assert any(sentence in problem for problem in found[rule]), found


def test_recognition(tmp_path: Path) -> None:
    inline = {"quantization_config": {"quant_algo": "NVFP4"}}
    path = write(tmp_path / "a", tensors_of("FP8"), said("FP8"), **inline)
    assert problems(path)["recognition"] == ["config.json names quant_algo NVFP4, hf_quant_config.json FP8"]
    other = {"producer": {"name": "other"}, "quantization": said("FP8")}
    (path / "hf_quant_config.json").write_text(json.dumps(other))
    assert "producer.name is not modelopt" in problems(path)["recognition"][0]
    (path / "hf_quant_config.json").write_text(json.dumps({"quantization": said("FP8")}))
    assert "producer.name is not modelopt" in problems(path)["recognition"][0]
    (path / "hf_quant_config.json").write_text(json.dumps({"quant_algo": "FP8"}))
    assert "has no section `quantization`: only newer releases read" in problems(path)["recognition"][0]
    (path / "hf_quant_config.json").unlink()
    assert "hf_quant_config.json is missing: only newer releases read" in problems(path)["recognition"][0]


@pytest.mark.parametrize("algo", ["FP8", "W4A8_AWQ"])
def test_routers_and_factors_of_experts_are_not_judged_by_the_rules_of_dense_layers(tmp_path: Path, algo: str) -> None:
    tensors = experts_of(algo) | {"model.layers.0.mlp.gate.weight": zeros("BF16", 4, HIDDEN)}
    path = write(tmp_path / "c", tensors, said(algo))
    assert problems(path, tensor_parallel_size=2) == {}


def test_tensor_parallel_sizes(tmp_path: Path) -> None:
    path = write(tmp_path / "c", tensors_of("W4A16_AWQ"), said("W4A16_AWQ"))
    assert problems(path, tensor_parallel_size=4) == {}
    wrong = problems(path, tensor_parallel_size=8)["tensor parallel"]
    assert "model.layers.0.self_attn.o_proj: 256 inputs are not divided by 8 into whole groups of 64" in wrong
    assert not any("down_proj" in problem for problem in wrong)
    assert "256 outputs are not divided by 3" in str(problems(path, tensor_parallel_size=3)["tensor parallel"])
    assert problems(path, tensor_parallel_size=8, attention_dp=True) == {}


def test_gpus(tmp_path: Path) -> None:
    path = write(tmp_path / "c", tensors_of("FP8"), said("FP8"))
    assert problems(path, gpu="A100") == {
        "GPU": ["TensorRT-LLM 1.2 lists FP8 for SM89, SM90, SM100, SM103, SM120 only"]
    }
    assert problems(path, gpu="Abacus")["GPU"] == ["Abacus with TensorRT-LLM 1.2.1 is in no table"]


def test_many_problems_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "c", tensors_of("FP8"), said("FP8", exclude_modules=["*"]))
    assert problems(path)["excluded modules"][-1] == "and 9 more of this kind"


def mixed() -> tuple[Tensors, dict[str, Any]]:
    """Attention in FP8, the rest in INT4, and what hf_quant_config.json says of it."""
    fp8, int4 = tensors_of("FP8"), tensors_of("W4A16_AWQ")
    tensors = {name: value for name, value in fp8.items() if ".mlp." not in name}
    tensors |= {name: value for name, value in int4.items() if ".mlp." in name}
    layers = {}
    for name in tensors:
        module = name.removesuffix(".weight")
        if module != name and ".mlp." in name:
            layers[module] = {"quant_algo": "W4A16_AWQ", "group_size": GROUP}
        elif module != name and "self_attn" in name:
            layers[module] = {"quant_algo": "FP8"}
    said = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8", "quantized_layers": layers}
    return tensors, said | {"exclude_modules": ["lm_head"]}


def test_a_format_for_each_layer(tmp_path: Path) -> None:
    tensors, said_of_it = mixed()
    assert problems(write(tmp_path / "good", tensors, said_of_it), gpu="H100", tensor_parallel_size=2) == {}
    found = problems(write(tmp_path / "gpu", tensors, said_of_it), gpu="A100")
    assert found == {"GPU": ["TensorRT-LLM 1.2 lists FP8 for SM89, SM90, SM100, SM103, SM120 only"]}
    halves = dict(said_of_it["quantized_layers"])
    halves["model.layers.0.self_attn.k_proj"] = {"quant_algo": "W4A16_AWQ", "group_size": GROUP}
    found = problems(write(tmp_path / "halves", tensors, said_of_it | {"quantized_layers": halves}))
    assert "{q_proj,k_proj,v_proj}: in several formats" in found["formats of joined projections"][0]
    assert "k_proj: the weight is F8_E4M3, W4A16_AWQ stores U8" in found["packing"][0]
    unnamed = {name: entry for name, entry in said_of_it["quantized_layers"].items() if "1.mlp.down" not in name}
    found = problems(write(tmp_path / "unnamed", tensors, said_of_it | {"quantized_layers": unnamed}))
    assert found
    found = problems(write(tmp_path / "none", tensors, said_of_it | {"quantized_layers": {}}))
    assert "names no layer" in found["recognition"][0]
