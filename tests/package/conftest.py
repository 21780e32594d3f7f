"""Builds share one store, so that each step runs once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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
