"""TensorRT-LLM's releases: from a version or a container tag to its line, its flows and its argument schema.

Pure look-ups in ``_compat/containers.toml`` and ``_compat/lines.toml``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from packaging.version import InvalidVersion, Version

from trtbuild.compat import facts
from trtbuild.errors import Problem
from trtbuild.llm_schema import schema_header

Flow = Literal["engine", "llm-api"]
_TAG = re.compile(r"(?:(?:nvcr\.io/)?nvidia/tritonserver:)?(\d{2}\.\d{2})(?:-trtllm-python-py3)?")
_SUFFIX = "-trtllm-python-py3"
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Container:
    """One Triton image with TensorRT-LLM; a cell that no source has is None.

    `transformers` and `modelopt` are what the wheel of the release requires, for example ``==4.57.3``.
    """

    tag: str
    tensorrt_llm: str
    tensorrt: str | None = None
    cuda: str | None = None
    driver: str | None = None
    torch: str | None = None
    python: str | None = None
    transformers: str | None = None
    modelopt: str | None = None

    @property
    def image(self) -> str:
        """The image's full name."""
        return f"nvcr.io/nvidia/tritonserver:{self.tag}{_SUFFIX}"


@dataclass(frozen=True, slots=True)
class OlderBackend:
    """What the backend of an older line calls otherwise than the newest (inputs by the newest name), and lacks."""

    renamed_inputs: Mapping[str, str]
    absent_tensors: tuple[str, ...]
    absent_parameters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """One release line: versions from `first` to `last`; `base` is what its release notes name.

    `older` is set where its backend is not like the newest; `unread` says what of a package of its engines rests on
    other releases' files.
    """

    name: str
    first: str
    last: str
    flows: tuple[Flow, ...]
    schema: str | None
    older: OlderBackend | None
    unread: str | None
    base: Mapping[str, str]

    def holds(self, version: Version) -> bool:
        """Whether `version` belongs to this line."""
        return Version(self.first) <= version <= Version(self.last)

    def has(self, version: str) -> bool:
        """Whether the version that `version` spells belongs to this line."""
        return self.holds(Version(version))


@dataclass(frozen=True, slots=True)
class Release:
    """One version of TensorRT-LLM as a recipe means it.

    Args:
        version: as TensorRT-LLM spells it.
        line: the line that decides its flows and schema.
        container: the newest image that has it, or the one the recipe named; None where no image has it.
        known: False for a version that is in no table and was taken on the user's word.
    """

    version: str
    line: Line
    container: Container | None
    known: bool = True

    @property
    def proven(self) -> bool:
        """Whether the argument schema was read from exactly this release."""
        return self.line.schema is not None and schema_header(self.line.schema).release == self.version

    @property
    def schema_note(self) -> str:
        """What is known of the argument schema, as the plan says it."""
        if self.line.schema is None:
            return f"schema: none was read for {self.version}"
        commit = schema_header(self.line.schema).commit[:8]
        return f"schema: {commit}, " + ("" if self.proven else "not ") + f"proven identical to {self.version}"


@cache
def containers() -> tuple[Container, ...]:
    """Every known image, newest first."""
    data = facts("containers")
    required = {
        row["tensorrt_llm"]: {name: row[name] for name in ("transformers", "modelopt")} for row in data["requirement"]
    }
    return tuple(Container(**row, **required.get(row["tensorrt_llm"], {})) for row in data["container"])


@cache
def lines() -> tuple[Line, ...]:
    """Every release line, oldest first."""
    return tuple(_line(row) for row in facts("lines")["line"])


def _line(row: Mapping[str, Any]) -> Line:
    return Line(
        name=row["name"],
        first=row["first"],
        last=row["last"],
        flows=tuple(row["flows"]),
        schema=row.get("schema"),
        older=None if "renamed_inputs" not in row else _older(row),
        unread=row.get("unread"),
        base=row.get("base", {}),
    )


def _older(row: Mapping[str, Any]) -> OlderBackend:
    tensors, parameters = tuple(row["absent_tensors"]), tuple(row["absent_parameters"])
    return OlderBackend(row["renamed_inputs"], tensors, parameters)


