"""Tensors of a draft's own files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from trtbuild.errors import ArtifactError

_REBUILD = "build the package again, or train the draft again"


def read_tensors(directory: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of the safetensors files in `directory` whose names begin with `prefix`, without it.

    Where none does, every tensor: the files are the draft's alone.

    Raises:
        ArtifactError: there is none, or a file is damaged.
    """
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - no mapping
                found.update({name.removeprefix(prefix): file.get_tensor(name) for name in names})
        except Exception as error:
            raise ArtifactError(f"{path}: cannot be read ({error})", _REBUILD) from error
    if not found and prefix:
        return read_tensors(directory)
    if not found:
        raise ArtifactError(f"{directory}: holds no safetensors file", _REBUILD)
    return found


class Taker:
    """Takes tensors by name, with the shapes that they must have, on a device and in a type."""

    def __init__(self, directory: Path, tensors: dict[str, torch.Tensor], like: torch.Tensor) -> None:
        self._directory, self._tensors, self._like = directory, tensors, like

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor `name`.

        Raises:
            ArtifactError: it is missing or of another shape.
        """
        tensor = self._tensors.get(name)
        if tensor is None or tuple(tensor.shape) != shape:
            found = "missing" if tensor is None else f"{list(tensor.shape)}"
            raise ArtifactError(f"{self._directory}: {name} is {found}, and {list(shape)} is needed", _REBUILD)
        return tensor.to(self._like.device, self._like.dtype if tensor.is_floating_point() else None)
