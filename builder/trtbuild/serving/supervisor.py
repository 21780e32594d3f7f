"""The parent of a running tritonserver: it outlives accidents on either side and leaves nothing behind.

Started as a script (no package is imported: it is up in a few milliseconds). It adopts the server's orphans, so that
a server killed at once leaves no stub process and no shared memory; and when its own parent goes away, its standard
input ends and it stops the server. Arguments: REGION_PREFIX GRACE_SECONDS COMMAND...; the first line on its standard
output is the server's process id; its exit code is the server's.
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
    try:
        _wait_for_the_end(server, wakeup)
        _stop(server, grace_s)
    finally:
        _kill_orphans()
        _remove_shared_memory(prefix)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


def _signals_to_pipe() -> int:
    """Make every signal that matters readable from a pipe, and return the pipe's end."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in (*_STOP_SIGNALS, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    return read_end


def _wait_for_the_end(server: subprocess.Popen[bytes], wakeup: int) -> None:
    """Return when the server has ended, a stop signal came, or our parent has closed our standard input."""
    while server.poll() is None:
        readable, _, _ = select.select([0, wakeup], [], [])
        if 0 in readable and not os.read(0, 4096):
            return
        if wakeup in readable and set(os.read(wakeup, 4096)) & {int(number) for number in _STOP_SIGNALS}:
            return


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
        for pid in _children():
            os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.02)


def _children() -> list[int]:
    """Process ids of our children, from /proc/PID/stat (proc(5): the fourth field is the parent)."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it ended while we looked
        if int(fields[1]) == os.getpid():
            found.append(int(entry.name))
    return found


def _remove_shared_memory(prefix: str) -> None:
    for path in Path("/dev/shm").glob(f"{prefix}*"):  # noqa: S108 - the place that POSIX shared memory has on Linux
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
