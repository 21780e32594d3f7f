"""The number formats and the layers of every format, against descriptions of their own in numpy and float64."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trtbuild.errors import ArtifactError, CompatibilityError
from trtbuild.runtime.checkpoint_files import TensorSource, read_quantization
from trtbuild.runtime.checkpoint_fill import replace_linear
from trtbuild.runtime.codes import (
    pack_e2m1,
    power_of_two,
    round_e2m1,
    round_mx,
    round_nvfp4,
    to_int8,
    unpack_e2m1,
)
from trtbuild.runtime.kv_cache import LayerCache
from trtbuild.runtime.linear import CodedLinear, Form
from trtbuild.runtime.numerics import NUMERICS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compress"))
import format_reference as reference

OUT, INTO = 256, 128
E4M3 = torch.float8_e4m3fn


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def codes(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 0.01 + 0.001


def stored(algorithm: str) -> dict[str, torch.Tensor]:
    """Tensors as a file of this format has them, with random codes."""
    e4m3 = (random(OUT, INTO) * 60).clamp(-448, 448).to(E4M3)
    one = torch.tensor(0.003)
    int4 = {"weight": codes(OUT // 2, INTO), "weight_scale": scales(OUT, INTO // 32)}
    fp4 = {"weight": codes(OUT, INTO // 2), "weight_scale": (scales(OUT, INTO // 16) * 4000).to(E4M3)}
    bytes_of_two = codes(OUT, INTO // 32) % 12 + 115
    rows = {
        "FP8_PER_CHANNEL_PER_TOKEN": {"weight": e4m3, "weight_scale": scales(OUT)},
        "FP8_PB_WO": {"weight": e4m3, "weight_scale": scales(OUT // 128, 1, INTO // 128, 1)},
        "W8A8_SQ_PER_CHANNEL": {
            "weight": codes(OUT, INTO).view(torch.int8), "weight_scale": scales(OUT), "input_scale": torch.tensor(0.02),
            "pre_quant_scale": scales(INTO) * 100,
        },
        "W8A16": {"weight": codes(OUT, INTO).view(torch.int8), "weight_scale": scales(OUT)},
        "W4A16_AWQ": int4 | {"pre_quant_scale": scales(INTO) * 100},
        "W4A8_AWQ": int4 | {"weight_scale_2": torch.tensor(0.0002), "input_scale": torch.tensor(0.007)},
        "NVFP4": fp4 | {"weight_scale_2": one, "input_scale": torch.tensor(0.0011)},
        "NVFP4_AWQ": fp4 | {
            "weight_scale_2": one, "input_scale": torch.tensor(0.0011), "pre_quant_scale": scales(INTO) * 100,
        },
        "W4A16_NVFP4": fp4 | {"weight_scale_2": one},
        "MXFP4": {"weight": codes(OUT, INTO // 2), "weight_scale": bytes_of_two},
        "MXFP8": {"weight": e4m3, "weight_scale": bytes_of_two},
    }  # fmt: skip
    return rows[algorithm]


def as_read(tensors: dict[str, torch.Tensor]) -> dict[str, reference.Stored]:
    """The same as the reference reads it."""
    types = {torch.float32: "F32", torch.uint8: "U8", torch.int8: "I8", E4M3: "F8_E4M3"}
    return {
        f"layer.{name}": reference.Stored(
            types[value.dtype], (value.view(torch.uint8) if value.dtype == E4M3 else value).numpy()
        )
        for name, value in tensors.items()
    }


@pytest.mark.parametrize("form", ["expanded", "packed"])
@pytest.mark.parametrize("algorithm", sorted(set(NUMERICS) - {"FP8"}))
def test_layers_compute_as_the_description_says(algorithm: str, form: Form) -> None:
    tensors, x, bias = stored(algorithm), random(7, INTO, seed=4), random(OUT, seed=5)
    x[0], x[1] = 0.0, x[1] * 50  # nothing, and more than the scales were made for
    read = as_read(tensors)
    wanted = reference.input_of(read, "layer", x.numpy(), algorithm) @ reference.weight_of(read, "layer", algorithm).T
    wanted = wanted + bias.numpy()

    def layer(dtype: torch.dtype) -> CodedLinear:
        return CodedLinear(numerics=NUMERICS[algorithm], stored=tensors, bias=bias.to(dtype), dtype=dtype, form=form)

    exact = layer(torch.float64)
    assert (exact.in_features, exact.out_features) == (INTO, OUT)
    assert np.abs(exact(x).numpy() - wanted).max() < 1e-10 * np.abs(wanted).max()
    # bfloat16 rounds results and smoothed inputs; no format's codes or scales are lost in it.
    narrow = layer(torch.bfloat16)(x.to(torch.bfloat16))
    assert narrow.dtype == torch.bfloat16
    assert np.abs(narrow.double().numpy() - wanted).mean() < 0.02 * np.abs(wanted).mean()
    # The format shows: the layer is not one of the plain numbers.
    inputs_alone = torch.from_numpy(reference.weight_of(read, "layer", algorithm))
    if NUMERICS[algorithm].input is not None or NUMERICS[algorithm].smoothed:
        assert (exact(x) - (x @ inputs_alone.T + bias)).abs().max() > 1e-3 * np.abs(wanted).max()


def test_e2m1_rounds_ties_to_even_and_saturates() -> None:
    values = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.01, 6.5, 1e9, 0.2, 0.26])
    wanted = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, 6.0, 0.0, 0.5]
    assert round_e2m1(values).tolist() == wanted
    assert round_e2m1(-values).tolist() == [-value for value in wanted]
    many = random(20_000) * 3
    assert np.array_equal(round_e2m1(many).numpy(), reference.round_e2m1(np.clip(many.numpy(), -6, 6)))


def test_e2m1_codes_go_both_ways() -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    values = unpack_e2m1(packed, torch.float32)
    assert values[:4].tolist() == [0.0, 0.0, 0.5, 0.0]  # bytes 0 and 1: the low nibble comes first
    assert values[0x2F * 2 :][:2].tolist() == [-6.0, 1.0]
    assert torch.equal(pack_e2m1(values), packed)


def test_powers_of_two_are_exact() -> None:
    exponents = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(power_of_two(exponents, torch.float64), 2.0 ** (exponents.double() - 127))


def test_integers_round_to_even_and_saturate() -> None:
    assert to_int8(torch.tensor([0.5, 1.5, -2.5, 200.0, -300.0]), torch.tensor(1.0)).tolist() == [0, 2, -2, 127, -128]


def test_blocks_against_the_description() -> None:
    x = random(50, 128) * torch.logspace(-4, 3, 50, dtype=torch.float64)[:, None]
    x[3] = 0
    # Blocks whose largest value asks for exactly a power of two, and smaller ones that show which one was taken.
    powers = 2.0 ** torch.arange(-25, 25).double()[:, None]
    x[:, 32:96] = random(50, 64, seed=8).clamp(-5, 5) * powers
    x[:, 32], x[:, 64] = 448 * powers[:, 0], 6 * powers[:, 0]
    for largest in (448.0, 6.0):
        assert np.array_equal(round_mx(x, largest).numpy(), reference.round_mx(x.numpy(), largest))
    for scale in (1e-5, 0.003, 10.0):
        made = round_nvfp4(x, torch.tensor(scale, dtype=torch.float64)).numpy() * scale
        assert np.allclose(made, reference.round_nvfp4(x.numpy(), scale), rtol=1e-12, atol=0)


def cache(form: str, heads: int, slots: int, size: int, pair: tuple[float, float]) -> LayerCache:
    shape = (heads, slots, size)
    return LayerCache(shape, shape, dtype=torch.float64, device=torch.device("cpu"), form=form, scales=pair)


@pytest.mark.parametrize("form", ["nvfp4", "int8"])
def test_caches_hold_what_the_description_says(form: str) -> None:
    keys, values = random(2, 5, 32), random(2, 5, 32, seed=9) * 3
    pair = (float(keys.abs().max()) / (448 if form == "nvfp4" else 127), 0.011)
    pools = cache(form, 2, 16, 32, pair)
    slots = torch.tensor([9, 3, 4, 15, 0])
    pools.write(keys, values, slots)
    # A byte a number, or half a byte and a byte for each block of 16.
    assert pools.keys.shape == (2, 16, 32 if form == "int8" else 18)
    for found, given, scale in zip(pools.read(slots), (keys, values), pair, strict=True):
        exact = float(torch.tensor(scale))  # scales are float32
        if form == "int8":
            wanted = np.clip(np.rint(given.numpy() / exact), -128, 127) * exact
        else:
            wanted = reference.round_nvfp4(given.numpy(), exact)
        assert np.allclose(found.numpy() * exact, wanted, rtol=1e-12, atol=0)
        assert np.abs(wanted - given.numpy()).max() > 1e-3
    assert torch.equal(pools.read(slice(3, 5))[0], pools.read(torch.tensor([3, 4]))[0])


NAN_E4M3 = torch.full((OUT, INTO // 16), float("nan")).to(E4M3)
DAMAGED: list[tuple[str, str, torch.Tensor | None, str]] = [
    ("W8A16", "weight", codes(OUT // 2, INTO), r"layer: shape \[128, 128\] in the files, \[256, 128\] in the model"),
    ("W8A16", "weight_scale", scales(OUT - 1), r"layer.weight_scale: shape \[255\] does not fit \[256, 128\]"),
    ("W8A16", "weight_scale", torch.zeros(OUT), "layer.weight_scale: scales must be positive and finite"),
    ("FP8_PB_WO", "weight_scale", scales(2, 1, 2, 1), r"layer.weight_scale: shape \[2, 1, 2, 1\] does not fit"),
    ("W4A16_AWQ", "weight_scale", scales(OUT, 3), r"layer.weight_scale: shape \[256, 3\] does not fit"),
    ("W4A16_AWQ", "pre_quant_scale", scales(INTO - 1), r"layer.pre_quant_scale: shape \[127\], not \[128\]"),
    ("NVFP4", "weight_scale", NAN_E4M3[:, ::2], r"layer.weight_scale: shape \[256, 4\] does not fit"),
    ("NVFP4", "weight_scale", NAN_E4M3, "layer.weight_scale: scales must be positive and finite"),
    ("NVFP4", "weight_scale_2", torch.zeros(()), "layer.weight_scale_2"),
    ("NVFP4", "input_scale", torch.tensor(float("inf")), "layer.input_scale"),
    ("NVFP4", "input_scale", None, "layer.input_scale"),
    ("MXFP8", "weight_scale", torch.full((OUT, INTO // 32), 255, dtype=torch.uint8), "scales must be finite"),
]


class InMemory:
    """Tensors in the place of files."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensor = tensors.__getitem__


