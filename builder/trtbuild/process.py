"""Run a heavy step in a child process, so that its memory returns to the system and its crash is a clean error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from trtbuild import errors
from trtbuild.errors import Problem, RecipeError, ToolError, TrtbuildError

OnProgress = Callable[[int, int, str], None]
_TAIL_LINES = 12
_TERMINATE_TIMEOUT_S = 10.0
# Idle OpenMP threads that spin make everything beside them two to four times slower; nothing here may reach a network.
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True, slots=True)
class WorkerResult:
    """What a child reported, and what it used."""

    result: Mapping[str, Any]
    seconds: float
    peak_memory_bytes: int


def run_worker(module: str, request: Mapping[str, Any], *, log: Path, on_progress: OnProgress) -> WorkerResult:
    """Run ``python -m module`` on `request` and wait for its answer.

    Args:
        module: a module that calls `trtbuild.worker.serve`.
        request: what the step is to do, as JSON.
        log: receives everything the child prints.
        on_progress: called with (done, total, what).

    Raises:
        TrtbuildError: the class that the child raised; ToolError when it died without an answer.
    """
    with tempfile.TemporaryDirectory(prefix="trtbuild-") as directory:
        request_file = Path(directory) / "request.json"
        request_file.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", module, str(request_file)]
        environment = _ENVIRONMENT | dict(os.environ) | {"TRTBUILD_PARENT_PID": str(os.getpid())}
        with log.open("ab") as log_file:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log_file, env=environment
            )
        answer = _listen(child, on_progress)
    return _conclude(module, child.returncode, answer, log)


def _listen(child: subprocess.Popen[bytes], on_progress: OnProgress) -> Mapping[str, Any] | None:
    """The child's answer, or None if it died first; the child is gone when this returns or raises."""
    answer: Mapping[str, Any] | None = None
    try:
        stream: IO[bytes] = child.stdout if child.stdout is not None else open(os.devnull, "rb")  # noqa: PTH123, SIM115
        for line in stream:
            message = json.loads(line)
            if "progress" in message:
                done, total, what = message["progress"]
                on_progress(done, total, what)
            else:
                answer = message
        child.wait()
    finally:
        _end(child)
    return answer


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_TERMINATE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _conclude(module: str, code: int, answer: Mapping[str, Any] | None, log: Path) -> WorkerResult:
    if answer is not None and "result" in answer:
        usage = answer["usage"]
        return WorkerResult(answer["result"], usage["seconds"], usage["peak_memory_bytes"])
    if answer is not None and "error" in answer:
        raise _rebuild(answer["error"])
    raise ToolError(f"{module} {_death(code)} without an answer:\n{log_tail(log)}", f"the whole log is {log}")


def _death(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    why = ", usually because the machine ran out of memory" if code == -signal.SIGKILL else ""
    return f"was ended by {name}{why}"


def _rebuild(described: Mapping[str, Any]) -> TrtbuildError:
    """The error that the child raised, as the same class."""
    kind = getattr(errors, described["class"], ToolError)
    if kind is RecipeError:
        return RecipeError([Problem(*problem) for problem in described["problems"]])
    error: TrtbuildError = kind(described["message"], described["hint"])
    return error


def log_tail(log: Path) -> str:
    """The last lines of a log, indented for a message."""
    try:
        with log.open(encoding="utf-8", errors="replace") as file:
            lines = deque(file, maxlen=_TAIL_LINES)
    except OSError:
        return "  (no log)"
    return "".join(f"  {line}" for line in lines).rstrip() or "  (the log is empty)"
