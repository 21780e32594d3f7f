"""The Hugging Face hub: resolve a revision, list a repository, read pieces of its files.

The token comes from the environment variable HF_TOKEN alone, never from a file; HF_ENDPOINT names another hub. The
library's own errors become sentences that name the repository and the remedy. Downloads are in `hub_download`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import httpx
from huggingface_hub import HfApi, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from trtbuild.adapters.hub_download import Download, Progress, download_all
from trtbuild.errors import ArtifactError, HostError, Problem, RecipeError, ToolError, TrtbuildError

TIMEOUT = httpx.Timeout(10.0, read=30.0)

# Other forms of the same weights, often many times the checkpoint: never fetched unless asked for by name.
_OTHER_WEIGHTS = frozenset(
    {".bin", ".ckpt", ".gguf", ".h5", ".mlmodel", ".msgpack", ".onnx", ".onnx_data", ".ot", ".pt", ".pth", ".tflite"}
)
_CACHED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file as the hub lists it; `digest` is ``sha256:...`` of an LFS file, ``blob:...`` (git's SHA-1) of others."""

    name: str
    size: int
    digest: str


def resolve(repo_id: str, revision: str | None = None) -> str:
    """The commit that a branch, tag or commit of a repository means now; the default branch without one.

    Raises:
        RecipeError: the hub knows no such repository or revision, or refuses access.
        HostError: the hub cannot be reached.
        ToolError: the hub answered with an error of its own.
    """
    with _sentences(repo_id, revision):
        info = _api().model_info(repo_id, revision=revision, timeout=TIMEOUT.read)
    if not info.sha:
        raise ToolError(f"{_api().endpoint} names no commit for {repo_id}", "check HF_ENDPOINT")
    return str(info.sha)


@dataclass(frozen=True, slots=True)
class HubFiles:
    """The files of one repository at one commit, read over HTTP; see `trtbuild.checkpoint_files.CheckpointFiles`.

    Every method raises what `resolve` raises, and ArtifactError for a file that is not there.
    """

    repo_id: str
    commit: str
    _listing: dict[str, HubFile] = field(default_factory=dict, repr=False, compare=False)
    _read: dict[tuple[str, int, int | None], bytes] = field(default_factory=dict, repr=False, compare=False)

    @property
    def where(self) -> str:
        """The repository and its commit."""
        return f"{self.repo_id}@{self.commit[:12]}"

    def files(self) -> Mapping[str, HubFile]:
        """Every file of the repository by name; asks the hub once."""
        if not self._listing:
            with _sentences(self.repo_id, self.commit):
                info = _api().model_info(self.repo_id, revision=self.commit, files_metadata=True, timeout=TIMEOUT.read)
            self._listing.update({entry.rfilename: _hub_file(self.repo_id, entry) for entry in info.siblings or ()})
        return self._listing

    def names_and_sizes(self) -> dict[str, int]:
        """Every file's relative path (forward slashes) and size in bytes."""
        return {name: file.size for name, file in self.files().items()}

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """`length` bytes of a file from `start`; to the end without a length."""
        key = (name, start, length)
        if key not in self._read:
            content = self._fetch(name, start, length)
            if len(content) > _CACHED_BYTES:
                return content
            self._read[key] = content
        return self._read[key]

    def _fetch(self, name: str, start: int, length: int | None) -> bytes:
        size = self.files()[name].size if name in self.files() else None
        if size is None:
            raise ArtifactError(f"{self.where} has no file {name}", "give a repository with a complete checkpoint")
        end = size if length is None else min(size, start + length)
        if start >= end:
            return b""
        headers = request_headers() | {"Range": f"bytes={start}-{end - 1}"}
        with (
            _sentences(self.repo_id, self.commit),
            get_session().stream("GET", file_url(self, name), headers=headers, timeout=TIMEOUT) as response,
        ):
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            # A server may ignore the range and send the whole file: then skip, and stop reading early.
            skip = 0 if response.status_code == 206 else start
            content = _take(response.iter_raw(), skip + end - start)[skip:]
        if len(content) != end - start:
            raise HostError(
                f"{name} of {self.where} broke off after {len(content)} of {end - start} bytes", "try again"
            )
        return content


