"""The child's side of a heavy step: read one request, report progress, answer once.

The parent (`trtbuild.process`) starts ``python -m trtbuild.<step>`` with the request on standard input; by hand, give
the request's file: ``python -m trtbuild.<step> REQUEST.json``. The child writes one JSON object a line to its standard
output: ``{"progress": [done, total, what]}`` any number of times, then ``{"result": {...}}`` or ``{"error": {...}}``.
Everything else that is printed goes to standard error, which the parent keeps as the log.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from trtbuild.errors import RecipeError, TrtbuildError

Progress = Callable[[int, int, str], None]
Run = Callable[[dict[str, Any], Progress], dict[str, Any]]

PARENT_VARIABLE = "TRTBUILD_PARENT_PID"
_PR_SET_PDEATHSIG = 1
_MIN_INTERVAL_S = 0.2


class Clock:
    """Seconds of each phase of a step, by its name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Take the time of a phase."""
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 3)


def serve(run: Run) -> None:
    """Run one step in this process and end it with exit code 0 (answered) or 1 (died)."""
    channel = _own_stdout()
    _die_with_parent()
    request = json.loads(Path(sys.argv[1]).read_bytes() if len(sys.argv) > 1 else sys.stdin.buffer.read())
    started = time.monotonic()
    try:
        result = run(request, _progress_writer(channel))
    except TrtbuildError as error:
        _send(channel, {"error": _describe(error)})
        return
    usage = {"seconds": round(time.monotonic() - started, 3), "peak_memory_bytes": peak_memory_bytes()}
    _send(channel, {"result": result, "usage": usage})


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far, in bytes (Linux counts it in KiB).

    `getrusage` alone would also count what the parent held when it started this process.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _own_stdout() -> TextIO:
    """Keep the protocol's channel for ourselves: libraries that print then write to the log."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def _die_with_parent() -> None:
    """Ask the kernel to end this process when the parent dies, so that no orphan writes into a staging directory."""
    # Taken out, so that processes which this one starts do not take themselves for orphans; absent when run by hand.
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        os._exit(1)  # it was gone before we asked, and pid 1 or a subreaper has taken its place


def _progress_writer(channel: TextIO) -> Progress:
    last = [0.0]

    def progress(done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if done < total and now - last[0] < _MIN_INTERVAL_S:
            return
        last[0] = now
        _send(channel, {"progress": [done, total, what]})

    return progress


def _describe(error: TrtbuildError) -> dict[str, Any]:
    described: dict[str, Any] = {"class": type(error).__name__, "message": error.message, "hint": error.hint}
    if isinstance(error, RecipeError):
        described["problems"] = [[problem.path, problem.message, problem.hint] for problem in error.problems]
    return described


def _send(channel: TextIO, message: dict[str, Any]) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()
