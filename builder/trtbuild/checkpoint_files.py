"""A checkpoint's files, in a directory or (in `adapters.hub`) on a hub, read piece by piece."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from trtbuild.errors import Problem, RecipeError


class CheckpointFiles(Protocol):
    """A checkpoint's files wherever they lie: a directory or a hub."""

    @property
    def where(self) -> str:
        """What a message calls this place."""

    def names_and_sizes(self) -> Mapping[str, int]:
        """Every file's relative path (forward slashes) and size in bytes."""

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """`length` bytes of a file from `start`; to the end without a length."""


class LocalFiles:
    """A checkpoint in a directory; see `CheckpointFiles`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def where(self) -> str:
        """The directory."""
        return str(self.directory)

    def names_and_sizes(self) -> Mapping[str, int]:
        """Regular files at the top of the directory and, for remote code and chat templates, one level below."""
        found = [*self.directory.glob("*"), *self.directory.glob("*/*")]
        return {
            path.relative_to(self.directory).as_posix(): path.stat().st_size for path in sorted(found) if path.is_file()
        }

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """`length` bytes of a file from `start`."""
        with (self.directory / name).open("rb") as file:
            file.seek(start)
            return file.read() if length is None else file.read(length)


def open_directory(path: Path, *, at: str = "model.path") -> LocalFiles:
    """The files of a local checkpoint.

    Raises:
        RecipeError: `path` is missing, no directory, or empty.
    """
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise RecipeError(
            [
                Problem(
                    at,
                    f"{path} {found}",
                    "give a checkpoint directory with config.json and *.safetensors"
                    + (", or a hub id such as org/name" if at == "model.path" else ""),
                )
            ]
        )
    if not any(path.iterdir()):
        raise RecipeError([Problem(at, f"{path} is empty", "give a directory with config.json and *.safetensors")])
    return LocalFiles(path)
