"""What `verify` looks at in the deployment files of a package: are they those of its plan?"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml.error import YAMLError

from trtbuild.adapters.container import LABEL_PREFIX, DeploySpec, default_serve_image, image_labels
from trtbuild.yaml_text import parse_yaml

_FILES = {"dockerfile": ("Dockerfile", "OCI.md"), "compose": ("compose.yaml",), "launch": ("launch.sh",)}
_BASE = re.compile(r"^ARG (?:BASE|SERVE)_IMAGE=(.*)$", re.MULTILINE)
_LABEL = re.compile(r"^LABEL (.*)$", re.MULTILINE)
# What the scripts of TensorRT-LLM's runtimes hold the loaded engine against.
_RANKS = re.compile(r"""^\[ "\$found" = (["'])([\d ]+)\1 \]""", re.MULTILINE)
_AGAIN = "build the package again"


@dataclass(frozen=True, slots=True)
class Ranks:
    """The parallel sizes of a plan: `sizes` as the launch script states them, `world_size` as ``engine.json`` does."""

    sizes: tuple[int, ...]
    world_size: int


def check(directory: Path, spec: DeploySpec, ranks: Ranks | None) -> tuple[list[str], str]:
    """Every fault of the deployment files, and what they are.

    Args:
        directory: the package's ``deploy``.
        spec: what the plan says that they are made from.
        ranks: for runtimes of TensorRT-LLM, what their launch script must check.

    Raises:
        OSError, ValueError, KeyError, TypeError: a file cannot be read.
    """
    wanted = sorted(name for kind in spec.files for name in _FILES[kind])
    there = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    problems = [f"deploy/{name} is missing; {_AGAIN}" for name in wanted if name not in there]
    problems += [f"deploy/{name} is none of the plan's; remove it" for name in there if name not in wanted]
    looks = {"Dockerfile": _dockerfile, "compose.yaml": _compose, "launch.sh": _launch}
    for name, look in looks.items():
        if name in wanted and name in there:
            problems += [f"deploy/{name}: {fault}; {_AGAIN}" for fault in look(directory / name, spec, ranks)]
    shown = [", ".join(wanted) or "none, as the plan says", *([_image(spec)] if wanted else [])]
    if ranks is not None:
        shown.append(f"world size {ranks.world_size}")
    return problems, "; ".join(shown)


def _image(spec: DeploySpec) -> str:
    return spec.serve_image or default_serve_image(spec)


def _dockerfile(path: Path, spec: DeploySpec, _: Ranks | None) -> list[str]:
    """The image that it starts from, and the labels that say where the image comes from."""
    text = path.read_text(encoding="utf-8")
    base = _BASE.findall(text)
    faults = [] if base == [_image(spec)] else [f"starts from {', '.join(base)}, and the plan says {_image(spec)}"]
    pairs = (shlex.split(line)[0].partition("=") for line in _LABEL.findall(text))
    found = {key: value for key, _, value in pairs}
    wanted = {key: value for key, value in image_labels(spec).items() if key.startswith(LABEL_PREFIX)}
    return faults + [
        f"label {key} is {found.get(key)!r}, and the package says {value!r}"
        for key, value in wanted.items()
        if found.get(key) != value
    ]


def _compose(path: Path, spec: DeploySpec, _: Ranks | None) -> list[str]:
    """The image, the GPUs and the shared memory."""
    try:
        service: Mapping[str, Any] = parse_yaml(path.read_text(encoding="utf-8"))["services"]["triton"]
    except YAMLError as error:
        return [f"cannot be read ({error})"]
    reserved = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    found = {
        "image": service.get("image"),
        "GPUs": sum(device.get("count", 0) for device in reserved),
        "shm_size": service.get("shm_size"),
    }
    wanted = {"image": spec.image, "GPUs": spec.gpus, "shm_size": spec.shm_size}
    return [
        f"{name} is {found[name]!r}, and the plan says {value!r}"
        for name, value in wanted.items()
        if found[name] != value
    ]


def _launch(path: Path, spec: DeploySpec, ranks: Ranks | None) -> list[str]:
    """That it can be started, in which container it runs, and for how many ranks."""
    faults = [] if os.access(path, os.X_OK) else ["is not executable"]
    if ranks is None:
        return faults
    text = path.read_text(encoding="utf-8")
    if spec.serve_image not in text:
        faults.append(f"names another container than the plan's {spec.serve_image}")
    found = [tuple(map(int, match[1].split())) for match in _RANKS.findall(text)]
    if found != [ranks.sizes]:
        shown = " and ".join(" ".join(map(str, sizes)) for sizes in found) or "none"
        faults.append(f"checks the parallel sizes {shown}, and the plan says {' '.join(map(str, ranks.sizes))}")
    return faults
