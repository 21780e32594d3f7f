"""The memory that the compress step is planned with, and the recipe's bound on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from trtbuild.compress_memory import STRAIGHT_FORMATS, Demand, parse_bytes, show_bytes
from trtbuild.errors import RecipeError
from trtbuild.layer_size import LayerSize, largest_layer
from trtbuild.pipeline import prepare
from trtbuild.plan import Plan
from trtbuild.safetensors_header import TensorInfo

LAYER = LayerSize(parameters=1_000_000, matrix=300_000, squared_inputs=5_000_000, inputs=512)


def demand(**changes: object) -> Demand:
    values = {
        "layer": LAYER, "hidden_size": 256, "format": "fp8", "kv_cache": "none", "sparsity_method": None,
        "samples": 8, "length": 512,
    } | changes  # fmt: skip
    return Demand(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 << 30), ("8 GiB", 8 << 30), ("1.5GB", 1_500_000_000), ("500MB", 500_000_000), ("123", 123),
        ("123B", 123), ("2Ki", 2048), ("1TiB", 1 << 40), ("8iB", None), ("8 GiB of RAM", None), ("-1GB", None),
        ("much", None), ("", None), ("8gib", None),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int | None) -> None:
    assert parse_bytes(text) == size


def test_a_shown_size_is_enough() -> None:
    for size in (1, (1 << 20) - 1, 1 << 20, 123_456_789):
        assert size <= (parse_bytes(show_bytes(size)) or 0) < size + (1 << 20)


def test_states_stay_in_memory_only_where_they_fit() -> None:
    small = demand()
    assert small.state_bytes == 2 * 8 * 512 * 256 * 4
    ahead = 2 * LAYER.parameters  # the next layer
    assert small.peak(None) == small.smallest + small.state_bytes + ahead
    assert small.peak(small.smallest + small.state_bytes) == small.smallest + small.state_bytes
    assert small.peak(small.smallest + small.state_bytes - 1) == small.smallest + ahead
    assert small.peak(small.smallest + ahead - 1) == small.smallest
    assert not small.reads_ahead(small.smallest + ahead - 1)
    assert demand(samples=1 << 20).peak(None) == small.smallest + ahead  # a terabyte goes to the disk unasked


def test_weights_that_are_coded_from_file_to_file_need_no_layer() -> None:
    huge = LayerSize(parameters=1 << 40, matrix=1 << 38, squared_inputs=1)
    for name in STRAIGHT_FORMATS:
        assert demand(format=name, layer=huge, samples=0, length=0).peak(None) < 700_000_000
        for changes in ({"experts": True}, {"kv_cache": "fp8"}, {"sparsity_method": "magnitude"}):
            assert demand(format=name, layer=huge, **changes).smallest > 1 << 40


def test_what_a_compression_needs_more() -> None:
    solving = 4 * (LAYER.squared_inputs + 2 * 512**2)
    assert demand(sparsity_method="sparsegpt").smallest == demand().smallest + solving + 20 * LAYER.matrix
    assert demand(format="int4_gptq").smallest == demand(format="int4_awq").smallest + solving
    assert demand(format="none", more_formats=("int4_gptq",)).smallest == demand(format="int4_gptq").smallest
    assert [demand(**changes).streams for changes in (
        {}, {"format": "none"}, {"sparsity_method": "sparsegpt"}, {"sparsity_method": "magnitude"},
        {"format": "int4_awq", "kv_cache": "fp8"}, {"format": "none", "sparsity_method": "sparsegpt"},
        {"format": "int4_gptq", "kv_cache": "fp8", "sparsity_method": "sparsegpt"},
    )] == [1, 0, 1, 1, 2, 1, 1]  # fmt: skip
    assert demand(format="none").smallest < 500_000_000


def test_the_largest_layer_counts() -> None:
    shapes = {
        "model.embed_tokens.weight": (1000, 64), "model.layers.0.mlp.up_proj.weight": (64, 32),
        "model.layers.1.mlp.gate_proj.weight": (64, 32), "model.layers.1.norm.weight": (64,),
        "model.layers.1.mlp.experts.down_proj": (4, 32, 64), "model.layers.10.mlp.up_proj.weight": (64, 32),
        "model.layers.1.mlp.up_proj.weight": (64, 32),
    }  # fmt: skip
    tensors = [TensorInfo(name, "BF16", shape, "x") for name, shape in shapes.items()]
    layer = largest_layer(tensors)
    assert layer == LayerSize(2 * 64 * 32 + 64 + 4 * 32 * 64, 64 * 32, 4 * 64**2 + 32**2, 64)  # gate shares with up
    assert largest_layer(tensors[:1]) == LayerSize(0, 0, 0)


def planned(recipe: Path, *overrides: str) -> Plan:
    return prepare(recipe, overrides).plan


def test_the_plan_says_the_peak_and_refuses_too_little(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"schema_version: 1\nmodel: {{path: {tiny_llama}}}\nruntime: {{kind: embedded}}\n")
    free = planned(recipe, "compress.format=fp8")
    peak = free.estimates["compress_peak_memory_bytes"]
    bound = planned(recipe, "compress.format=fp8", "compress.max_memory=8GiB")
    assert bound.estimates["compress_peak_memory_bytes"] == peak
    assert bound.digest == free.digest  # a bound decides where things lie, not what is made
    with pytest.raises(
        RecipeError, match=r"compress.max_memory: 100MB: one decoder layer .* takes \d+MiB; use at least"
    ):
        planned(recipe, "compress.format=fp8", "compress.max_memory=100MB")
    with pytest.raises(RecipeError, match="compress.max_memory: 'much' is no size; write it like 8GiB or 500MB"):
        planned(recipe, "compress.format=fp8", "compress.max_memory=much")
    with pytest.raises(RecipeError) as caught:
        planned(recipe, "compress.format=fp8", "compress.max_memory=100MB")
    smallest = str(caught.value).rpartition(" ")[2]
    assert planned(recipe, "compress.format=fp8", f"compress.max_memory={smallest}").digest == free.digest
