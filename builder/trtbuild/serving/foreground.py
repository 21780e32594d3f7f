"""`trtbuild serve`: a server in the foreground, until somebody ends it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from trtbuild.errors import ToolError
from trtbuild.serving.server import TritonServer
from trtbuild.serving.startup_log import reason

_POLL_S = 0.2


class _StopAskedError(Exception):
    """Somebody asked for the end before the server was ready."""


def serve_package(
    package: Path,
    *,
    log: Path,
    on_ready: Callable[[TritonServer], None],
    http_port: int = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    address: str = "127.0.0.1",
    startup_timeout_s: float = 180.0,
) -> None:
    """Serve `package` until SIGINT or SIGTERM, then end the server cleanly; to be called in the main thread.

    Args:
        package: a package directory.
        log: the server's log.
        on_ready: called once when the server answers.
        http_port: 0 takes any free port; so do the others.
        grpc_port: see http_port.
        metrics_port: see http_port.
        address: where the server listens.
        startup_timeout_s: limit for the start.

    Raises:
        ArtifactError: the package has no model repository.
        HostError: the host lacks something, or a port is taken.
        ToolError: the server does not start, or ends by itself.
    """
    ready, asked_to_stop = threading.Event(), threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        asked_to_stop.set()
        if not ready.is_set():
            raise _StopAskedError

    # Before the start: process 1 of a container gets no signal that it has no handler for, and loading takes minutes.
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with TritonServer.start(
            package / "model_repository",
            log=log,
            http_port=http_port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            address=address,
            startup_timeout_s=startup_timeout_s,
        ) as server:
            ready.set()
            on_ready(server)
            while not asked_to_stop.wait(_POLL_S):
                if server.exit_code() is not None:
                    code = server.exit_code()
                    raise ToolError(f"Triton ended by itself with exit code {code}: {reason(log)}", f"see {log}")
    except _StopAskedError:
        return
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
