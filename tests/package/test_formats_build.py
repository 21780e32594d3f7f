"""Formats beyond FP8 and INT4-AWQ from recipe to package, measured and verified, for each runtime that loads them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., subprocess.CompletedProcess[str]]
_GPU = {"target": {"gpu": "A100"}}
# Attention over a paged context does not work with an INT8 cache.
_INT8 = {"kv_cache": {"enable_block_reuse": False}, "enable_chunked_prefill": False}
# (format, KV cache, runtime, more of the recipe, what the evidence says of the numerics)
BUILDS: list[tuple[str, str, dict[str, Any], dict[str, Any], str]] = [
    ("mxfp4", "nvfp4", {"kind": "embedded"}, {}, "nvfp4 KV cache"),
    ("int8_sq", "int8", {"kind": "trtllm-engine"} | _INT8, _GPU, "int8 KV cache; keys and values with the larger"),
    ("int8_weight_only", "none", {"kind": "trtllm"}, _GPU, "float32 KV cache"),
]


@pytest.mark.parametrize(("name", "cache", "runtime", "more", "how"), BUILDS, ids=[build[0] for build in BUILDS])
def test_a_build(
    name: str, cache: str, runtime: Any, more: Any, how: str, tiny_llama: Path, store: Path, cli: Cli, tmp_path: Path
) -> None:
    recipe, package = tmp_path / "recipe.yaml", tmp_path / "package"
    document = {
        "schema_version": 1,
        "model": {"path": str(tiny_llama)},
        "compress": {"format": name, "kv_cache": cache, "calibration": {"count": 2, "length": 32}},
        "runtime": {"max_batch_size": 2, "max_seq_len": 256} | runtime,
        "quality": {"max_perplexity_ratio": 3},
        "store": str(store),
    }
    recipe.write_text(json.dumps(document | more), encoding="utf-8")
    cli("build", recipe, "-o", package)
    quality = json.loads((package / "evidence" / "quality.json").read_text())
    assert how in quality["how"]
    assert quality["perplexity"]["ratio"] != 1.0
    assert all(check["passed"] for check in json.loads(cli("verify", package, "--json").stdout) if check["ran"])
    cli("inspect", package)


def test_refused_with_the_nearest(tiny_llama: Path, cli: Cli, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"schema_version: 1\nmodel: {{path: {tiny_llama}}}\ncompress: {{format: nvfp4, kv_cache: int8}}\n"
        "runtime: {kind: trtllm}\ntarget: {gpu: H100}\n",
        encoding="utf-8",
    )
    said = cli("plan", recipe, check=3).stderr
    assert "compress.format: nvfp4 does not run on H100 (SM90)" in said
    assert "; use fp8" in said
    assert "compress.kv_cache: int8: only TensorRT engines have a KV cache in INT8; use fp8" in said
