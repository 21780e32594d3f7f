"""Download files so that nothing already here is asked for twice, and nothing unfinished looks finished.

The hub library deletes an interrupted download (huggingface_hub/file_download.py, `_download_to_tmp_and_move`
@1.33.0), so this is our own: bytes are appended to a partial file in a directory beside the target, the next call
asks for the rest with an HTTP range, and the whole file is checked against the hub's digest before it is moved.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from filelock import FileLock
from huggingface_hub import get_session, hf_raise_for_status

from trtbuild.errors import ArtifactError, HostError

Progress = Callable[[int, int, str], None]

_CHUNK_BYTES = 1 << 20
_ATTEMPTS = 5  # in a row without a new byte
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 60.0
_RETRIED = frozenset({408, 429, 500, 502, 503, 504})
_TIMEOUT = httpx.Timeout(10.0, read=60.0)


@dataclass(frozen=True, slots=True)
class Download:
    """One file to have: `digest` is ``sha256:<hex>`` of its bytes or ``blob:<hex>`` as git computes it."""

    name: str
    size: int
    digest: str
    url: str


class _TransferError(Exception):
    """A transfer ended early; `wait_s` is how long the server asks to wait."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


def download_all(
    downloads: Sequence[Download],
    dest: os.PathLike[str] | str,
    headers: Mapping[str, str],
    *,
    where: str,
    progress: Progress,
) -> None:
    """Have every file in `dest`; one process at a time, others wait and then find the work done.

    Raises:
        ArtifactError: a file arrives with other bytes than its digest says.
        HostError: the transfer keeps breaking off, or the disk is full.
        HfHubHTTPError: the hub refuses.
    """
    target = Path(dest)
    partials = target.parent / f".{target.name}.partial"
    try:
        target.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock"):
            partials.mkdir(exist_ok=True)
            _check_space(downloads, target, partials)
            _download_missing(downloads, target, partials, headers, where=where, progress=progress)
            shutil.rmtree(partials)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            hint = "free some space, or move the store to a larger disk, and start again: what is here is kept"
            raise HostError(f"the disk of {target} is full", hint) from error
        raise


def _download_missing(
    downloads: Sequence[Download],
    target: Path,
    partials: Path,
    headers: Mapping[str, str],
    *,
    where: str,
    progress: Progress,
) -> None:
    total = sum(download.size for download in downloads)
    done = 0
    progress(0, total, "bytes fetched")
    for download in downloads:
        path = target / download.name
        if not _is_there(path, download):
            partial = partials / hashlib.sha256(f"{download.digest} {download.name}".encode()).hexdigest()[:32]
            _complete(download, partial, headers, where, _progress_from(progress, done, total))
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(path)
        done += download.size
        progress(done, total, "bytes fetched")


def _progress_from(progress: Progress, done: int, total: int) -> Callable[[int], None]:
    """Progress of one file, counted on top of the files before it."""
    return lambda size: progress(done + size, total, "bytes fetched")


def _is_there(path: Path, download: Download) -> bool:
    # Only a complete and checked file is ever renamed to its name, so its size is enough.
    return path.is_file() and path.stat().st_size == download.size


def _check_space(downloads: Sequence[Download], target: Path, partials: Path) -> None:
    missing = sum(download.size for download in downloads if not _is_there(target / download.name, download))
    here = sum(path.stat().st_size for path in partials.iterdir())
    free = shutil.disk_usage(target).free
    if missing - here > free:
        hint = "free some space, or move the store to a larger disk"
        raise HostError(f"{target} needs {missing - here:,} more bytes and its disk has {free:,} free", hint)


def _complete(
    download: Download, partial: Path, headers: Mapping[str, str], where: str, on_size: Callable[[int], None]
) -> None:
    """Bring the partial file to its full, checked length."""
    for fresh in (False, True):
        if fresh:
            partial.unlink()
        _transfer(download, partial, headers, where, on_size)
        if _digest(partial, download) == download.digest:
            return
        # The partial may stem from a broken earlier run: start this file over once.
    partial.unlink()
    what = f"{download.name} of {where} does not have the digest that the hub lists"
    raise ArtifactError(what, "try again; if it happens again, something between here and the hub changes the bytes")


def _transfer(
    download: Download, partial: Path, headers: Mapping[str, str], where: str, on_size: Callable[[int], None]
) -> None:
    failures, wait_s = 0, _FIRST_WAIT_S
    partial.touch()
    while (size := partial.stat().st_size) != download.size:
        try:
            _append(download, partial, headers, size, on_size)
            reason, asked = "it ended early", None
        except _TransferError as error:
            reason, asked = str(error), error.wait_s
        grown = partial.stat().st_size
        if grown == download.size:
            return
        failures, wait_s = (1, _FIRST_WAIT_S) if grown > size else (failures + 1, wait_s * 2)
        if failures >= _ATTEMPTS:
            what = f"{download.name} of {where} broke off at {grown:,} of {download.size:,} bytes: {reason}"
            raise HostError(what, "start again: the download goes on from there")
        time.sleep(min(wait_s if asked is None else asked, _LONGEST_WAIT_S))


def _append(
    download: Download, partial: Path, headers: Mapping[str, str], size: int, on_size: Callable[[int], None]
) -> None:
    """Ask for the rest of a file once and append what comes."""
    if size > download.size:
        partial.write_bytes(b"")
        size = 0
    asked = dict(headers) | ({"Range": f"bytes={size}-"} if size else {})
    try:
        with get_session().stream("GET", download.url, headers=asked, timeout=_TIMEOUT) as response:
            _check_status(response, partial)
            if size and not response.headers.get("Content-Range", "").startswith(f"bytes {size}-"):
                size = 0  # the server ignored the range and sends the whole file
            with partial.open("r+b") as file:
                file.truncate(size)
                file.seek(size)
                for chunk in response.iter_raw():  # as they come: a chunk size would hold back bytes that a break loses
                    file.write(chunk)
                    size += len(chunk)
                    on_size(min(size, download.size))
                file.flush()
                os.fsync(file.fileno())
    except httpx.TransportError as error:
        raise _TransferError(str(error) or type(error).__name__) from error


def _check_status(response: httpx.Response, partial: Path) -> None:
    if response.status_code < 400:
        return
    response.read()
    if response.status_code == 416:  # the partial file does not fit this file: start it over
        partial.write_bytes(b"")
        raise _TransferError("the server refuses the range")
    if response.status_code in _RETRIED:
        asked = response.headers.get("Retry-After", "")
        raise _TransferError(f"the server answered {response.status_code}", float(asked) if asked.isdigit() else None)
    hf_raise_for_status(response)


def _digest(path: Path, download: Download) -> str:
    """The file's digest in the form of `download.digest`; git hashes the length before the bytes."""
    kind = download.digest.partition(":")[0]
    digest = (
        hashlib.sha256()
        if kind == "sha256"
        else hashlib.sha1(f"blob {download.size}\0".encode(), usedforsecurity=False)
    )
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return f"{kind}:{digest.hexdigest()}"
