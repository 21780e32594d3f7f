"""Versions of the tools that decide a step's bytes, read from package metadata without importing the tools."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from trtbuild import __version__
from trtbuild.errors import HostError
from trtbuild.render import data_dir

# Bump a revision when the same inputs, parameters and tools would give other bytes, and only then.
COMPRESS_REVISION = 4
COPY_REVISION = 2
ENGINE_REVISION = 2
CONVERT_REVISION = 1
EVALUATE_REVISION = 1
DRAFT_REVISION = 1
REPOSITORY_REVISION = 2
_LAYOUTS = ("llm", "ensemble")
DEPLOY_REVISION = 2

_TEXTS = Path(__file__).resolve().parent / "_text"
_HINT = "install torch first, alone, then `pip install 'trtbuild[build]'` (see README)"


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def tool_versions() -> dict[str, Mapping[str, str | None]]:
    """For each kind of step, what decides its bytes besides inputs and parameters."""
    libraries = {name: version_of(name) for name in ("torch", "transformers", "nvidia-modelopt", "safetensors")}
    plain = {name: libraries[name] for name in ("torch", "safetensors")}
    evaluate = {name: libraries[name] for name in ("torch", "transformers")}
    calibration = {"calibration_text": _digest_text("calibration.jsonl")}
    texts = calibration | {"heldout_text": _digest_text("heldout.jsonl")}  # the second may not repeat the first
    return {
        "compress": libraries | calibration | {"revision": str(COMPRESS_REVISION)},
        "copy": plain | {"revision": str(COPY_REVISION)},
        "draft": libraries | {"revision": str(DRAFT_REVISION)},
        "engine": {"revision": str(ENGINE_REVISION)},
        "convert": {
            "revision": str(CONVERT_REVISION),
            "files": _digest_shipped(data_dir("templates") / "trtllm_engine"),
        },
        "repository": {
            "revision": str(REPOSITORY_REVISION),
            # Both layouts share modules.
            "files": _digest_shipped(*(data_dir("templates") / name for name in _LAYOUTS), data_dir("model_repo")),
        },
        "deploy": {
            "revision": str(DEPLOY_REVISION),
            "files": _digest_shipped(data_dir("templates") / "deploy"),
            "trtbuild": __version__,  # a label of the image
        },
        "evaluate": evaluate | texts | {"revision": str(EVALUATE_REVISION)},
    }


def require(step: str, tools: Mapping[str, str | None]) -> None:
    """Refuse to start a step whose tools are not installed.

    Raises:
        HostError: naming every missing package.
    """
    missing = [name for name, version in tools.items() if version is None]
    if missing:
        raise HostError(f"the step {step} needs {', '.join(missing)}, not installed in this environment", _HINT)


def _digest_text(name: str) -> str:
    """A digest of one of the texts that ship with the package; they are well below 1 MiB."""
    return hashlib.sha256((_TEXTS / name).read_bytes()).hexdigest()[:16]


def _digest_shipped(*directories: Path) -> str:
    """One digest over the names and bytes of shipped files, without what Python leaves beside them."""
    digest = hashlib.sha256()
    for directory in directories:
        for path in sorted(directory.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{path.relative_to(directory).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:16]
