"""Tiny checkpoints and their compressions, each made once for all tests of this directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compress_requests import make_request, silent

from tiny import save_checkpoint
from trtbuild.compress.run import run

Sources = Callable[[str], Path]
Compress = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """The tiny checkpoint of an architecture."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save_checkpoint(tmp_path_factory.mktemp("source") / name, name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def compress(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Compress:
    """(output directory, result) of compressing an architecture as the keywords say; equal calls share one run."""
    made: dict[tuple[Any, ...], tuple[Path, dict[str, Any]]] = {}

    def get(name: str, **changes: Any) -> tuple[Path, dict[str, Any]]:
        key = (name, *sorted((field, str(value)) for field, value in changes.items()))
        if key not in made:
            output = tmp_path_factory.mktemp("compressed") / name
            made[key] = output, run(make_request(sources(name), output, **changes), silent)
        return made[key]

    return get
