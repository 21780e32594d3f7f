"""Scales of joined projections, brought together as TensorRT-LLM does at load: codes to the last bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import save_checkpoint
from trtbuild.runtime import JoinedScales
from trtbuild.runtime.checkpoint import LoadedModel, load_model
from trtbuild.runtime.linear import Fp8Linear

GROUPS = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in FP8 whose projections all have scales of their own, and so have its keys and values."""
    path = save_checkpoint(tmp_path_factory.mktemp("joined") / "c", tokenizer=False)
    made: Tensors = {}
    random = torch.Generator().manual_seed(3)
    for name, tensor in load_file(path / "model.safetensors").items():
        made[name] = tensor
        if not name.endswith("_proj.weight"):
            continue
        prefix = name.removesuffix(".weight")
        codes = (60 * torch.randn(tensor.shape, generator=random)).clamp(-448, 448)
        made[name] = codes.to(torch.float8_e4m3fn)
        for scale in ("weight_scale", "input_scale"):
            made[f"{prefix}.{scale}"] = 0.001 + 0.003 * torch.rand((), generator=random)
        if prefix.endswith(("k_proj", "v_proj")):
            made[f"{prefix}.{prefix[-6]}_scale"] = 0.01 + torch.rand((), generator=random)
    save_file(made, path / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    (path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    return path


def loaded(path: Path, weights: str, joined: JoinedScales | None) -> LoadedModel:
    return load_model(
        path, device=torch.device("cpu"), dtype=torch.float32, weights=weights, attn_implementation="eager",
        joined=joined,
    )  # fmt: skip


@pytest.mark.parametrize("weights", ["expanded", "packed"])
@pytest.mark.parametrize("intermediate", ["float32", "bfloat16"])
def test_codes_and_scales(checkpoint: Path, weights: str, intermediate: str) -> None:
    stored, kind = load_file(checkpoint / "model.safetensors"), getattr(torch, intermediate)
    model = loaded(checkpoint, weights, JoinedScales(gate_up=True, kv_cache=False, intermediate=intermediate)).model
    for layer in range(3):
        for place, names in GROUPS.items():
            prefixes = [f"model.layers.{layer}.{place}.{name}" for name in names]
            largest = max(stored[f"{prefix}.weight_scale"] for prefix in prefixes)
            inputs = max(stored[f"{prefix}.input_scale"] for prefix in prefixes)
            for prefix in prefixes:
                found = model.get_submodule(prefix)
                assert isinstance(found, Fp8Linear)
                assert (found.weight_scale, found.input_scale) == (largest, inputs)
                values = stored[f"{prefix}.weight"].to(kind) * stored[f"{prefix}.weight_scale"]
                assert values.dtype == kind
                assert found.weight.float().equal((values / largest).to(torch.float8_e4m3fn).float())


def test_both_ways_of_rounding_differ_somewhere(checkpoint: Path) -> None:
    codes = [
        loaded(checkpoint, "packed", JoinedScales(gate_up=True, kv_cache=False, intermediate=kind)).model.state_dict()
        for kind in ("float32", "bfloat16")
    ]
    assert any(not value.float().equal(codes[1][name].float()) for name, value in codes[0].items())


def test_what_is_not_joined_stays(checkpoint: Path) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    joined = JoinedScales(gate_up=False, kv_cache=True, intermediate="float32")
    found = loaded(checkpoint, "packed", joined)
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"):
            linear = found.model.get_submodule(f"{prefix}.{name}")
            assert linear.weight.float().equal(stored[f"{prefix}.{name}.weight"].float())
            assert linear.weight_scale == stored[f"{prefix}.{name}.weight_scale"]
        both = [float(stored[f"{prefix}.self_attn.{letter}_proj.{letter}_scale"]) for letter in "kv"]
        assert found.kv_scales is not None
        assert found.kv_scales[layer] == (max(both), max(both))
    assert "6 projections were brought to the weight scale of others that they are joined with" in found.notes
    own = loaded(checkpoint, "packed", None)
    assert own.kv_scales is not None
    assert len(set(own.kv_scales[0])) == 2
    assert not any("joined" in note for note in own.notes)
