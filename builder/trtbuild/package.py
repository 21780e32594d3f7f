"""The package: the output directory of a build, put in place at once and verifiable byte for byte."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild import __version__
from trtbuild.errors import ArtifactError, HostError, Problem, RecipeError
from trtbuild.linking import place_tree
from trtbuild.manifest import (
    MANIFEST,
    DigestCache,
    FileEntry,
    canonical_json,
    compare_tree,
    digest_entries,
    entries_from_json,
    entries_json,
    read_json,
    write_atomic,
)
from trtbuild.store import Artifact, remove_tree
from trtbuild.trtllm_build import BUILT, DRAFT

SCHEMA_VERSION = 1
RECIPE, LOCK = "recipe.yaml", "plan.lock.json"
# What the package digest stands for; evidence holds times and lies outside it, and so does a built engine.
DIGESTED = ("engine", "model_repository", "deploy")
# What engine/build.sh adds to a package for TensorRT engines: the engine, and the place where it is built. An engine
# that the build itself put there is listed in the manifest like evidence: two builds of one differ in bytes.
PLACE, DRAFT_PLACE = f"engine/{BUILT}", f"engine/{DRAFT}/{BUILT}"
PLACES = (PLACE, DRAFT_PLACE)
_ADDED = (*PLACES, *(f"{place}.work" for place in PLACES))
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that goes into a package: artifacts by directory name, and small files by relative path."""

    artifacts: Mapping[str, Artifact]
    texts: Mapping[str, str]

    def entries(self) -> tuple[FileEntry, ...]:
        """Every file of the package: the artifacts were verified when they were found, so nothing is read again."""
        files = [
            FileEntry(path=f"{name}/{entry.path}", size=entry.size, sha256=entry.sha256)
            for name, artifact in self.artifacts.items()
            for entry in artifact.files
        ]
        for path, text in self.texts.items():
            data = text.encode("utf-8")
            files.append(FileEntry(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest()))
        return tuple(sorted(files))


def refuse_foreign(out: Path) -> None:
    """Refuse an output directory that holds something other than a package and its own files.

    Raises:
        RecipeError: so that nothing of the user's is ever replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not _is_package(out):
        message = f"{out} exists and is no trtbuild package"
        raise RecipeError([Problem("-o", message, "name a new directory, or move that one away")])
    listed = {entry["path"] for entry in read_manifest(out)["files"]} | {MANIFEST}
    there = (path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir())
    # Byte code that another server left is nobody's work.
    added = sorted(path for path in there if path not in listed | added_by_script(out) and "__pycache__" not in path)
    if added:
        message = f"{out} holds {added[0]}, which is no part of the package there"
        raise RecipeError([Problem("-o", message, "move it away, or name a new directory")])


def assemble(out: Path, parts: Parts, digests: DigestCache, saved: Callable[[str], bool]) -> tuple[str, str]:
    """Write the package to `out`; returns its digest and ``built`` or ``reused``.

    An older package there is replaced in one exchange: a reader sees the old one or the new one, whole. Call under a
    lock of this output directory; what a killed build left beside it is removed.

    Args:
        out: the package's directory.
        parts: everything that goes into it.
        digests: what is known of files.
        saved: see `refuse_loss`.

    Raises:
        RecipeError: something in `out` would be lost.
    """
    staging = out.parent / f".{out.name}.trtbuild"
    remove_tree(staging)
    manifest = _manifest(parts.entries())
    if _is_package(out) and read_manifest(out) == manifest and not damage(out, digests):
        return manifest["digest"], "reused"
    refuse_loss(out, saved)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        for name, artifact in parts.artifacts.items():
            place_tree(artifact.content, staging / name)
            for entry in artifact.files:
                digests.relearn(staging / name / entry.path, entry.sha256)
        for path, text in parts.texts.items():
            (staging / path).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(staging / path, text)
        write_atomic(staging / MANIFEST, canonical_json(manifest))
        refuse_foreign(out)  # again: hours may have passed since the build began
        _put_in_place(staging, out)
    finally:
        remove_tree(staging)
    return manifest["digest"], "built"


def refuse_loss(out: Path, saved: Callable[[str], bool]) -> None:
    """Refuse to replace a package that holds hours of a GPU which are kept nowhere else.

    Args:
        out: the package.
        saved: whether the engine of this key needs no keeping.

    Raises:
        RecipeError: engine/build.sh runs there, or has left an engine or a part of one.
    """
    for place in PLACES:
        script, work = f"{place.rpartition('/')[0]}/build.sh", f"{place}.work"
        if _is_running(out / work):
            message = f"{script} builds an engine in {out} right now, and the package would be replaced by another"
            raise RecipeError([Problem("-o", message, "wait for it, or name a new directory")])
        for name, key in ((place, _record_key(out / place)), (work, _work_key(out / work))):
            if (out / name).exists() and not saved(key):
                message = f"{out} holds {name}, which {script} made, and the package would be replaced by another"
                raise RecipeError([Problem("-o", message, "name a new directory, or move that one away")])


def _is_running(work: Path) -> bool:
    """Whether the script holds its lock (flock(2), which dies with it)."""
    try:
        with (work / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _record_key(built: Path) -> str:
    try:
        return str(read_json(built / "trtbuild.json")["key"])
    except (ArtifactError, KeyError, TypeError):
        return ""


def _work_key(work: Path) -> str:
    """The key of the engine that was begun there; the image stands behind it."""
    try:
        return (work / "key").read_text(encoding="utf-8").partition(" ")[0]
    except (OSError, UnicodeDecodeError):
        return ""


def read_manifest(package: Path) -> dict[str, Any]:
    """The manifest of a package.

    Raises:
        RecipeError: there is no such directory.
        ArtifactError: `package` is no package, or the manifest is damaged.
    """
    if not package.is_dir():
        found = "is no directory" if package.exists() else "does not exist"
        raise RecipeError([Problem("PACKAGE", f"{package} {found}", "name a package that `trtbuild build` made")])
    manifest = read_json(package / MANIFEST) if (package / MANIFEST).is_file() else None
    if not isinstance(manifest, dict) or manifest.get("kind") != "package" or "files" not in manifest:
        raise ArtifactError(f"{package} is no trtbuild package", "name a package that `trtbuild build` made")
    return manifest


def entries_below(manifest: Mapping[str, Any], directory: str) -> list[FileEntry]:
    """What a package's manifest lists below one directory, with paths from there."""
    prefix = f"{directory}/"
    return [
        FileEntry(path=entry.path.removeprefix(prefix), size=entry.size, sha256=entry.sha256)
        for entry in entries_from_json(manifest["files"])
        if entry.path.startswith(prefix)
    ]