def fetch(
    repo_id: str, commit: str, dest: os.PathLike[str] | str, *, progress: Progress, names: list[str] | None = None
) -> None:
    """Download a checkpoint into `dest`; what an earlier, interrupted call left is completed, not repeated.

    Args:
        repo_id: the repository.
        commit: a commit as `resolve` gives it.
        dest: the directory to fill; partial files wait in a hidden directory beside it.
        progress: called with (bytes done, bytes in all, what).
        names: the files wanted; by default all but weights in other formats.

    Raises:
        ArtifactError: a file is not in the repository, or arrives with other bytes than the hub lists.
        HostError: the hub cannot be reached, or the disk is full.
        RecipeError, ToolError: as `resolve`.
    """
    files = HubFiles(repo_id, commit)
    listed = files.files()
    wanted = [name for name in listed if not _is_other_weights(name)] if names is None else list(names)
    missing = [name for name in wanted if name not in listed]
    if missing:
        raise ArtifactError(f"{files.where} has no file {missing[0]}", "make the plan again")
    downloads = [
        Download(name=name, size=listed[name].size, digest=listed[name].digest, url=file_url(files, name))
        for name in sorted(wanted)
    ]
    with _sentences(repo_id, commit):
        download_all(downloads, dest, request_headers(), where=files.where, progress=progress)


def file_url(files: HubFiles, name: str) -> str:
    """Where one file is downloaded."""
    return str(hf_hub_url(files.repo_id, name, revision=files.commit, endpoint=_api().endpoint))


def request_headers() -> dict[str, str]:
    """The headers of every request; holds the token, so it is never logged or kept."""
    headers = {"User-Agent": "trtbuild", "Accept-Encoding": "identity"}  # ranges and sizes are those of the file itself
    return headers | ({"Authorization": f"Bearer {_token()}"} if _token() else {})


def _api() -> HfApi:
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=_token() or False, library_name="trtbuild")


def _token() -> str:
    return os.environ.get("HF_TOKEN", "").strip()


def _hub_file(repo_id: str, entry: Any) -> HubFile:
    name = str(entry.rfilename)
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ArtifactError(f"{repo_id} lists a file with an unsafe name: {name!r}", "do not use this repository")
    if entry.size is None:
        raise ToolError(f"the hub does not say how long {name} of {repo_id} is", "check HF_ENDPOINT")
    digest = f"sha256:{entry.lfs.sha256}" if entry.lfs is not None else f"blob:{entry.blob_id}"
    return HubFile(name=name, size=int(entry.size), digest=digest)


def _is_other_weights(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in _OTHER_WEIGHTS


def _take(chunks: Iterator[bytes], count: int) -> bytes:
    content = bytearray()
    for chunk in chunks:
        content += chunk
        if len(content) >= count:
            break
    return bytes(content[:count])


@contextmanager
def _sentences(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn the library's errors into ours."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        hint = "unset HF_HUB_OFFLINE, or give a local directory in model.path"
        raise HostError(f"{repo_id} is on the hub, and HF_HUB_OFFLINE forbids to ask it", hint) from error
    except HFValidationError as error:
        problem = Problem(
            "model.path", f"{repo_id!r} is no repository name", "give a directory or a name such as org/name"
        )
        raise RecipeError([problem]) from error
    except HfHubHTTPError as error:
        raise _refusal(error, repo_id, revision) from error
    except httpx.TransportError as error:
        reason = str(error) or type(error).__name__
        hint = "check the network and HF_ENDPOINT, or give a local directory in model.path"
        raise HostError(f"{_api().endpoint} cannot be reached: {reason}", hint) from error
    except ValueError as error:  # the answer is not JSON
        raise ToolError(f"{_api().endpoint} does not answer like a hub: {error}", "check HF_ENDPOINT") from error


def _refusal(error: HfHubHTTPError, repo_id: str, revision: str | None) -> TrtbuildError:
    status = error.response.status_code
    endpoint = _api().endpoint
    if isinstance(error, RevisionNotFoundError):
        message = f"{repo_id} has no revision {revision!r}"
        return RecipeError([Problem("model.revision", message, "give a branch, a tag or a full commit")])
    if isinstance(error, RemoteEntryNotFoundError):
        return ArtifactError(f"a file that {repo_id} lists is not there", "try again later")
    if isinstance(error, GatedRepoError) or status == 403:
        hint = "ask for access on the repository's page and set HF_TOKEN to a token that may read it"
        return RecipeError([Problem("model.path", f"access to {repo_id} is restricted ({_token_state()})", hint)])
    if isinstance(error, RepositoryNotFoundError) or status in {401, 404}:
        message = f"{endpoint} shows no repository {repo_id} ({_token_state()})"
        hint = "check the name; for a private repository set HF_TOKEN to a token that may read it"
        return RecipeError([Problem("model.path", message, hint)])
    if status == 429:
        return HostError(f"{endpoint} limits the number of requests", "try again later, or set HF_TOKEN")
    return ToolError(f"{endpoint} answered {status} for {repo_id}", "try again later")


def _token_state() -> str:
    return "HF_TOKEN is set" if _token() else "HF_TOKEN is not set"
