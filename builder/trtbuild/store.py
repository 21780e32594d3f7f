"""The artifact store: content-addressed directories that are written once.

``<store>/<kind>/<key>/`` holds ``content/``, ``log.txt`` and, written last, ``manifest.json``. A step works in
``<store>/staging/``; publishing is one rename, so that a run killed at any instant leaves nothing that looks finished.
A lock file for each key lets one process build it while another waits and then reuses. A step that can go on where it
was killed keeps its unfinished files in ``<store>/unfinished/<kind>-<key>/``: the key holds everything that decides the
bytes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trtbuild.errors import ArtifactError, HostError
from trtbuild.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    DigestCache,
    FileEntry,
    canonical_json,
    compare_tree,
    digest_entries,
    entries_from_json,
    entries_json,
    list_tree,
    read_json,
    write_atomic,
)

CONTENT = "content"
LOG = "log.txt"
_UNFINISHED_DAYS = 14  # after which nobody is expected to go on


@dataclass(frozen=True, slots=True)
class Artifact:
    """One finished artifact: `digest` names its bytes, `record` is what the step reported."""

    kind: str
    key: str
    path: Path
    digest: str
    record: Mapping[str, Any]
    files: tuple[FileEntry, ...]

    @property
    def content(self) -> Path:
        """The directory with the artifact's files."""
        return self.path / CONTENT


@dataclass(frozen=True, slots=True)
class Staging:
    """Where one step writes: files into `content`, its tools' output into `log`.

    `unfinished`, on the same file system, outlives a killed or failed run; publishing removes it. It need not exist.
    """

    path: Path
    unfinished: Path

    @property
    def content(self) -> Path:
        """The directory that becomes the artifact."""
        return self.path / CONTENT

    @property
    def log(self) -> Path:
        """The log that stays beside the artifact."""
        return self.path / LOG


class Store:
    """A store at one directory.

    Raises:
        HostError: the directory cannot be made or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            (root / "staging").mkdir(parents=True, exist_ok=True)
            for name in ("locks", "unfinished"):
                (root / name).mkdir(exist_ok=True)
        except OSError as error:
            raise HostError(
                f"the store {root} cannot be written ({error.strerror})", "set `store:` to a writable directory"
            ) from None
        self.digests = DigestCache(root / "digests")

    def find(self, kind: str, key: str) -> Artifact | None:
        """The finished artifact with this key, with every file checked; None where there is none.

        A damaged artifact is moved aside (``<store>/damaged/``), so that it is built again and never reused.
        """
        path = self.root / kind / key
        if not path.is_dir():
            return None
        try:
            manifest = read_json(path / MANIFEST)
            entries = entries_from_json(manifest["files"])
            sound = manifest["key"] == key and not compare_tree(path / CONTENT, entries, self.digests)
        except (ArtifactError, KeyError, TypeError):
            sound = False
        if not sound:
            self._set_aside(path)
            return None
        return Artifact(kind, key, path, manifest["digest"], manifest["record"], entries)

    @contextlib.contextmanager
    def lock(self, kind: str, key: str, *, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold the right to build one key; `waiting` is called once if another process holds it.

        The kernel releases the lock when its holder dies.
        """
        lock = self._file_lock(f"{kind}-{key}")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waiting()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def stage(self, kind: str, key: str) -> Staging:
        """An empty staging directory for one key. Call under `lock`."""
        name = f"{kind}-{key}"
        staging = Staging(self.root / "staging" / name, self.root / "unfinished" / name)
        remove_tree(staging.path)
        staging.content.mkdir(parents=True)
        return staging

    def sweep(self) -> None:
        """Remove what killed or failed runs left in staging, and unfinished files that are two weeks old.

        A directory whose key somebody is building stays.
        """
        oldest = time.time() - _UNFINISHED_DAYS * 24 * 3600
        abandoned = [path for path in (self.root / "unfinished").iterdir() if path.stat().st_mtime < oldest]
        for path in (*sorted((self.root / "staging").iterdir()), *sorted(abandoned)):
            lock = self._file_lock(path.name)
            with contextlib.suppress(Timeout), lock.acquire(timeout=0):
                remove_tree(path)

    def publish(self, staging: Staging, kind: str, key: str, record: Mapping[str, Any]) -> Artifact:
        """Turn a staging directory into the artifact: digests, manifest, one rename. Call under `lock`."""
        entries = list_tree(staging.content, self.digests)
        for entry in entries:
            _settle(staging.content / entry.path)
        digest = digest_entries(entries)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "kind": kind,
            "key": key,
            "digest": digest,
            "record": record,
            "files": entries_json(entries),
        }
        write_atomic(staging.path / MANIFEST, canonical_json(manifest))
        path = self.root / kind / key
        path.parent.mkdir(exist_ok=True)
        staging.path.rename(path)
        _sync_directory(path.parent)
        remove_tree(staging.unfinished)
        for entry in entries:
            self.digests.relearn(path / CONTENT / entry.path, entry.sha256)
        return Artifact(kind, key, path, digest, record, entries)

    def _file_lock(self, name: str) -> FileLock:
        return FileLock(self.root / "locks" / f"{name}.lock")

    def _set_aside(self, path: Path) -> None:
        damaged = self.root / "damaged"
        damaged.mkdir(exist_ok=True)
        path.rename(damaged / f"{path.parent.name}-{path.name}-{uuid.uuid4().hex[:8]}")


def remove_tree(path: Path) -> None:
    """Remove a directory of ours, read-only files included; no error where there is none."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)


def _settle(path: Path) -> None:
    """Write a file's bytes to the disk and make it read-only, for everyone: an artifact is never edited."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    path.chmod(0o444 | (path.stat().st_mode & 0o111))


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
