"""What a Triton log says about a server that failed (formats of Triton 2.51, read from real logs)."""

from __future__ import annotations

import re
from pathlib import Path

# Triton's own error lines: E, month and day, time, process, file and line, and the quoted message.
_ERROR = re.compile(r'^E\d{4} \S+ \d+ \S+\] "(.*)"$', re.MULTILINE)
_PROTOBUF = re.compile(r"Error parsing text-format \S+ (.*)$", re.MULTILINE)
_LOAD = re.compile(r"^failed to load '([^']*)' version \d+: (?:Internal: |Invalid argument: )?(.*)$", re.DOTALL)
_STUB = re.compile(r"^ERROR: Failed to create instance: ")
# Logged as errors on every host without a GPU.
_NOISE = ("CudaDriverHelper", "unable to create stream", "Failed to initialize NVML", "pinned")
# A model without model.py makes the server hang instead of ending.
_HANGS = re.compile(r"(Python model file not found in '[^']*')")
_TAKEN = re.compile(r"Socket '[^']*' already in use|[Aa]ddress already in use")
_LOST_STUB = re.compile(r"^trtbuild: (.*)$", re.MULTILINE)  # the supervisor's own line
_LAST_LINES = 8


def fatal_line(log: Path) -> str | None:
    """The fault that keeps the server from ever getting ready although it stays up, if the log names one."""
    found = _HANGS.search(_text(log))
    return found.group(1) if found else None


def taken_port(log: Path) -> str | None:
    """The line that says that a port was taken by somebody else."""
    found = _TAKEN.search(_text(log))
    return found.group(0) if found else None


def lost_stub(log: Path) -> str | None:
    """What the supervisor said when it ended a server whose Python process had died."""
    found = _LOST_STUB.search(_text(log))
    return found.group(1) if found else None


def last_lines(log: Path, count: int = _LAST_LINES) -> str:
    """The end of a log, for a message."""
    lines = [line for line in _text(log).splitlines() if line.strip()]
    return "\n".join(lines[-count:]) if lines else "(the log is empty)"


def reason(log: Path) -> str:
    """Why the server failed, in the words of its log: the model's own exception where there is one."""
    lost = lost_stub(log)
    if lost is not None:
        return lost
    text = _text(log)
    messages = [_plain(found) for found in _ERROR.findall(text) if not any(noise in found for noise in _NOISE)]
    models = [f"model {found.group(1)!r}: {found.group(2)}" for text in messages if (found := _LOAD.match(text))]
    others = [text for text in messages if not _LOAD.match(text) and not _STUB.match(text)]
    reasons = [*models, *others, *_PROTOBUF.findall(text)]
    return "; ".join(dict.fromkeys(reasons)) if reasons else f"its log ends with\n{last_lines(log)}"


def _plain(message: str) -> str:
    """A message as it was before it was quoted, with the place of a Python exception behind it in brackets."""
    text = message.replace("\\n", "\n").replace('\\"', '"').strip()
    said, _, places = text.partition("\n\nAt:\n")
    where = places.strip().splitlines()
    return f"{said} (at {where[0].strip()})" if where else said


def _text(log: Path) -> str:
    try:
        return log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
