"""A hub on loopback with one small checkpoint."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import pytest
from fake_hub import FakeHub, running


def contents() -> dict[str, bytes]:
    """A repository with small files, two "LFS" files and forms of the weights that nobody asked for."""
    rng = random.Random(0)
    header = json.dumps({"w": {"dtype": "U8", "shape": [300_000], "data_offsets": [0, 300_000]}}).encode()
    return {
        "config.json": json.dumps({"architectures": ["LlamaForCausalLM"]}).encode(),
        "tokenizer.json": b"{}" * 500,
        "model.safetensors": len(header).to_bytes(8, "little") + header + rng.randbytes(300_000),
        "sub dir/extra.json": b'{"a": 1}',
        "pytorch_model.bin": rng.randbytes(1000),
        "empty.txt": b"",
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A running hub that HF_ENDPOINT points at; no token is set."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the suite is offline, loopback is not
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with running(FakeHub(contents())) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
