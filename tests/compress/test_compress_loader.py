"""The loader: exported files against a float64 reference written from the format descriptions, and damaged files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compress_requests import ARCHITECTURES
from format_reference import reference_logits, round_e4m3
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tiny import ARCHITECTURES as ALL_ARCHITECTURES
from trtbuild.errors import ArtifactError, CompatibilityError
from trtbuild.runtime.checkpoint import LoadedModel, load_model
from trtbuild.runtime.codes import to_e4m3, unpack_int4
from trtbuild.runtime.linear import CodedLinear, Fp8Linear

FORMATS: dict[str, dict[str, Any]] = {"fp8": {"format": "fp8"}, "int4": {"format": "int4_awq", "group_size": 32}}
IDS = torch.arange(40).reshape(1, 40) * 7 % 320


def load(directory: Path, dtype: torch.dtype = torch.float64, weights: str = "auto") -> LoadedModel:
    return load_model(directory, device=torch.device("cpu"), dtype=dtype, weights=weights, attn_implementation="eager")


def logits(directory: Path, dtype: torch.dtype = torch.float64, weights: str = "auto") -> torch.Tensor:
    with torch.no_grad():
        return load(directory, dtype, weights).model(IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(ALL_ARCHITECTURES))
def test_bf16_checkpoints_compute_as_in_transformers(name: str, dtype: torch.dtype, sources: Any) -> None:
    # Transformers' default for experts has no float64 kernel.
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model = AutoModelForCausalLM.from_pretrained(sources(name), dtype=dtype, attn_implementation="eager", **experts)
    with torch.no_grad():
        wanted = model.eval()(IDS).logits
    assert torch.equal(logits(sources(name), dtype), wanted)


@pytest.mark.parametrize("form", ["expanded", "packed"])
@pytest.mark.parametrize("changes", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_quantized_checkpoints_compute_as_the_format_says(
    name: str, changes: dict[str, Any], form: str, sources: Any, compress: Any
) -> None:
    directory, _ = compress(name, **changes)
    wanted = reference_logits(directory, IDS)
    assert (logits(directory, weights=form) - wanted).abs().max() < 1e-9
    # In float32 an activation that lies between two codes may fall to the other side, and move what comes after.
    narrow = logits(directory, torch.float32, form).double()
    assert (narrow - wanted).abs().mean() < 0.02 * wanted.abs().mean()
    # The format itself moves the logits by far more: this is not the unquantized model.
    assert (wanted - logits(sources(name))).abs().mean() > 0.01 * wanted.abs().mean()


OTHERS: list[tuple[str, str]] = [
    *(("llama", name) for name in (
        "fp8_per_channel_per_token", "int8_sq", "int8_weight_only", "w4a8_awq", "w4a16_nvfp4", "mxfp8",
    )),
    ("phi", "int8_sq"), ("phi", "nvfp4"), ("mixtral", "mxfp4"), ("qwen3_moe", "nvfp4"),
    ("qwen3_moe", "fp8_per_channel_per_token"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "weight_format"), OTHERS)
def test_the_other_formats_compute_as_their_descriptions_say(
    name: str, weight_format: str, sources: Any, compress: Any
) -> None:
    group = 32 if weight_format == "w4a8_awq" else None
    directory, _ = compress(name, format=weight_format, group_size=group)
    wanted = reference_logits(directory, IDS)
    assert torch.equal(logits(directory), logits(directory, weights="packed"))
    # Norms are computed in other orders: an input that lies between two codes may fall to the other side.
    assert (logits(directory) - wanted).abs().max() < 1e-9
    narrow = logits(directory, torch.float32).double()
    assert (narrow - wanted).abs().mean() < 0.05 * wanted.abs().mean()
    assert (wanted - logits(sources(name))).abs().mean() > 0.002 * wanted.abs().mean()


@pytest.mark.parametrize("changes", FORMATS.values(), ids=FORMATS)
def test_packed_weights_stay_within_the_size_of_the_file(changes: dict[str, Any], compress: Any) -> None:
    directory, _ = compress("qwen3", **changes)
    on_disk = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    resident = {}
    for form in ("packed", "expanded"):
        loaded = load(directory, torch.bfloat16, form)
        tensors = [*loaded.model.parameters(), *loaded.model.buffers()]
        resident[form] = sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors}.values())
        assert bool(loaded.notes) == (form == "expanded")
    assert resident["packed"] <= 1.2 * on_disk < resident["expanded"]


def test_input_scale_decides_the_result(compress: Any, tmp_path: Path) -> None:
    directory, _ = compress("llama-tied", format="fp8")
    before = logits(directory)

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        # The largest activations saturate now.
        tensors.update({name: value / 2 for name, value in tensors.items() if name.endswith("input_scale")})

    after = logits(changed(directory, tmp_path / "halved", halve))
    assert (after - before).abs().max() > 0.05
    assert (after - reference_logits(tmp_path / "halved", IDS)).abs().max() < 1e-9


def test_kv_scales_by_layer(compress: Any) -> None:
    directory, _ = compress("phi3", kv_cache="fp8")
    tensors = load_file(directory / "model.safetensors")
    loaded = load(directory)
    assert loaded.quantization.kv_cache == "FP8"
    assert loaded.quantization.algorithm is None
    assert loaded.kv_scales == {
        index: tuple(
            float(tensors[f"model.layers.{index}.self_attn.{leaf}"]) for leaf in ("k_proj.k_scale", "v_proj.v_scale")
        )
        for index in range(3)
    }
    plain, _ = compress("phi3")
    assert load(plain).kv_scales is None


def test_e4m3_saturates_and_rounds_to_even() -> None:
    values = torch.tensor([0.0, 449.0, 1e9, -1e9, 464.0, 1.0625, 1.1875, 2**-10, 3 * 2**-10, float("nan")])
    codes = to_e4m3(values, torch.tensor(1.0)).float()
    assert codes[:-1].tolist() == [0.0, 448.0, 448.0, -448.0, 448.0, 1.0, 1.25, 0.0, 2**-8]
    assert codes[-1].isnan()


def test_bf16_activations_are_rounded_once() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    scale = torch.tensor(0.0061)
    wanted = round_e4m3(x.double().numpy() / float(scale))
    assert np.array_equal(to_e4m3(x, scale).double().numpy(), wanted)


def test_int4_rows_are_low_and_high_nibbles() -> None:
    packed = torch.tensor([[0x80, 0x7F], [0x21, 0xF0]], dtype=torch.uint8)
    assert unpack_int4(packed).tolist() == [[0, -1], [-8, 7], [1, 0], [2, -1]]


def test_layers_are_ours_and_biases_stay(compress: Any) -> None:
    for changes, kind in ((FORMATS["fp8"], Fp8Linear), (FORMATS["int4"], CodedLinear)):
        directory, _ = compress("phi", **changes)
        model = load(directory).model
        layers = [module for module in model.modules() if isinstance(module, kind)]
        assert len(layers) == 18
        assert all(layer.bias is not None for layer in layers)
        assert isinstance(model.lm_head, torch.nn.Linear)


def test_tied_weights_share_one_tensor_and_differing_ones_do_not(sources: Any, tmp_path: Path) -> None:
    tied = load(sources("llama-tied"), torch.float32).model
    assert tied.lm_head.weight is tied.model.embed_tokens.weight

    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2

    model = load(changed(sources("llama-tied"), tmp_path / "both", add_head), torch.float32).model
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight * 2)


def changed(directory: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(directory, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


Q = "model.layers.1.self_attn.q_proj"
DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "norm missing": (lambda t: t.pop("model.norm.weight"), "model.norm.weight missing"),
    "layer missing": (lambda t: [t.pop(f"{Q}.{n}") for n in ("weight", "weight_scale", "input_scale")], f"{Q}.weight"),
    "weight scale missing": (lambda t: t.pop(f"{Q}.weight_scale"), f"{Q}.weight_scale: missing"),
    "input scale missing": (lambda t: t.pop(f"{Q}.input_scale"), f"{Q}.input_scale: missing"),
    "extra tensor": (lambda t: t.update({"model.extra.weight": torch.ones(2)}), "model.extra.weight in the files"),
    "norm of another shape": (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"norm.weight: shape \[3\]"),
    "weight of another shape": (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:8]}), f"{Q}: shape"),
    "scale is zero": (lambda t: t.update({f"{Q}.weight_scale": torch.tensor(0.0)}), "weight_scale: a scale must be"),
    "scale is NaN": (lambda t: t.update({f"{Q}.input_scale": torch.tensor(float("nan"))}), "positive finite"),
    "codes of another format": (lambda t: t.update({f"{Q}.weight": torch.ones(2, 2, dtype=torch.uint8)}), "in U8"),
    "KV scale missing": (lambda t: t.pop("model.layers.1.self_attn.k_proj.k_scale"), r"layers \[1\] have no k_scale"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoints_are_refused_by_name(change: Any, message: str, compress: Any, tmp_path: Path) -> None:
    directory, _ = compress("qwen3", format="fp8", kv_cache="fp8")
    with pytest.raises(ArtifactError, match=message):
        load(changed(directory, tmp_path / "damaged", change))


def test_damaged_experts_are_refused_by_name(sources: Any, tmp_path: Path) -> None:
    name = "model.layers.2.block_sparse_moe.experts.3.w2.weight"
    with pytest.raises(ArtifactError, match=r"layers.2.mlp.experts.3.down_proj.weight: missing"):
        load(changed(sources("mixtral"), tmp_path / "lost", lambda tensors: tensors.pop(name)))


def test_damaged_files_are_refused(compress: Any, tmp_path: Path) -> None:
    directory, _ = compress("llama-tied", format="fp8")
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="damaged safetensors file"):
        load(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"no \*.safetensors"):
        load(copy)
    (copy / "config.json").write_text("{")
    (copy / "hf_quant_config.json").unlink()
    with pytest.raises(ArtifactError, match="is not JSON"):
        load(copy)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quantization": {"quant_algo": "W4A8_QSERVE"}}, r"'W4A8_QSERVE'.*FP8, .*W4A16_AWQ"),
        ({"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "INT4"}}, "kv_cache_quant_algo 'INT4'"),
    ],
)
def test_unknown_quantization_is_refused(quantization: Any, message: str, compress: Any, tmp_path: Path) -> None:
    directory, _ = compress("llama-tied", format="fp8")
    shutil.copytree(directory, tmp_path / "copy")
    (tmp_path / "copy" / "hf_quant_config.json").write_text(json.dumps(quantization))
    with pytest.raises(CompatibilityError, match=message):
        load(tmp_path / "copy")


def test_the_config_alone_is_enough_and_another_method_is_refused(compress: Any, tmp_path: Path) -> None:
    directory, _ = compress("qwen3", format="fp8", kv_cache="fp8")
    shutil.copytree(directory, tmp_path / "copy")
    (tmp_path / "copy" / "hf_quant_config.json").unlink()
    flat, nested = load(tmp_path / "copy").quantization, load(directory).quantization
    assert (flat.algorithm, flat.kv_cache, flat.exclude) == (nested.algorithm, nested.kv_cache, nested.exclude)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompatibilityError, match="quantized with 'gptq'"):
        load(tmp_path / "copy")
