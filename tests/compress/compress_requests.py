"""Requests of the compress step for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CALIBRATION = {"data": None, "column": None, "count": 4, "length": 32, "seed": 1}
ARCHITECTURES = ("llama-tied", "qwen3", "gemma2", "phi3", "phi", "mixtral", "qwen3_moe")


def make_request(source: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A complete request: nothing is compressed unless `changes` say so."""
    request: dict[str, Any] = {
        "source": str(source), "tokenizer": str(source), "output": str(output), "format": "none", "group_size": None,
        "sparsity": "none", "sparsity_method": "sparsegpt", "kv_cache": "none", "exclude": [],
        "calibration": dict(CALIBRATION), "trust_remote_code": False, "device": "cpu",
    }  # fmt: skip
    return request | changes


def silent(done: int, total: int, what: str) -> None:
    assert 0 <= done <= total
    assert what
