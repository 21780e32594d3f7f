"""Start, failure and end of the real server: reasons that are said, and nothing that is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llm_helpers import spec

from trtbuild.adapters.triton import render_repository
from trtbuild.errors import HostError, ToolError
from trtbuild.serving.foreground import serve_package
from trtbuild.serving.server import TritonServer

pytestmark = pytest.mark.triton
BUILDER = Path(__file__).parents[2] / "builder"
SMALL_CONFIG = """
name: "small" backend: "python" max_batch_size: 0 model_transaction_policy { decoupled: true }
input [ { name: "n" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "n" data_type: TYPE_INT32 dims: [ 1 ] } ]
"""
SMALL_MODEL = """
class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            KEPT.append(sender)  # never answered: a request that hangs

KEPT = []
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A package whose model loads neither torch nor transformers: it starts in half a second."""
    model = tmp_path / "package" / "model_repository" / "small"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(SMALL_CONFIG)
    (model / "1" / "model.py").write_text(SMALL_MODEL)
    return tmp_path / "package"


def start(package: Path, **more: Any) -> TritonServer:
    return TritonServer.start(package / "model_repository", log=package / "log", startup_timeout_s=60, **more)


def processes(text: str) -> list[int]:
    """Processes whose command line holds `text`, itself a path of this test alone."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if text in line:
                found.append(int(entry.name))
    return found


def regions() -> set[str]:
    """Shared memory of servers that this process, or one that is gone, has started."""
    named = [path.name for path in Path("/dev/shm").iterdir() if path.name.startswith("trtbuild_")]
    owners = {name: int(name.split("_")[1]) for name in named}
    return {name for name, pid in owners.items() if pid == os.getpid() or not Path(f"/proc/{pid}").exists()}


def nothing_left(package: Path, before: set[str], limit_s: float = 15.0) -> None:
    deadline = time.monotonic() + limit_s
    while processes(str(package)):
        assert time.monotonic() < deadline, processes(str(package))
        time.sleep(0.05)
    assert not regions() - before


@pytest.fixture
def shared_memory() -> set[str]:
    return regions()


def test_start_and_stop_leave_nothing_behind(small: Path, shared_memory: set[str]) -> None:
    with start(small) as server:
        assert server.exit_code() is None
        assert len({server.ports.http, server.ports.grpc, server.ports.metrics}) == 3
        assert len(processes(str(small))) >= 3, "supervisor, server and stub"
    assert server.exit_code() == 0
    assert server.stop() == 0, "again is no error"
    nothing_left(small, shared_memory)


def test_killing_the_server_leaves_no_stub_behind(small: Path, shared_memory: set[str]) -> None:
    with start(small) as server:
        os.kill(server.pid, signal.SIGKILL)
        assert server.wait(20) == 128 + signal.SIGKILL
        nothing_left(small, shared_memory)


def test_a_request_that_hangs_does_not_hold_up_the_end(small: Path, shared_memory: set[str]) -> None:
    with start(small) as server:
        client = socket.create_connection((server.address, server.ports.http))
        body = b'{"n": 1}'
        head = f"POST /v2/models/small/generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        time.sleep(0.3)
        started = time.monotonic()
    assert time.monotonic() - started < 30
    client.close()
    nothing_left(small, shared_memory)


