"""Shared by every test: isolation from the user's caches, and the checkpoints that several areas use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Two cores: threads that spin while others work make everything slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Nor do they say how long an example takes.
settings.register_profile("trtbuild", deadline=None)
settings.load_profile("trtbuild")

SMOLLM2 = Path("~/.cache/trtbuild/models/SmolLM2-135M-Instruct").expanduser()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real small model that ``make setup`` and ``make test`` unpack; its absence is a broken set-up, not a skip."""
    if not (SMOLLM2 / "model.safetensors").is_file():
        pytest.fail(f"{SMOLLM2} is missing; `make test` makes it with examples/smollm2_checkpoint.py")
    return SMOLLM2


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny random Llama checkpoint in bf16 with a tokenizer and a chat template."""
    from tiny import save_checkpoint

    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "llama")