def added_by_script(package: Path) -> frozenset[str]:
    """The files that engine/build.sh has added to a package for TensorRT engines, relative to it."""
    if not (package / "engine" / "build.sh").is_file():
        return frozenset()
    files = (path for name in _ADDED for path in (package / name).rglob("*") if not path.is_dir())
    return frozenset(path.relative_to(package).as_posix() for path in files)


def is_for_engines(directory: Path) -> bool:
    """Whether an engine directory says that it is for TensorRT engines; one that cannot be read says nothing."""
    try:
        described = read_json(directory / "engine.json")
    except ArtifactError:
        return False
    return isinstance(described, dict) and described.get("runtime") == "trtllm-engine"


def refuse_to_serve_here(package: Path) -> None:
    """Refuse a package whose runtime trtbuild does not start itself.

    Raises:
        HostError: it is for TensorRT engines, which run in their container.
    """
    if is_for_engines(package / "engine"):
        engine = read_json(package / "engine" / "engine.json")
        first = "" if (package / PLACE).is_dir() else "engine/build.sh, then "
        image, start = engine.get("image"), "deploy/launch.sh"
        if image is None:  # and then there are no deployment files either
            image, start = f"a Triton container with TensorRT-LLM {engine.get('version')}", "its tritonserver"
        raise HostError(
            f"{package} is for a TensorRT engine, which is built and served in {image}",
            f"there, run {first}{start} with the package at /package",
        )


def damage(package: Path, digests: DigestCache) -> list[str]:
    """What differs between a package and its manifest; empty when every byte is as recorded."""
    manifest = read_manifest(package)
    entries = entries_from_json(manifest["files"])
    problems = compare_tree(package, entries, digests, skip=(MANIFEST, *added_by_script(package)))
    if _package_digest(entries) != manifest["digest"]:
        problems.append("the package digest does not match the list of files")
    return problems


def _manifest(entries: tuple[FileEntry, ...]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "package",
        "trtbuild": __version__,
        "digest": _package_digest(entries),
        "files": entries_json(entries),
    }


def _package_digest(entries: tuple[FileEntry, ...]) -> str:
    return digest_entries(entry for entry in entries if entry.path.split("/", 1)[0] in DIGESTED and not _built(entry))


def _built(entry: FileEntry) -> bool:
    return any(entry.path.startswith(f"{place}/") for place in PLACES)


def _is_package(path: Path) -> bool:
    try:
        return bool(read_manifest(path))
    except (ArtifactError, RecipeError):
        return False


def _put_in_place(staging: Path, out: Path) -> None:
    if out.exists():
        _exchange(staging, out)
    else:
        staging.rename(out)


def _exchange(first: Path, second: Path) -> None:
    """Swap two directories in one step (renameat2(2)), or by way of a third name where the kernel cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    swap = getattr(libc, "renameat2", None)
    arguments = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if swap is not None and swap(*arguments) == 0:
        return
    aside = second.with_name(f".{second.name}.old-{os.getpid()}")
    second.rename(aside)
    first.rename(second)
    shutil.rmtree(aside)
