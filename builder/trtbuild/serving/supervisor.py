"""The parent of a running tritonserver: it outlives accidents on either side and leaves nothing behind.

Started as a script (no package is imported: it is up in a few milliseconds). It adopts the server's orphans, so that
a server killed at once leaves no stub process and no shared memory; and when its own parent goes away, its standard
input ends and it stops the server. It also ends a server that has lost a stub: Triton does not notice it, and every
request to that model would wait for ever. Arguments: REGION_PREFIX GRACE_SECONDS COMMAND...; the first line on its
standard output is the server's process id; its exit code is the server's, or 1 for a lost stub.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_STUB = "triton_python_b"  # of triton_python_backend_stub: the kernel keeps 15 characters
_LOST_STUB_GRACE_S = 2.0
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.2, 30.0


def main() -> int:
    """Run the server until it ends or somebody asks for its end; return its exit code."""
    prefix, grace_s, command = sys.argv[1], float(sys.argv[2]), sys.argv[3:]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wakeup = _signals_to_pipe()

    def die_with_supervisor() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    # One thread only, and no lock is held here: running Python between fork and exec is safe.
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, preexec_fn=die_with_supervisor)  # noqa: PLW1509
    os.write(1, f"{server.pid}\n".encode())
    os.close(1)
    stubs = Stubs(server.pid)
    lost = None
    try:
        _wait_for_the_end(server, wakeup, stubs)
        if server.poll() is None and stubs.lost is not None:
            lost = stubs.lost
            os.write(2, f"trtbuild: {lost}; requests to it would wait for ever, so the server ends\n".encode())
        _stop(server, grace_s if lost is None else _LOST_STUB_GRACE_S)
    finally:
        _kill_orphans()
        _remove_shared_memory(prefix)
    if lost is not None:
        return 1
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


class Stubs:
    """The server's Python processes: found by looking, at longer and longer intervals, and watched for their end."""

    def __init__(self, server: int) -> None:
        self._server = server
        self._watched: dict[
            int, tuple[int, str]
        ] = {}  # by the descriptor that gets readable at the end (pidfd_open(2))
        self._interval_s = _FIRST_LOOK_S
        self._next_look = 0.0
        self.lost: str | None = None

    def look(self) -> list[int]:
        """What to select on, after a look for new stubs where it is time for one."""
        if time.monotonic() >= self._next_look:
            known = {pid for pid, _ in self._watched.values()}
            found = {pid: model for pid in set(_children(self._server)) - known if (model := _stub_model(pid))}
            for pid, model in found.items():
                try:
                    self._watched[os.pidfd_open(pid)] = (pid, model)
                except ProcessLookupError:  # it ended at once: the server's own start-up says why
                    continue
            # Models are loaded at the start, one after another; later only Triton itself may start a stub again.
            self._interval_s = _FIRST_LOOK_S if found else min(self._interval_s * 1.25, _LONGEST_LOOK_S)
            self._next_look = time.monotonic() + self._interval_s
        return list(self._watched)

    def wait_s(self) -> float:
        """How long to sleep until the next look."""
        return max(self._next_look - time.monotonic(), 0.0)

    def ended(self, descriptors: list[int]) -> bool:
        """Whether one of them stands for a stub that has died, rather than ended with its model."""
        for descriptor in descriptors:
            if descriptor not in self._watched:
                continue
            pid, model = self._watched.pop(descriptor)
            number = _death(pid)
            os.close(descriptor)
            if number:
                self.lost = f"the Python process of {model} was ended by signal {number}"
        return self.lost is not None


def _signals_to_pipe() -> int:
    """Make every signal that matters readable from a pipe, and return the pipe's end."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in (*_STOP_SIGNALS, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    return read_end


def _wait_for_the_end(server: subprocess.Popen[bytes], wakeup: int, stubs: Stubs) -> None:
    """Return when the server or a stub has ended, a stop signal came, or our parent has closed our standard input."""
    while server.poll() is None:
        readable, _, _ = select.select([0, wakeup, *stubs.look()], [], [], stubs.wait_s())
        if 0 in readable and not os.read(0, 4096):
            return
        if wakeup in readable and set(os.read(wakeup, 4096)) & {int(number) for number in _STOP_SIGNALS}:
            return
        if stubs.ended(readable) and not _ends_by_itself(server):
            return


def _ends_by_itself(server: subprocess.Popen[bytes]) -> bool:
    """Whether the server was on its way out: a stub of Triton 2.51 may crash at its own ordinary end."""
    try:
        server.wait(timeout=_LOST_STUB_GRACE_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def _stop(server: subprocess.Popen[bytes], grace_s: float) -> None:
    if server.poll() is None:
        server.terminate()
    try:
        server.wait(timeout=grace_s)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _kill_orphans(limit_s: float = 10.0) -> None:
    """End the stubs that a killed server left: as their subreaper we are their parent now."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        for pid in _children(os.getpid()):
            os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.02)


def _children(parent: int) -> list[int]:
    """Process ids of the children of `parent`."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    return [pid for pid in pids if (fields := _stat(pid)) and int(fields[1]) == parent]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on (proc(5): so the parent is [1]); none if the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _stub_model(pid: int) -> str:
    """Whose Python stub this is, by its first argument MODEL/VERSION/model.py; empty for another process."""
    try:
        if not Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").startswith(_STUB):
            return ""
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return ""
    # One that has died before we saw it has no arguments any more.
    return f"model {Path(arguments[1]).parents[1].name!r}" if len(arguments) > 1 else "a model"


def _death(pid: int) -> int:
    """The signal that ended a process nobody has waited for yet; 0 for an ordinary end (proc(5): field 52)."""
    fields = _stat(pid)
    return int(fields[49]) & 0x7F if len(fields) > 49 else 0


def _remove_shared_memory(prefix: str) -> None:
    for path in Path("/dev/shm").glob(f"{prefix}*"):  # noqa: S108 - the place that POSIX shared memory has on Linux
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
