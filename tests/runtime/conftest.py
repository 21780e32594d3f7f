"""Checkpoints and engines for the runtime's tests: tiny, random, made once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from trtbuild.runtime import Engine, EngineConfig, KvCacheConfig

CONFIG_FIELDS = set(EngineConfig.__dataclass_fields__)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices: a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint(name, seed=0, **overrides)`: the directory of a tiny checkpoint, made once."""
    made: dict[Any, Path] = {}

    def make(name: str = "llama", seed: int = 0, **overrides: Any) -> Path:
        key = (name, seed, repr(sorted(overrides.items())))
        if key not in made:
            path = tmp_path_factory.mktemp(f"{name}-{seed}")
            made[key] = tiny.save_checkpoint(path, name, seed=seed, overrides=overrides, tokenizer=False)
        return made[key]

    return make


def engine_config(**given: Any) -> EngineConfig:
    """A configuration for tests; keys of the KV cache may be given beside the others."""
    given.setdefault("compute_dtype", "float64")
    given.setdefault("device", "cpu")
    kv = {name: given.pop(name) for name in list(given) if name not in CONFIG_FIELDS}
    return EngineConfig(kv_cache=KvCacheConfig(**kv), **given)


@pytest.fixture
def engine(checkpoint: Callable[..., Path]) -> Iterator[Callable[..., Engine]]:
    """`engine(name="llama", **config)`: a loaded engine, closed after the test."""
    loaded: list[Engine] = []

    def load(name: str = "llama", path: Path | None = None, **config: Any) -> Engine:
        loaded.append(Engine.load(path or checkpoint(name), config=engine_config(**config)))
        return loaded[-1]

    yield load
    for one in loaded:
        one.close()
