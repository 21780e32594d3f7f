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
from trtbuild.worker import PARENT_VARIABLE

OnProgress = Callable[[int, int, str], None]
_TAIL_LINES = 12
_TAIL_WIDTH = 400
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
    environment = _ENVIRONMENT | dict(os.environ) | {PARENT_VARIABLE: str(os.getpid())}
    # The file has no name: nothing is left of it even if this process is killed.
    with tempfile.TemporaryFile() as request_file, log.open("ab") as log_file:
        request_file.write(json.dumps(request).encode())
        request_file.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-m", module], stdin=request_file, stdout=subprocess.PIPE, stderr=log_file, env=environment
        )
        answer = _listen(child, on_progress, log_file)
    return _conclude(module, child.returncode, answer, log)


def _listen(child: subprocess.Popen[bytes], on_progress: OnProgress, log: IO[bytes]) -> Mapping[str, Any] | None:
    """The child's answer, or None if it died first; the child is gone when this returns or raises."""
    answer: Mapping[str, Any] | None = None
    try:
        stream: IO[bytes] = child.stdout if child.stdout is not None else open(os.devnull, "rb")  # noqa: PTH123, SIM115
        for line in stream:
            message = _read_message(line)
            if message is None:
                log.write(line)
                log.flush()
            elif "progress" in message:
                done, total, what = message["progress"]
                on_progress(done, total, what)
            else:
                answer = message
        child.wait()
    finally:
        _end(child)
    return answer


def _read_message(line: bytes) -> Mapping[str, Any] | None:
    """What the child says in one line; None for one that its death has cut, or that a library printed while loading."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) and message.keys() & {"progress", "result", "error"} else None


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
    why = " (usually because the machine ran out of memory)" if code == -signal.SIGKILL else ""
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
            lines = deque((line.rstrip("\n") for line in file), maxlen=_TAIL_LINES)
    except OSError:
        return "  (no log)"
    shown = (line if len(line) <= _TAIL_WIDTH else f"{line[:_TAIL_WIDTH]} ..." for line in lines)
    return "\n".join(f"  {line}" for line in shown).rstrip() or "  (the log is empty)"
