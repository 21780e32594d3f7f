"""Builds share one store, so that each step runs once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine_host import EngineHost

ROOT = Path(__file__).parents[2]
Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of all builds in this folder."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, store: Path) -> Path:
    """A recipe for a tiny checkpoint in bf16, which needs no calibration."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(
        f"schema_version: 1\nmodel: {{path: {tiny_llama}}}\n"
        "runtime: {kind: embedded, max_batch_size: 4, max_seq_len: 256}\n"
        f"serving: {{model_name: tiny}}\nstore: {store}\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Run ``trtbuild`` as a user does and return what it printed."""

    def run(*arguments: object, check: int | None = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "trtbuild", *map(str, arguments)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            env=os.environ | {"PYTHONPATH": str(ROOT / "builder")} | environment,
        )
        if check is not None:
            assert done.returncode == check, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory, recipe: Path, cli: Cli) -> Path:
    """The package of `recipe`, built once."""
    out = tmp_path_factory.mktemp("out") / "package"
    done = cli("build", recipe, "-o", out)
    assert done.stdout.strip() == str(out)
    return out


@pytest.fixture(scope="session")
def engine_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, store: Path) -> Path:
    """A TensorRT engine: FP8 weights and KV cache on two H100."""
    path = tmp_path_factory.mktemp("engine") / "engine.yaml"
    path.write_text(
        f"schema_version: 1\nmodel: {{path: {tiny_llama}}}\n"
        "compress: {format: fp8, kv_cache: fp8, calibration: {count: 2, length: 32}}\n"
        "target: {gpu: H100}\n"
        "runtime: {kind: trtllm-engine, tensor_parallel_size: 2, max_batch_size: 4, max_seq_len: 256}\n"
        f"serving: {{max_input_tokens: 200, max_output_tokens: 56}}\nstore: {store}\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> EngineHost:
    """A host without GPU and container tools, whatever the tests run on."""
    return EngineHost(tmp_path_factory.mktemp("laptop") / "host")


@pytest.fixture(scope="session")
def engine_package(
    tmp_path_factory: pytest.TempPathFactory, engine_recipe: Path, cli: Cli, laptop: EngineHost
) -> tuple[Path, str]:
    """The package of `engine_recipe` from a host that cannot build the engine, and what the build said."""
    out = tmp_path_factory.mktemp("engine-out") / "package"
    done = cli("build", engine_recipe, "-o", out, **laptop.environment())
    assert done.stdout.strip() == str(out)
    return out, done.stderr
