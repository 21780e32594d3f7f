"""Every exported tensor against the format computed independently from the source, architecture by architecture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compress_requests import ARCHITECTURES, CALIBRATION
from format_reference import Stored, is_quantized, read_checkpoint, round_e4m3, unpack_int4
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from trtbuild.compress.textdata import CalibrationSpec, load_samples

COMBINATIONS = [
    {"format": "fp8"},
    {"format": "fp8", "kv_cache": "fp8", "sparsity": "2:4", "sparsity_method": "magnitude"},
    {"format": "int4_awq", "group_size": 32},
    {"format": "int4_awq", "group_size": 16, "kv_cache": "fp8", "sparsity": "2:4", "sparsity_method": "magnitude"},
    {"kv_cache": "fp8"},
    {"sparsity": "2:4"},
    {"sparsity": "2:4", "sparsity_method": "magnitude", "kv_cache": "fp8"},
    {},
]
PROJECTIONS = {"llama-tied": 21, "qwen3": 21, "gemma2": 21, "phi3": 12, "phi": 18, "mixtral": 48, "qwen3_moe": 48}


def names_of(changes: dict[str, Any]) -> str:
    return "+".join(f"{value}" for key, value in changes.items()) or "bf16"


def layers_of(tensors: dict[str, Stored]) -> list[str]:
    return [name.removesuffix(".weight") for name, stored in tensors.items() if stored.dtype in {"F8_E4M3", "U8"}]


def projections_of(source: dict[str, Stored]) -> list[str]:
    """What must be compressed: matrices that are neither embedding, output layer nor router."""
    matrices = [name.removesuffix(".weight") for name, stored in source.items() if stored.bits.ndim == 2]
    return [name for name in matrices if not name.endswith(("embed_tokens", "lm_head", ".gate"))]


@pytest.mark.parametrize("changes", COMBINATIONS, ids=names_of)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor(name: str, changes: dict[str, Any], sources: Any, compress: Any) -> None:
    directory, result = compress(name, **changes)
    source, output = read_checkpoint(sources(name)), read_checkpoint(directory)
    projections = projections_of(source)
    assert len(projections) == PROJECTIONS[name]
    wanted = set() if changes.get("format", "none") == "none" else set(projections)
    assert set(layers_of(output)) == wanted
    assert result["quantized_projections"] == len(wanted)
    assert result["tensors"] == len(output)
    assert result["bytes"] == sum(stored.bits.nbytes for stored in output.values())
    assert set(source) <= set(output)
    sparse = "sparsity" in changes
    for layer in projections:
        match changes.get("format"):
            case "fp8":
                check_fp8(layer, source, output, sparse=sparse)
            case "int4_awq":
                check_int4(layer, source, output, changes["group_size"], sparse=sparse)
            case _:
                moved = sparse and "sparsity_method" not in changes
                check_bf16(layer, source, output, sparse=sparse, moved=moved)
    check_untouched(source, output, projections, folded=changes.get("format") == "int4_awq")
    if sparse:
        groups = sum(source[f"{layer}.weight"].bits.size // 4 for layer in projections)
        assert result["sparsity"] == {"groups": groups, "conforming": groups, "share": 1.0}
    else:
        assert result["sparsity"] is None


def check_pattern(values: np.ndarray) -> None:
    assert ((values.reshape(-1, 4) != 0).sum(axis=1) <= 2).all()


def check_fp8(layer: str, source: dict[str, Stored], output: dict[str, Stored], *, sparse: bool) -> None:
    original, codes = source[f"{layer}.weight"].values, output[f"{layer}.weight"].values
    scale = output[f"{layer}.weight_scale"]
    assert (scale.dtype, scale.bits.shape) == ("F32", ())
    assert output[f"{layer}.input_scale"].dtype == "F32"
    assert output[f"{layer}.input_scale"].bits.shape == ()
    if sparse:
        check_pattern(codes)
        kept = np.where(codes != 0, original, 0)
        assert 0.4 < (codes != 0).mean() <= 0.5
    else:
        kept = original
    largest = np.abs(kept).max()
    for gate, up in (("gate_proj", "up_proj"), ("w1", "w3")):  # of one expert share the larger scale
        if ".experts." in layer and layer.endswith((gate, up)):
            other = layer.removesuffix(gate) + up if layer.endswith(gate) else layer.removesuffix(up) + gate
            values = source[f"{other}.weight"].values
            if sparse:
                values = np.where(output[f"{other}.weight"].values != 0, values, 0)
            largest = max(largest, np.abs(values).max())
    assert scale.bits == np.float32(largest / 448)
    # One rounding, from the source's bf16 to E4M3, of the quotient in float32.
    quotient = kept.astype(np.float32) / scale.bits
    assert np.array_equal(codes, round_e4m3(quotient))


def smoothing(layer: str, source: dict[str, Stored], output: dict[str, Stored]) -> np.ndarray:
    """What the input of `layer` is multiplied with: explicitly, or by the norm before it that has taken it up."""
    if f"{layer}.pre_quant_scale" in output:
        return output[f"{layer}.pre_quant_scale"].values
    block, _, rest = layer.partition(".self_attn." if ".self_attn." in layer else ".mlp.")
    attention = ".self_attn." in layer
    norms = ("input_layernorm",) if attention else ("pre_feedforward_layernorm", "post_attention_layernorm")
    norm = next((n for n in norms if f"{block}.{n}.weight" in source), "input_layernorm")
    before, after = source[f"{block}.{norm}.weight"].values, output[f"{block}.{norm}.weight"].values
    gemma = "pre_feedforward_layernorm" in "".join(source)  # its norms multiply with 1 + weight
    assert rest
    return (1 + after) / (1 + before) if gemma else after / before


def check_int4(layer: str, source: dict[str, Stored], output: dict[str, Stored], group: int, *, sparse: bool) -> None:
    original, packed = source[f"{layer}.weight"].values, output[f"{layer}.weight"].bits
    scale = output[f"{layer}.weight_scale"]
    out, into = original.shape
    assert packed.shape == (out // 2, into)
    assert (scale.dtype, scale.bits.shape) == ("F32", (out, into // group))
    codes = unpack_int4(packed)
    smooth = smoothing(layer, source, output)
    steps = np.repeat(scale.values, group, axis=1)
    if sparse:
        check_pattern(codes)
        # Magnitude leaves the two largest of four; of equal ones it may leave either.
        fours = np.abs(original).reshape(-1, 4)
        third = np.repeat(np.sort(fours, axis=1)[:, 1], 4).reshape(original.shape)
        assert (np.abs(original[codes != 0]) >= third[codes != 0]).all()
        original = np.where((codes == 0) & (np.abs(original) <= third), 0, original)
    smoothed = original / smooth
    # The scale is the largest smoothed weight of the group over 7; the smoothing itself was rounded to bf16.
    largest = np.abs(smoothed).reshape(out, -1, group).max(axis=2)
    assert np.abs(scale.values * 7 / largest - 1).max() < 0.02
    assert np.abs(codes).max() <= 8
    error = np.abs(codes * steps - smoothed)
    assert (error <= 0.5 * steps + 0.02 * np.abs(smoothed)).mean() == 1.0


def check_bf16(layer: str, source: dict[str, Stored], output: dict[str, Stored], *, sparse: bool, moved: bool) -> None:
    stored, original = output[f"{layer}.weight"], source[f"{layer}.weight"]
    assert stored.dtype == "BF16"
    if sparse:
        check_pattern(stored.values)
        kept = np.where(stored.values != 0, original.values, 0)
        assert np.array_equal(stored.values, kept) != moved
        assert np.abs(stored.values - kept).max() < 3 * np.abs(original.values).max()
        assert (stored.values != 0).mean() > 0.49
    else:
        assert np.array_equal(stored.bits, original.bits)


def check_untouched(
    source: dict[str, Stored], output: dict[str, Stored], projections: list[str], *, folded: bool
) -> None:
    changed = {f"{layer}.weight" for layer in projections}
    for name in source.keys() - changed:
        assert output[name].dtype == "BF16"
        if not (folded and "norm" in name):
            assert np.array_equal(output[name].bits, source[name].bits), name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_input_and_kv_scales_are_the_largest_value_over_448(name: str, sources: Any, compress: Any) -> None:
    directory, _ = compress(name, format="fp8", kv_cache="fp8")
    output = read_checkpoint(directory)
    model = AutoModelForCausalLM.from_pretrained(sources(name), dtype=torch.float32).eval()
    largest: dict[str, float] = {}
    for layer, module in model.named_modules():
        if (isinstance(module, nn.Linear) and layer != "lm_head") or layer.endswith("mlp.experts"):
            module.register_forward_pre_hook(watch(layer, largest))
    keys: dict[str, float] = {}
    spec = CalibrationSpec(**CALIBRATION)  # type: ignore[arg-type]
    for sample in load_samples(spec, sources(name)).input_ids:
        with torch.no_grad():
            cache = DynamicCache()  # without a config it keeps what a sliding window would drop
            model(input_ids=torch.tensor([sample]), past_key_values=cache)
        for index, layer in enumerate(cache.layers):
            for leaf, states in (("k_proj.k_scale", layer.keys), ("v_proj.v_scale", layer.values)):
                scale = f"model.layers.{index}.self_attn.{leaf}"
                keys[scale] = max(keys.get(scale, 0.0), float(states.abs().max()))
    for layer, value in largest.items():
        for exported in exported_inputs(layer, name, output):
            assert output[f"{exported}.input_scale"].bits == pytest.approx(value / 448, rel=1e-5)
    assert keys
    for scale, value in keys.items():
        assert output[scale].bits == pytest.approx(value / 448, rel=1e-5)
        assert (output[scale].dtype, output[scale].bits.shape) == ("F32", ())


def watch(layer: str, largest: dict[str, float]) -> Any:
    def hook(module: nn.Module, args: Any) -> None:
        largest[layer] = max(largest.get(layer, 0.0), float(args[0].abs().max()))

    return hook


def exported_inputs(layer: str, name: str, output: dict[str, Stored]) -> Iterator[str]:
    """The exported layers that take the input of `layer`: all experts share the largest input of their block."""
    if not layer.endswith("mlp.experts"):
        yield layer
        return
    prefix = layer.replace(".mlp.", ".block_sparse_moe.") if name == "mixtral" else layer
    for stored in output:
        if stored.startswith(f"{prefix}.") and stored.endswith(
            ("gate_proj.weight", "up_proj.weight", "w1.weight", "w3.weight")
        ):
            yield stored.removesuffix(".weight")


@pytest.mark.parametrize("changes", COMBINATIONS, ids=names_of)
def test_configs_of_the_checkpoint(changes: dict[str, Any], sources: Any, compress: Any) -> None:
    directory, _ = compress("mixtral", **changes)
    source = sources("mixtral")
    config, original = read(directory / "config.json"), read(source / "config.json")
    flat = config.pop("quantization_config", None)
    older = {"rope_theta": original["rope_parameters"]["rope_theta"]}  # for readers through Transformers 4
    assert config == original | older | {"dtype": "bfloat16"}
    tokenizer = read(source / "tokenizer_config.json") | {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert read(directory / "tokenizer_config.json") == tokenizer
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (directory / name).read_bytes() == (source / name).read_bytes()
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in directory.iterdir())
    wanted = changes.get("format", "none")
    if wanted == "none" and changes.get("kv_cache") != "fp8":
        assert flat is None
        assert not (directory / "hf_quant_config.json").exists()
        return
    section = read(directory / "hf_quant_config.json")["quantization"]
    assert section["quant_algo"] == {"fp8": "FP8", "int4_awq": "W4A16_AWQ", "none": None}[wanted]
    assert section["kv_cache_quant_algo"] == ("FP8" if changes.get("kv_cache") == "fp8" else None)
    routers = [f"model.layers.{index}.block_sparse_moe.gate" for index in range(3)]
    if wanted != "none":
        assert section["exclude_modules"] == ["lm_head", "model.embed_tokens", *routers]
    if wanted == "int4_awq":
        assert section["group_size"] == changes["group_size"]
        assert (section["has_zero_point"], section["pre_quant_scale"]) == (False, True)
    assert flat["quant_method"] == "modelopt"
    assert flat.get("quant_algo") == section["quant_algo"]
    assert flat["ignore"] == section["exclude_modules"]
    assert ("kv_cache_scheme" in flat) == (changes.get("kv_cache") == "fp8")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_excluded_modules_stay_in_bf16(sources: Any, compress: Any) -> None:
    directory, result = compress("llama-tied", format="fp8", exclude=["*.layers.0.*", "*.2.mlp.down_proj"])
    source, output = read_checkpoint(sources("llama-tied")), read_checkpoint(directory)
    excluded = [name for name in projections_of(source) if ".layers.0." in name or name.endswith("2.mlp.down_proj")]
    assert len(excluded) == 8
    for layer in projections_of(source):
        assert is_quantized(output, layer) == (layer not in excluded)
    assert set(excluded) <= set(result["excluded_modules"])
    section = read(directory / "hf_quant_config.json")["quantization"]
    assert set(excluded) <= set(section["exclude_modules"])


def test_an_excluded_layer_is_not_pruned_and_keeps_its_kv_scales(sources: Any, compress: Any) -> None:
    pruned = {"sparsity": "2:4", "sparsity_method": "magnitude"}
    changes = pruned | {"format": "fp8", "kv_cache": "fp8", "exclude": ["model.layers.1.*"]}
    directory, result = compress("qwen3", **changes)
    source, output = read_checkpoint(sources("qwen3")), read_checkpoint(directory)
    for layer in projections_of(source):
        if ".layers.1." in layer:
            assert np.array_equal(output[f"{layer}.weight"].bits, source[f"{layer}.weight"].bits)
        else:
            check_fp8(layer, source, output, sparse=True)
    assert "model.layers.1.self_attn.k_proj.k_scale" in output
    assert result["sparsity"]["share"] == 1.0
