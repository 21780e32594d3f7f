"""Canonical JSON, file digests and the list of files that a digest stands for.

Canonical: sorted keys, UTF-8, LF, final newline; equal values have equal bytes. Wall-clock times and host names never
enter a digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtbuild.errors import ArtifactError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
# A file changed within one tick of the clock that stamps it can keep its stamp: such a digest is not remembered.
_STAMP_GRACE_S = 0.1


@dataclass(frozen=True, slots=True, order=True)
class FileEntry:
    """One file of an artifact or package; the path is relative with forward slashes."""

    path: str
    size: int
    sha256: str


def canonical_json(value: Any) -> str:
    """The one text of a JSON value, for files that people read too."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, indent=2, allow_nan=False) + "\n"


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON value, independent of its layout."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def write_atomic(path: Path, text: str) -> None:
    """Put a whole file in place at once: a reader sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """A JSON file of ours.

    Raises:
        ArtifactError: it is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing", "build it again") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error})", "build it again") from None


class DigestCache:
    """SHA-256 of files, computed once for each (device, inode, size, mtime, ctime).

    Args:
        directory: where the digests are remembered; None remembers nothing.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def sha256(self, path: Path) -> str:
        """The digest of a file's bytes."""
        stamp = _stamp(path)
        known = self._recall(stamp)
        if known is not None:
            return known
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if _stamp(path) == stamp and time.time_ns() - stamp[-1] > _STAMP_GRACE_S * 1e9:
            self._remember(stamp, digest)
        return digest

    def relearn(self, path: Path, digest: str) -> None:
        """Remember a digest under the file's present stamp: a new hard link changes ctime, not the bytes."""
        self._remember(_stamp(path), digest)

    def _entry(self, stamp: tuple[int, ...]) -> Path | None:
        if self._directory is None:
            return None
        name = hashlib.sha256(repr(stamp).encode()).hexdigest()
        return self._directory / name[:2] / name

    def _recall(self, stamp: tuple[int, ...]) -> str | None:
        entry = self._entry(stamp)
        try:
            text = entry.read_text(encoding="ascii") if entry else ""
        except OSError:
            return None
        return text if len(text) == hashlib.sha256().digest_size * 2 else None

    def _remember(self, stamp: tuple[int, ...], digest: str) -> None:
        entry = self._entry(stamp)
        if entry is None:
            return
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(entry, digest)


def list_tree(root: Path, digests: DigestCache, *, skip: Iterable[str] = ()) -> tuple[FileEntry, ...]:
    """Every file below `root`, sorted by path.

    Raises:
        ArtifactError: a symbolic link or special file lies there.
    """
    skipped = frozenset(skip)
    entries = []
    for path in root.rglob("*"):
        relative = path.relative_to(root).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ArtifactError(
                f"{path} is neither a file nor a directory", "remove it; artifacts hold plain files only"
            )
        if path.is_file() and relative not in skipped:
            entries.append(FileEntry(path=relative, size=path.stat().st_size, sha256=digests.sha256(path)))
    return tuple(sorted(entries))


def compare_tree(
    root: Path, entries: Iterable[FileEntry], digests: DigestCache, *, skip: Iterable[str] = ()
) -> list[str]:
    """What differs between the files below `root` and their list, one sentence each; empty when all is well."""
    expected = {entry.path: entry for entry in entries}
    problems = []
    for path, entry in sorted(expected.items()):
        file = root / path
        if not file.is_file():
            problems.append(f"{path} is missing")
        elif file.stat().st_size != entry.size:
            problems.append(f"{path} has {file.stat().st_size} bytes instead of {entry.size}")
        elif digests.sha256(file) != entry.sha256:
            problems.append(f"{path} has other bytes than were recorded")
    skipped = frozenset(skip)
    there = (path for path in root.rglob("*") if not path.is_dir())
    found = (path.relative_to(root).as_posix() for path in there)
    problems += [f"{path} was not part of it" for path in sorted(found) if path not in expected and path not in skipped]
    return problems


def entries_json(entries: Iterable[FileEntry]) -> list[dict[str, Any]]:
    """File entries as JSON."""
    return [asdict(entry) for entry in entries]


def entries_from_json(value: Iterable[Mapping[str, Any]]) -> tuple[FileEntry, ...]:
    """File entries back from JSON."""
    return tuple(FileEntry(path=item["path"], size=item["size"], sha256=item["sha256"]) for item in value)


def digest_entries(entries: Iterable[FileEntry]) -> str:
    """One digest for a list of files: their paths, sizes and digests."""
    return digest_json(entries_json(sorted(entries)))


def _stamp(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