def put(algorithm: str, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A model whose one layer is coded by these tensors."""
    model = torch.nn.Module()
    model.layer = torch.nn.Linear(INTO, OUT, bias=False)
    places = {f"layer.{name}": name for name in tensors}
    source = TensorSource(InMemory(tensors), places)  # type: ignore[arg-type]
    cpu = torch.device("cpu")
    replace_linear(model, "layer", algorithm, source, dtype=torch.float32, form="packed", device=cpu)
    return model


@pytest.mark.parametrize(("algorithm", "name", "wrong", "sentence"), DAMAGED)
def test_a_damaged_layer_is_named(algorithm: str, name: str, wrong: torch.Tensor | None, sentence: str) -> None:
    whole = stored(algorithm)
    assert isinstance(put(algorithm, whole).layer, CodedLinear)
    damaged = {key: value for key, value in whole.items() if key != name} | ({} if wrong is None else {name: wrong})
    with pytest.raises(ArtifactError, match=sentence):
        put(algorithm, damaged)


@pytest.mark.parametrize("layers", [None, [], {}, {"layer": "FP8"}])
def test_a_mixed_checkpoint_says_the_format_of_its_layers(tmp_path: Path, layers: Any) -> None:
    section = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": section}))
    with pytest.raises(ArtifactError, match="quantized_layers names no layer and its format"):
        read_quantization(tmp_path)


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ({}, "compressed-tensors without config_groups"),
        ({"a": {"weights": {"type": "int", "num_bits": 4, "strategy": "group"}}}, "is not computed here"),
        ({"a": {"weights": {"type": "int", "num_bits": 8, "strategy": "channel"}}}, "is not computed here"),
    ],
)
def test_compressed_tensors_of_other_schemes_are_refused(tmp_path: Path, groups: dict[str, Any], sentence: str) -> None:
    section = {"quant_method": "compressed-tensors", "config_groups": groups}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
    with pytest.raises(CompatibilityError, match=sentence):
        read_quantization(tmp_path)
