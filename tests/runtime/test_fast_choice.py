"""Which models the fast path takes, its reasons, and the fused weights: all of it without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny
from runtime.conftest import engine_config
from runtime.fp8 import fp8_checkpoint
from runtime.int4 import int4_checkpoint
from trtbuild.runtime import Engine
from trtbuild.runtime.fast import choice
from trtbuild.runtime.fast.packing import pack, unpack
from trtbuild.runtime.fast.weights import fuse
from trtbuild.runtime.model import ModelRunner

Load = Callable[..., Engine]
TAKEN = ("llama", "llama-tied", "mistral", "qwen2", "qwen3")
SHAPE = {"head_dim": 32, "num_hidden_layers": 2}


def runner(path: Path, **config: object) -> ModelRunner:
    return ModelRunner.load(path, engine_config(compute_dtype="float32", **config))


def reason(made: ModelRunner) -> str | None:
    """What stands against the model itself, whatever the device."""
    return choice._class_reason(made.model, made.calls) or choice._weights_reason(made.model)


def test_a_cpu_runs_the_general_path_and_says_so(engine: Load) -> None:
    one = engine()
    assert one.facts.path == "general: the device is cpu"
    assert one.facts.notes == ()


@pytest.mark.parametrize("name", TAKEN)
def test_the_common_decoders_are_taken(checkpoint: Callable[..., Path], name: str) -> None:
    assert reason(runner(checkpoint(name, **SHAPE))) is None


@pytest.mark.parametrize("name", [name for name in tiny.ARCHITECTURES | tiny.MORE_ARCHITECTURES if name not in TAKEN])
def test_others_are_left_to_the_general_path(checkpoint: Callable[..., Path], name: str) -> None:
    found = reason(runner(checkpoint(name)))
    assert found is not None
    assert "is not one of LlamaForCausalLM" in found


def test_the_reasons_name_what_they_found(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    assert "head size is [16]" in str(reason(runner(checkpoint("llama"))))
    assert "hidden_act is gelu" in str(reason(runner(checkpoint("llama", hidden_act="gelu", **SHAPE))))
    path = fp8_checkpoint(checkpoint("llama", **SHAPE), tmp_path / "same")
    assert "is expanded" in str(reason(runner(path, weights="expanded")))
    assert reason(runner(path, weights="packed")) is None
    path = int4_checkpoint(checkpoint("llama", **SHAPE), tmp_path / "int4")
    assert reason(runner(path, weights="packed")) is None
    path = int4_checkpoint(checkpoint("llama", **SHAPE), tmp_path / "int4-wide", group=16)
    assert "has groups of [16] inputs" in str(reason(runner(path, weights="packed")))
    path = int4_checkpoint(checkpoint("llama", **SHAPE), tmp_path / "int4-other", one_smoothing=False)
    assert "q_proj/k_proj/v_proj of layer 0 has a different pre_quant_scale" in str(
        reason(runner(path, weights="packed"))
    )
    other = fp8_checkpoint(checkpoint("llama", **SHAPE), tmp_path / "other", one_scale=False)
    assert "q_proj/k_proj/v_proj of layer 0 has a different weight_scale" in str(
        reason(runner(other, weights="packed"))
    )


def test_a_type_and_a_device_are_reasons_too() -> None:
    cuda = torch.device("cuda")
    assert choice._host_reason(torch.device("cpu"), torch.bfloat16) == "the device is cpu"
    assert "compute_dtype is float64" in str(choice._host_reason(cuda, torch.float64))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "fp8", "int4"])
def test_fused_weights_leave_the_model_as_it_was(checkpoint: Callable[..., Path], tmp_path: Path, name: str) -> None:
    path = checkpoint("llama" if name in ("fp8", "int4") else name, **SHAPE)
    if name == "fp8":
        path = fp8_checkpoint(path, tmp_path / "fp8")
    if name == "int4":
        path = int4_checkpoint(path, tmp_path / "int4")
    with Engine.load(path, config=engine_config(weights="packed")) as engine:
        prompt = list(range(5, 30))
        before = engine.logits(prompt)
        made = engine._runner
        weights = fuse(made.model, made.calls, 64)
        assert torch.equal(engine.logits(prompt), before)
        attention, layer = made.model.model.layers[1].self_attn, weights.layers[1]
        # Views of the fused matrix: to write into it is to change the layer.
        if name == "int4":
            assert attention.k_proj.weight is None
            assert attention.k_proj.weights().shape == (64, 64)
            assert layer.qkv.outputs == 256
        else:
            assert attention.k_proj.weight.data_ptr() == layer.qkv.weight[layer.heads.queries * 32 :].data_ptr()
        assert (layer.qkv.bias is not None) == (name == "qwen2")
        assert (layer.heads.query_norm is not None) == (name == "qwen3")
        layer.gate_up.weight.view(torch.uint8).zero_()
        assert not torch.equal(engine.logits(prompt), before)


def test_rotation_is_the_models_own(checkpoint: Callable[..., Path]) -> None:
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 128}  # fmt: skip
    made = runner(checkpoint("llama", rope_parameters=scaled, **SHAPE))
    weights = fuse(made.model, made.calls, 300)
    angles = torch.arange(300)[:, None] * made.model.model.rotary_emb.inv_freq[None].float()
    assert torch.allclose(weights.rotation.cos, angles.cos(), atol=1e-6)
    assert torch.allclose(weights.rotation.sin, angles.sin(), atol=1e-6)
    plain = torch.arange(300)[:, None] * 10000.0 ** (-torch.arange(0, 32, 2) / 32)
    assert not torch.allclose(weights.rotation.cos, plain.cos(), atol=1e-2)


@pytest.mark.parametrize(("outputs", "inputs", "group"), [(6, 256, 128), (33, 192, 64), (5, 32, 32)])
def test_packing_keeps_every_code(outputs: int, inputs: int, group: int) -> None:
    codes = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8)
    packed = pack(codes, group)
    assert packed.shape == (inputs // group, outputs, group // 2)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed), codes)
    assert torch.equal(unpack(packed[:, 1:4]), codes[1:4])
