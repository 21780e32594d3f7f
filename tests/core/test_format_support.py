"""Which runtime loads which format: the table against the recipe and the converter, and refusals with the nearest."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from format_table import caches, weights

from trtbuild.compat import facts
from trtbuild.convert.formats import FORMATS as CONVERTED
from trtbuild.convert.formats import KV_CACHES
from trtbuild.format_support import nearest, refused, refused_embedded, refused_experts
from trtbuild.gates import default_max_perplexity_ratio
from trtbuild.recipe_fields import Format, KvCacheFormat
from trtbuild.releases import Line, lines
from trtbuild.runtime.numerics import NUMERICS
from trtbuild.support import QUANT_ALGO
from trtbuild.weight_formats import KV_CACHE_BITS, WEIGHT_FORMATS

PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
NAMES = set(get_args(Format)) - {"none"}
CACHES = set(get_args(KvCacheFormat)) - {"none"}
# Names that ModelOpt and TensorRT-LLM do not share.
MODELOPT = {"FP8_BLOCK_SCALES": "FP8_PB_WO"}


def line(name: str) -> Line:
    return next(known for known in lines() if known.name == name)


def test_every_table_has_every_format() -> None:
    table = facts("formats")
    assert NAMES == set(table["weights"]) == set(WEIGHT_FORMATS) == set(QUANT_ALGO) - {"none"}
    assert CACHES == set(table["kv_cache"]) == set(KV_CACHE_BITS)
    assert {name: row["algo"] for name, row in table["weights"].items()} == {name: QUANT_ALGO[name] for name in NAMES}
    assert {MODELOPT.get(row["algo"], row["algo"]) for row in table["weights"].values()} == set(NUMERICS)
    assert all(default_max_perplexity_ratio(name, cache) > 1 for name in NAMES for cache in CACHES | {"none"})


def test_the_table_says_what_the_conversion_takes() -> None:
    table = facts("formats")
    assert {row["algo"] for row in table["weights"].values() if row["engine"]} == set(CONVERTED)
    assert {row["algo"] for row in table["kv_cache"].values() if row["engine"]} == set(KV_CACHES) - {None}


def test_experts_that_the_conversion_refuses_are_refused_at_once() -> None:
    refused_there = {algo for algo, row in CONVERTED.items() if row.no_experts}
    assert {QUANT_ALGO[name] for name in NAMES if refused_experts(name, "engine")} == refused_there
    assert refused_experts("fp8_block", "llm-api")
    assert refused_experts("fp8", "llm-api") is None


def test_rows_are_complete_and_name_lines_and_formats_that_exist() -> None:
    known = {known.name for known in lines()}
    parts: dict[str, set[str]] = {"weights": NAMES, "kv_cache": CACHES}
    for part, names in parts.items():
        for name, row in facts("formats")[part].items():
            assert set(row["llm_api"]) <= known
            assert set(row["nearest"]) <= names - {name}
            assert row["nearest"]
            # What is not loaded everywhere says why.
            assert "why" in row or (row["engine"] and row["llm_api"])


@pytest.mark.parametrize(
    ("part", "name", "flow", "version", "sm", "use"),
    [
        ("weights", "nvfp4", "llm-api", "1.2", 90, "fp8"),
        ("weights", "nvfp4", "engine", "1.2", 90, "fp8"),
        ("weights", "nvfp4", "llm-api", "1.2", 80, "int4_awq"),
        ("weights", "fp8", "engine", "1.2", 80, "int8_sq"),
        ("weights", "fp8", "llm-api", "1.2", 80, "int8_weight_only"),
        ("weights", "int8_sq", "llm-api", "1.2", 90, "fp8"),
        ("weights", "int4_awq", "llm-api", "1.4", 100, "nvfp4"),
        ("weights", "fp8_block", "engine", "1.2", 90, "fp8"),
        ("weights", "mxfp4", "llm-api", "1.4", 100, "nvfp4"),
        ("weights", "mxfp8", "llm-api", "1.2", 100, "fp8_block"),
        ("weights", "w4a8_awq", "llm-api", "1.2", 80, "int4_awq"),
        ("weights", "fp8", "llm-api", "1.2", 70, None),
        ("weights", "int4_awq", "engine", "1.2", 100, "nvfp4"),
        ("weights", "int8_sq", "engine", "1.2", 100, "fp8"),
        ("kv_cache", "int8", "engine", "1.2", 103, "fp8"),
        ("kv_cache", "int8", "llm-api", "1.2", 90, "fp8"),
        ("kv_cache", "nvfp4", "engine", "1.2", 100, "fp8"),
        ("kv_cache", "nvfp4", "llm-api", "1.2", 90, "fp8"),
        ("kv_cache", "nvfp4", "llm-api", "1.1", 100, "fp8"),
    ],
)
def test_refused_with_the_nearest(part: Any, name: str, flow: Any, version: str, sm: int, use: str | None) -> None:
    assert refused(part, name, flow, line(version), sm)
    assert nearest(part, name, flow, line(version), sm) == use
    assert use is None or refused(part, use, flow, line(version), sm) is None


@pytest.mark.parametrize(
    ("part", "name", "flow", "version", "sm"),
    [
        ("weights", "nvfp4", "llm-api", "1.2", 100),
        ("weights", "int8_sq", "engine", "1.2", 90),
        ("weights", "w4a8_awq", "engine", "1.2", 89),
        ("weights", "int8_weight_only", "llm-api", "1.2", 90),
        ("weights", "mxfp8", "llm-api", "1.4", 100),
        ("kv_cache", "nvfp4", "llm-api", "1.2", 100),
        ("kv_cache", "int8", "engine", "1.2", 80),
        ("kv_cache", "none", "llm-api", "1.2", 80),
    ],
)
def test_not_refused(part: Any, name: str, flow: Any, version: str, sm: int) -> None:
    assert refused(part, name, flow, line(version), sm) is None


def test_the_embedded_engine_leaves_int8_caches_to_tensorrt() -> None:
    assert "TensorRT engines" in (refused_embedded("int8") or "")
    assert [refused_embedded(name) for name in ("none", "fp8", "nvfp4")] == [None, None, None]


def test_the_page_has_the_tables() -> None:
    assert weights() in PAGE
    assert caches() in PAGE
