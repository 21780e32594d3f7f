"""A tiny original model and engines made from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny import save_checkpoint

ENGINE = {
    "schema_version": 1,
    "runtime": "embedded",
    "max_batch_size": 2,
    "max_num_tokens": 64,
    "max_seq_len": 96,
    "kv_cache": {"dtype": "auto", "tokens_per_block": 16, "max_tokens": 128},
    "device": "cpu",
}


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of three layers in bf16."""
    return save_checkpoint(tmp_path_factory.mktemp("evaluate") / "source")


@pytest.fixture
def make_engine(source: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copy the original, change its weights, and write an engine.json beside them."""

    def maker(change: Callable[[dict[str, Any]], None] | None = None) -> Path:
        from safetensors.torch import load_file, save_file

        path = tmp_path / "engine"
        shutil.copytree(source, path)
        if change is not None:
            tensors = load_file(path / "model.safetensors")
            change(tensors)
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "engine.json").write_text(json.dumps(ENGINE), encoding="utf-8")
        return path

    return maker
