"""Start the real Triton server over a model repository, wait until it answers, and stop it cleanly."""

from __future__ import annotations

import contextlib
import http.client
import os
import secrets
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from trtbuild.errors import ArtifactError, HostError, ToolError
from trtbuild.serving.installation import find_triton
from trtbuild.serving.startup_log import fatal_line, last_lines, lost_stub, reason, taken_port

_POLL_S = 0.05
_PORT_ATTEMPTS = 3
_EXIT_TIMEOUT_S = 10
_SUPERVISOR = Path(__file__).with_name("supervisor.py")


@dataclass(frozen=True, slots=True)
class Ports:
    """The three TCP ports of one server."""

    http: int
    grpc: int
    metrics: int


class TritonServer:
    """A running Triton server; a context manager whose end is the server's end."""

    def __init__(self, process: subprocess.Popen[str], *, pid: int, address: str, ports: Ports, log: Path) -> None:
        self._process = process
        self.pid = pid
        self.address = address
        self.ports = ports
        self.log = log

    @classmethod
    def start(
        cls,
        repository: Path,
        *,
        log: Path,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        address: str = "127.0.0.1",
        startup_timeout_s: float = 180.0,
    ) -> TritonServer:
        """Start a server over `repository` and return it when every model is ready; port 0 takes a free one.

        Raises:
            ArtifactError: `repository` is not a directory.
            HostError: the host lacks Triton, a library or the port.
            ToolError: the server ended or was not ready in time; the message carries the reason from its log.
        """
        if not repository.is_dir():
            raise ArtifactError(f"{repository}: there is no model repository here", "build the package first")
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            ports = _choose_ports(address, Ports(http_port, grpc_port, metrics_port))
            server = _launch(cls, repository, address=address, ports=ports, log=log)
            try:
                server._wait_until_ready(startup_timeout_s)  # noqa: SLF001 - our own factory
            except BaseException as error:
                server.stop()
                # A free port may be taken between our look and the server's start; a port that was asked for may not.
                chosen_by_us = 0 in (http_port, grpc_port, metrics_port) and taken_port(log) is not None
                if isinstance(error, ToolError) and chosen_by_us and attempt < _PORT_ATTEMPTS:
                    continue
                raise
            return server
        raise AssertionError("unreachable: the last attempt returns or raises")

    @property
    def http_url(self) -> str:
        """Where HTTP answers, such as ``http://127.0.0.1:8000``."""
        return f"http://{self.address}:{self.ports.http}"

    @property
    def grpc_url(self) -> str:
        """Where gRPC answers, as tritonclient writes it: host and port."""
        return f"{self.address}:{self.ports.grpc}"

    @property
    def metrics_url(self) -> str:
        """Where Prometheus reads."""
        return f"http://{self.address}:{self.ports.metrics}/metrics"

    def exit_code(self) -> int | None:
        """The server's exit code, None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait for the server to end by itself; its exit code, or None when the time is over."""
        try:
            return self._process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def lost_stub(self, timeout_s: float = 10.0) -> str | None:
        """After a request has failed: whether the server has ended because a model's Python process died, and how."""
        return lost_stub(self.log) if self.wait(timeout_s) is not None else None

    def stop(self) -> int:
        """End the server (it finishes running requests for some seconds) and return its exit code; idempotent."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            return self._process.wait(timeout=2 * _EXIT_TIMEOUT_S + 15)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the server dies with its supervisor
            return self._process.wait()

    def __enter__(self) -> TritonServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            code = self.exit_code()
            if code is not None:
                raise ToolError(f"Triton ended with exit code {code} at start-up: {reason(self.log)}", self._see_log())
            if _is_ready(self.address, self.ports.http):
                return
            # Some faults are logged while the server hangs instead of ending.
            fatal = fatal_line(self.log)
            if fatal is not None:
                raise ToolError(f"Triton cannot load the repository: {fatal}", self._see_log())
            time.sleep(_POLL_S)
        raise ToolError(
            f"Triton was not ready within {timeout_s:g} s: {reason(self.log)}",
            f"allow more time for a large model; {self._see_log()}",
        )

    def _see_log(self) -> str:
        return f"the whole log is in {self.log}"


def _launch(cls: type[TritonServer], repository: Path, *, address: str, ports: Ports, log: Path) -> TritonServer:
    triton = find_triton()
    prefix = f"trtbuild_{os.getpid()}_{secrets.token_hex(4)}"
    command = [
        *(sys.executable, "-I", "-S", str(_SUPERVISOR), prefix, str(_EXIT_TIMEOUT_S + 10)),
        str(triton.binary),
        f"--model-repository={repository.resolve()}",
        f"--backend-directory={triton.backends}",
        f"--cache-directory={triton.caches}",
        f"--http-address={address}",
        f"--grpc-address={address}",
        f"--metrics-address={address}",
        f"--http-port={ports.http}",
        f"--grpc-port={ports.grpc}",
        f"--metrics-port={ports.metrics}",
        f"--exit-timeout-secs={_EXIT_TIMEOUT_S}",
        f"--backend-config=python,shm-region-prefix-name={prefix}",
        # Our configurations are complete; auto-complete would start every stub, and load every engine, twice.
        "--disable-auto-complete-config",
        "--allow-gpu-metrics=false",
        "--pinned-memory-pool-byte-size=0",
    ]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            env=triton.environment(os.environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            cwd=triton.backends,  # the stub puts its working directory first on sys.path
            start_new_session=True,  # Ctrl-C reaches us alone, and we decide how the server ends
        )
    if process.stdout is None:
        raise AssertionError("unreachable: a pipe was asked for")
    line = process.stdout.readline()
    if not line:
        code = process.wait()
        raise ToolError(f"{triton.binary} could not be started (exit code {code}): {last_lines(log)}")
    return cls(process, pid=int(line), address=address, ports=ports, log=log)


def _is_ready(address: str, port: int) -> bool:
    connection = http.client.HTTPConnection(address, port, timeout=5)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _choose_ports(address: str, wanted: Ports) -> Ports:
    """Bind all three at once, so that they are free and differ, and let go of them for the server."""
    with contextlib.ExitStack() as stack:
        chosen = [_bind(stack, address, port) for port in (wanted.http, wanted.grpc, wanted.metrics)]
    return Ports(*chosen)


def _bind(stack: contextlib.ExitStack, address: str, port: int) -> int:
    probe = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free for a server
    try:
        probe.bind((address, port))
    except OSError as error:
        raise HostError(
            f"port {port} on {address} cannot be used ({error.strerror})", "name another port, or 0 for any free one"
        ) from error
    return int(probe.getsockname()[1])
