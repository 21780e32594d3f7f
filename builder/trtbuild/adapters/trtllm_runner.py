"""Run the script that builds a TensorRT engine in its container, and find out whether it can be run here.

What runs a container, and how, is the script's own knowledge (``templates/trtllm_engine/build.sh.j2``): by hand and
from here the same lines are executed.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from trtbuild.errors import ArtifactError, CompatibilityError, HostError, ToolError, TrtbuildError
from trtbuild.process import OnProgress, log_tail

_PR_SET_PDEATHSIG = 1
_CHECK_TIMEOUT_S = 120.0  # a daemon that hangs is no runner
_END_TIMEOUT_S = 60.0  # the script itself gives the container ten seconds
_SAYS = "build.sh: "
_RANK_FINISHED = re.compile(r"^trtbuild: rank (\d+) is finished")
# The first of these is the cause: TensorRT-LLM ends with an assertion that some rank has failed.
_CAUSE = re.compile(r"^(?:[\w.]+(?:Error|Exception)\b(?::|$)|.*\[TRT\] \[E\] )")
_SHOWN = 60
_ERRORS: dict[int, type[TrtbuildError]] = {3: CompatibilityError, 5: ArtifactError, 6: HostError}


def find_runner(script: str, wanted: str) -> str:
    """What would run `script` here: docker, podman, enroot or slurm.

    Args:
        script: the text of ``build.sh``.
        wanted: one of them, or auto for the first that works.

    Raises:
        HostError: nothing does; the message says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "build.sh")
        path.write_text(script, encoding="utf-8")
        command = [_bash(), str(path), "--with", wanted, "--check"]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=_CHECK_TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            raise HostError(f"{wanted} does not answer within {_CHECK_TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        raise HostError(_last_word(done.stderr.splitlines()) or f"the check of {wanted} failed: {done.stderr}")
    return done.stdout.strip()


@dataclass(frozen=True, slots=True)
class EngineRun:
    """One build of an engine.

    Args:
        script: ``build.sh``.
        runner: what `find_runner` found.
        checkpoint: the converted checkpoint.
        engine: where the finished engine will lie; its work lies beside it in ``{engine}.work``.
        ranks: how many there are.
        log: receives everything that is printed.
    """

    script: Path
    runner: str
    checkpoint: Path
    engine: Path
    ranks: int
    log: Path


def run_script(run: EngineRun, on_progress: OnProgress) -> None:
    """Build the engine and wait for it; nothing of it runs any more when this returns or raises.

    Raises:
        ToolError: ``trtllm-build`` or the container failed; HostError, CompatibilityError, ArtifactError: what the
            script itself refuses.
    """
    command = [_bash(), str(run.script), "--with", run.runner, str(run.checkpoint), str(run.engine)]
    with run.log.open("ab") as log:
        # One thread and no lock is held: running Python between fork and exec is safe.
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with(os.getpid()),  # noqa: PLW1509
        )
        try:
            heard = _follow(child, log, run, on_progress)
            child.wait()
        finally:
            _end(child)
    if child.returncode != 0:
        raise _failure(child.returncode, heard, run)


def _bash() -> str:
    found = shutil.which("bash")
    if found is None:
        raise HostError("bash is not on PATH, and the script that builds an engine needs it", "install bash")
    return found


def _end_with(parent: int) -> Callable[[], None]:
    """The script is told to stop when we die at once: it removes the container, which no signal of ours would reach."""

    def ask() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return ask


@dataclass(slots=True)
class _Heard:
    """What came out of a build: the ranks that are finished, the script's last sentence, the first error."""

    finished: set[int] = field(default_factory=set)
    sentence: str = ""
    cause: str = ""

    def take(self, text: str) -> None:
        match = _RANK_FINISHED.match(text)
        if match:
            self.finished.add(int(match[1]))
        if text.startswith(_SAYS):
            self.sentence = text.removeprefix(_SAYS)
        if not self.cause and _CAUSE.match(text):
            self.cause = text


def _follow(child: subprocess.Popen[bytes], log: IO[bytes], run: EngineRun, on_progress: OnProgress) -> _Heard:
    """Copy the output to the log and tell of it, until it ends."""
    heard = _Heard()
    stream: IO[bytes] = child.stdout if child.stdout is not None else open(os.devnull, "rb")  # noqa: PTH123, SIM115
    for line in stream:
        log.write(line)
        log.flush()
        text = line.decode("utf-8", errors="replace").rstrip().rsplit("\r", 1)[-1].strip()
        heard.take(text)
        if text:
            shown = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
            on_progress(len(heard.finished), run.ranks, f"ranks in {run.runner}: {shown}")
    return heard


def _end(child: subprocess.Popen[bytes]) -> None:
    """Let the script remove its container; one that does not end is killed, with everything it has started."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _failure(code: int, heard: _Heard, run: EngineRun) -> TrtbuildError:
    where = f"the whole log is {run.log}"
    kind = _ERRORS.get(code)
    if kind is not None and heard.sentence:
        return kind(f"the engine was not built: {heard.sentence}", where)
    ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    sentence = heard.sentence or f"build.sh in {run.runner} {ended}"
    cause = f" ({heard.cause})" if heard.cause else ""
    hint = f"{where}; runtime.build_in: script gives the package without its engine"
    return ToolError(f"{sentence}{cause}:\n{log_tail(run.log)}", hint)


def _last_word(lines: list[str]) -> str:
    """The script's own last sentence."""
    return next((line.removeprefix(_SAYS) for line in reversed(lines) if line.startswith(_SAYS)), "")