def test_the_server_ends_with_its_parent(small: Path, shared_memory: set[str]) -> None:
    program = (
        "import sys, time, pathlib\n"
        "from trtbuild.serving.server import TritonServer\n"
        "package = pathlib.Path(sys.argv[1])\n"
        "TritonServer.start(package / 'model_repository', log=package / 'log', startup_timeout_s=60)\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(BUILDER)}
    parent = subprocess.Popen([sys.executable, "-c", program, str(small)], stdout=subprocess.PIPE, env=environment)
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close() if parent.stdout else None
    nothing_left(small, shared_memory, limit_s=30)


def test_the_foreground_ends_on_a_signal(small: Path, shared_memory: set[str]) -> None:
    program = (
        "import sys, pathlib\n"
        "from trtbuild.serving.foreground import serve_package\n"
        "package = pathlib.Path(sys.argv[1])\n"
        "serve_package(package, log=package / 'log', http_port=0, grpc_port=0, metrics_port=0,\n"
        "              on_ready=lambda server: print(server.http_url, flush=True))\n"
        "print('ended', flush=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(BUILDER)}
    command = [sys.executable, "-c", program, str(small)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    assert child.stdout is not None
    assert child.stdout.readline().startswith("http://127.0.0.1:")
    child.send_signal(signal.SIGINT)
    rest, _ = child.communicate(timeout=60)
    assert (rest, child.returncode) == ("ended\n", 0)
    nothing_left(small, shared_memory)


def test_a_server_that_ends_by_itself_is_an_error(small: Path) -> None:
    with pytest.raises(ToolError, match="Triton ended by itself with exit code 137"):
        serve_package(
            small, log=small / "log", http_port=0, grpc_port=0, metrics_port=0,
            on_ready=lambda server: os.kill(server.pid, signal.SIGKILL),
        )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_server_that_loses_a_stub_ends_and_says_so(small: Path, shared_memory: set[str], number: int) -> None:
    """Triton itself would go on, ready for requests that are never answered."""

    def lose(server: TritonServer) -> None:
        time.sleep(1)
        (stub,) = (pid for pid in processes(str(small)) if pid > server.pid)
        os.kill(stub, number)

    said = f"exit code 1: the Python process of model 'small' was ended by signal {int(number)}"
    with pytest.raises(ToolError, match=said):
        serve_package(small, log=small / "log", http_port=0, grpc_port=0, metrics_port=0, on_ready=lose)
    nothing_left(small, shared_memory)


def test_a_taken_port_is_named(small: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(HostError, match=f"port {port} on 127.0.0.1 cannot be used .*; name another port"):
            start(small, http_port=port)


def test_two_servers_at_once(small: Path, shared_memory: set[str]) -> None:
    with start(small) as one, start(small) as two:
        assert one.ports != two.ports
        one.stop()
        assert two.exit_code() is None
    nothing_left(small, shared_memory)


def edit(old: str, new: str) -> Callable[[Path], Any]:
    return lambda model: (model / "config.pbtxt").write_text(
        (model / "config.pbtxt").read_text().replace(old, new, 1), encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda model: (model / "1/model.py").unlink(), "Python model file not found in"),
        (lambda model: (model / "1/model.py").write_text("def f(:"), "SyntaxError: invalid syntax"),
        (
            lambda model: (model / "1/model.py").write_text("import nothing_like_it"),
            "No module named 'nothing_like_it'",
        ),
        (lambda model: (model / "1/model.py").write_text("x = 1"), "has no attribute 'TritonPythonModel'"),
        (lambda model: shutil.rmtree(model / "1"), "at least one version must be available"),
        (edit("max_batch_size", "max_batch"), 'has no field named "max_batch"'),
        (edit('"small"', '"other"'), "unexpected directory name 'small' for model 'other'"),
        (edit('"python"', '"tensorrtllm"'), "unable to find backend library for backend 'tensorrtllm'"),
    ],
)
def test_the_reason_of_a_failed_start_is_said(
    small: Path, shared_memory: set[str], change: Callable[[Path], Any], sentence: str
) -> None:
    change(small / "model_repository" / "small")
    started = time.monotonic()
    with pytest.raises(ToolError) as raised:
        start(small)
    assert sentence in str(raised.value)
    assert str(small / "log") in str(raised.value)
    assert time.monotonic() - started < 40, "a server that hangs is recognized before the time limit"
    nothing_left(small, shared_memory)


def test_a_start_that_takes_too_long_is_ended(small: Path, shared_memory: set[str]) -> None:
    slow = "import time\nclass TritonPythonModel:\n    def initialize(self, args): time.sleep(120)\n"
    (small / "model_repository/small/1/model.py").write_text(slow)
    with pytest.raises(ToolError, match="Triton was not ready within 2 s"):
        TritonServer.start(small / "model_repository", log=small / "log", startup_timeout_s=2)
    nothing_left(small, shared_memory)


def test_an_engine_that_is_not_there_is_said(tmp_path: Path) -> None:
    render_repository(spec(), tmp_path / "model_repository")
    with pytest.raises(ToolError) as raised:
        start(tmp_path)
    assert "there is no engine here (parameter engine_dir of config.pbtxt)" in str(raised.value)
