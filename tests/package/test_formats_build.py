"""Formats beyond FP8 and INT4-AWQ from recipe to package, measured and verified, for each runtime that loads them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Cli = Callable[..., subprocess.CompletedProcess[str]]
# (format, KV cache, runtime, more of the recipe, what the evidence says of the numerics)
BUILDS = [
    ("mxfp4", "nvfp4", "embedded", "", "nvfp4 KV cache"),
    ("int8_sq", "int8", "trtllm-engine", "target: {gpu: A100}\n", "int8 KV cache; keys and values with the larger"),
    ("int8_weight_only", "none", "trtllm", "target: {gpu: H100}\n", "float32 KV cache"),
]


@pytest.mark.parametrize(("name", "cache", "kind", "more", "how"), BUILDS, ids=[build[0] for build in BUILDS])
def test_a_build(
    name: str, cache: str, kind: str, more: str, how: str, tiny_llama: Path, store: Path, cli: Cli, tmp_path: Path
) -> None:
    recipe, package = tmp_path / "recipe.yaml", tmp_path / "package"
    recipe.write_text(
        f"schema_version: 1\nmodel: {{path: {tiny_llama}}}\n"
        f"compress: {{format: {name}, kv_cache: {cache}, calibration: {{count: 2, length: 32}}}}\n"
        f"runtime: {{kind: {kind}, max_batch_size: 2, max_seq_len: 256}}\n{more}"
        f"quality: {{max_perplexity_ratio: 3}}\nstore: {store}\n",
        encoding="utf-8",
    )
    cli("build", recipe, "-o", package)
    quality = json.loads((package / "evidence" / "quality.json").read_text())
    assert how in quality["how"]
    assert quality["perplexity"]["ratio"] != 1.0
    assert all(check["ok"] for check in json.loads(cli("verify", package, "--json").stdout) if check["ran"])
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