def older_backend(name: str | None) -> OlderBackend | None:
    """The backend of the line of this name, where it is an older one."""
    return next((line.older for line in lines() if line.name == name), None)


@cache
def known_versions() -> tuple[str, ...]:
    """Every version of a container or of a release table, newest first."""
    found = {container.tensorrt_llm for container in containers()}
    found.update(version for row in facts("lines")["releases"] for version in row["versions"])
    return tuple(sorted(found, key=Version, reverse=True))


def newest(flow: Flow) -> Release:
    """The newest release with this flow that a container has."""
    return next(
        release for release in map(_of_container, containers()) if flow in release.line.flows and release.line.schema
    )


def newest_of_all() -> Release:
    """The newest known release, whether a container has it or not."""
    return _release(known_versions()[0])


def find_release(text: str | None, *, allow_unknown: bool = False, flow: Flow = "llm-api") -> Release | Problem:
    """The release that a recipe means by ``runtime.version``; without one, the newest that a container has.

    Args:
        text: a version such as 1.2.1, a container tag such as 26.07, or its whole image name.
        allow_unknown: take a version that no table has, if it falls into a known line.
        flow: the flow that decides the default.
    """
    if text is None:
        return newest(flow)
    tag = _TAG.fullmatch(text)
    if tag:
        return _tagged(tag[1])
    try:
        wanted = Version(text.removeprefix("v"))
    except InvalidVersion:
        hint = f"give a version such as {newest(flow).version} or a container tag such as {containers()[0].tag}"
        return Problem("runtime.version", f"{text!r} is neither a version of TensorRT-LLM nor a container tag", hint)
    for version in known_versions():
        if Version(version) == wanted:
            return _release(version)
    return _unknown(text.removeprefix("v"), wanted, allow_unknown=allow_unknown, flow=flow)


def _tagged(tag: str) -> Release | Problem:
    for container in containers():
        if container.tag == tag:
            return _of_container(container)
    near = sorted((one.tag for one in containers()), key=lambda known: abs(_month(known) - _month(tag)))[:_SHOWN]
    message = f"{tag}: there is no Triton image {tag}{_SUFFIX} in compatibility data"
    return Problem("runtime.version", message, f"near are {', '.join(sorted(near, reverse=True))}")


def _month(tag: str) -> int:
    """A tag, which is a year and a month, as a number of months."""
    year, month = tag.split(".")
    return 12 * int(year) + int(month)


def _unknown(text: str, wanted: Version, *, allow_unknown: bool, flow: Flow) -> Release | Problem:
    line = next((line for line in lines() if line.holds(wanted)), None)
    near = ", ".join(_nearest(wanted))
    if line is None:
        newest_line, first = lines()[-1], lines()[0].first
        if not (allow_unknown and wanted > Version(newest_line.last)):
            message = f"{text} is in no known release line ({first} to {newest_line.last})"
            return Problem("runtime.version", message, f"the nearest known versions are {near}")
        line = newest_line
    if not allow_unknown:
        hint = f"the nearest are {near}"
        if flow in line.flows:
            hint += "; or set runtime.allow_unknown_version: true"
        return Problem("runtime.version", f"{text} is no known release of TensorRT-LLM", hint)
    return Release(version=text, line=line, container=None, known=False)


def _nearest(wanted: Version) -> list[str]:
    """The known versions around `wanted`, at most one more than shown on the older side."""
    known = known_versions()
    place = next((index for index, version in enumerate(known) if Version(version) < wanted), len(known))
    begin = max(0, min(place - 1, len(known) - _SHOWN))
    return list(known[begin : begin + _SHOWN])


def _release(version: str) -> Release:
    container = next((container for container in containers() if container.tensorrt_llm == version), None)
    return Release(version=version, line=line_of(version), container=container)


def _of_container(container: Container) -> Release:
    return Release(version=container.tensorrt_llm, line=line_of(container.tensorrt_llm), container=container)


def line_of(version: str) -> Line:
    """The release line that holds a version."""
    return next(line for line in lines() if line.has(version))
