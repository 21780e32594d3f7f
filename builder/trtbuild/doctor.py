"""`trtbuild doctor`: what this host has, compared with what each part of trtbuild needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from trtbuild.errors import TrtbuildError
from trtbuild.init_recipe import human_bytes
from trtbuild.paths import cache_dir
from trtbuild.serving.installation import find_triton
from trtbuild.toolchain import version_of

# The ranges that pyproject.toml declares; a test compares the two.
REQUIRED = {
    "torch": ">=2.11",
    "transformers": ">=5.14,<5.18",
    "nvidia-modelopt": ">=0.47,<0.48",
    "safetensors": ">=0.6",
    "accelerate": ">=1.10",
}
_PYTHON = SpecifierSet(">=3.11,<3.13")
_MIN_FREE_BYTES = 5 << 30
_MIN_SHM_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: status is ``ok``, ``missing`` (something cannot be done here) or ``note``."""

    name: str
    status: str
    detail: str


def examine() -> list[Finding]:
    """Every check, in the order in which a user would mend things."""
    checks: list[Callable[[], Finding]] = [
        _python,
        *_libraries(),
        _numpy,
        _triton,
        _gpu,
        _disk,
        _shared_memory,
        _container,
    ]
    return [check() for check in checks]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    fits = Version(version) in _PYTHON
    return Finding("python", "ok" if fits else "missing", version if fits else f"{version}; trtbuild needs {_PYTHON}")


def _libraries() -> list[Callable[[], Finding]]:
    def check(name: str, wanted: str) -> Callable[[], Finding]:
        return lambda: _library(name, wanted)

    return [check(name, wanted) for name, wanted in REQUIRED.items()]


def _library(name: str, wanted: str) -> Finding:
    version = version_of(name)
    if version is None:
        return Finding(name, "missing", f"needed by build ({wanted}); install torch first, then trtbuild[build]")
    if not SpecifierSet(wanted, prereleases=True).contains(version):
        return Finding(name, "missing", f"{version} is outside {wanted}")
    return Finding(name, "ok", version)


def _numpy() -> Finding:
    version = version_of("numpy")
    if version is None:
        return Finding("numpy", "missing", "needed by build and serve")
    if Version(version) >= Version("2"):
        return Finding(
            "numpy", "missing", f"{version}; serve needs numpy < 2 (Triton's python stub breaks strings with 2)"
        )
    return Finding("numpy", "ok", version)


def _triton() -> Finding:
    try:
        found = find_triton()
    except TrtbuildError as error:
        return Finding("triton server", "missing", str(error))
    return Finding("triton server", "ok", f"nvidia-pytriton {found.version}")


def _gpu() -> Finding:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Finding("gpu", "note", "no NVIDIA driver; the embedded engine runs on the CPU")
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("gpu", "note", f"nvidia-smi does not answer ({error})")
    return Finding("gpu", "ok", "; ".join(answer.stdout.strip().splitlines()))


def _disk() -> Finding:
    place = cache_dir()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    enough = free >= _MIN_FREE_BYTES and os.access(place, os.W_OK)
    return Finding("store", "ok" if enough else "missing", f"{human_bytes(free)} free in {cache_dir()}")


def _shared_memory() -> Finding:
    place = Path("/dev/shm")  # noqa: S108 -- Triton's python backend talks to its models through it
    if not place.is_dir():
        return Finding("shared memory", "missing", "no /dev/shm; Triton's python backend needs it")
    free = shutil.disk_usage(place).free
    enough = free >= _MIN_SHM_BYTES
    return Finding("shared memory", "ok" if enough else "missing", f"{human_bytes(free)} free in {place}")


def _container() -> Finding:
    tools = [name for name in ("docker", "podman", "enroot", "srun", "buildah") if shutil.which(name)]
    why = "none; only building images and TensorRT engines needs one"
    return Finding("container tool", "ok" if tools else "note", f"{', '.join(tools)} on PATH" if tools else why)
