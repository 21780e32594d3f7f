"""A tiny package, a server over it, and the model's own modules importable without Triton."""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import fake_triton  # noqa: E402

fake_triton.install()

from llm_helpers import ENGINE, START_S, spec  # noqa: E402
from restarting import forgiving  # noqa: E402

from trtbuild.adapters.triton import render_repository  # noqa: E402
from trtbuild.serving.server import TritonServer  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("bls"):
            item.obj = forgiving(item.obj)


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama as a package, without anything that `trtbuild build` adds around it."""
    import tiny

    root = tmp_path_factory.mktemp("package")
    tiny.save_checkpoint(root / "engine")
    (root / "engine" / "engine.json").write_text(json.dumps(ENGINE), encoding="utf-8")
    render_repository(spec(), root / "model_repository")
    return root


@pytest.fixture(scope="session")
def tokenizer(package: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(package / "engine")


@pytest.fixture(scope="session")
def server(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """One real server for every test that needs one."""
    log = tmp_path_factory.mktemp("server") / "triton.log"
    with TritonServer.start(package / "model_repository", log=log, startup_timeout_s=START_S) as running:
        yield running


Post = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="session")
def post(server: TritonServer) -> Post:
    """POST a body to `generate` (or another endpoint) and return status and decoded answer."""

    def send(body: Any, endpoint: str = "generate", *, raw: bytes | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(server.address, server.ports.http, timeout=60)
        try:
            data = json.dumps(body).encode() if raw is None else raw
            headers = {"Content-Type": "application/json"}
            connection.request("POST", f"/v2/models/tensorrt_llm/{endpoint}", data, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    return send
