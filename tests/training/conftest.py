"""One thread: two cores are shared, and sums then have one order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_requests import make_request, silent

from trtbuild.training.run import run


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """For every test of this directory."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def medusa(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[Path, dict[str, Any]]:
    """Trained heads and the result of their training."""
    folder = tmp_path_factory.mktemp("medusa")
    return folder / "draft", run(make_request(tiny_llama, folder, "medusa"), silent)


@pytest.fixture(scope="session")
def eagle3(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[Path, dict[str, Any]]:
    """A trained draft of 100 tokens and the result of its training."""
    folder = tmp_path_factory.mktemp("eagle3")
    request = make_request(tiny_llama, folder, "eagle3", draft_vocab_size=100)
    return folder / "draft", run(request, silent)
