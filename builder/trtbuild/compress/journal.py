"""What a streamed compression has finished: one line for each part, so that a killed run goes on behind the last.

The first line is the key of everything that decides the bytes; a journal with another key is of no use. Every line ends
with its own digest: one that was cut off by a crash, and all after it, do not count.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

_NAME = "journal.jsonl"


class Journal:
    """The journal in `directory`; `parts` are the finished ones in order, empty if it was for another `key`."""

    def __init__(self, directory: Path, key: str) -> None:
        self._path = directory / _NAME
        lines = _sound_lines(self._path)
        self.matches = bool(lines) and lines[0] == {"key": key}
        self.parts: list[dict[str, Any]] = lines[1:] if self.matches else []
        kept = lines if self.matches else [{"key": key}]
        temporary = self._path.with_suffix(".new")
        temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
        temporary.replace(self._path)

    def finish(self, part: dict[str, Any]) -> None:
        """Remember that one more part is finished; everything it stands for must be on the disk."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(part))
            file.flush()
            os.fsync(file.fileno())
        self.parts.append(part)


def _line(value: dict[str, Any]) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"{hashlib.sha256(text.encode()).hexdigest()} {text}\n"


def _sound_lines(path: Path) -> list[dict[str, Any]]:
    try:
        raw = path.read_bytes()
    except OSError:
        return []
    lines: list[dict[str, Any]] = []
    for line in raw.splitlines(keepends=True):
        digest, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or hashlib.sha256(text).hexdigest().encode() != digest:
            break
        lines.append(json.loads(text))
    return lines
