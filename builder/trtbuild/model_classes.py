"""The model classes that TensorRT-LLM's LLM API lists, by release: look-ups in ``_compat/architectures.toml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from trtbuild.compat import facts
from trtbuild.releases import Release, find_release, known_versions


@dataclass(frozen=True, slots=True)
class ClassList:
    """One page that was read: the releases that it is proven for (none for the newest), and what it lists."""

    lines: tuple[str, ...]
    releases: tuple[str, ...]
    classes: frozenset[str]
    autodeploy: frozenset[str]

    def note(self, version: str) -> str:
        """What is known of the list for one version; empty where it is the version's own."""
        if version in self.releases:
            return ""
        read = " and ".join(self.releases)
        return (
            f"by the list of {read}, not proven identical to {version}"
            if read
            else f"by the newest list, not proven identical to {version}"
        )


@cache
def class_lists() -> tuple[ClassList, ...]:
    """Every list, oldest first."""
    return tuple(map(_list, facts("architectures")["llm-api"]))


def _list(row: Mapping[str, Any]) -> ClassList:
    return ClassList(
        lines=tuple(row["lines"]),
        releases=tuple(row["releases"]),
        classes=frozenset(row["classes"]),
        autodeploy=frozenset(row.get("autodeploy", ())),
    )


def class_list(release: Release) -> ClassList:
    """The list of a release that has the LLM API: its own, else that of its line."""
    own = next((one for one in class_lists() if release.version in one.releases), None)
    return own or next(one for one in class_lists() if release.line.name in one.lines)


def refused_class(release: Release, architecture: str) -> str | None:
    """Why the LLM API of a release does not run models of this class, or None."""
    listed = class_list(release)
    if architecture in listed.classes:
        return None
    note = listed.note(release.version)
    said = f" ({note})" if note else ""
    if architecture in listed.autodeploy:
        return f"TensorRT-LLM {release.version} runs {architecture} through its AutoDeploy backend only{said}"
    return f"{architecture} is not among the classes that TensorRT-LLM {release.version} lists for its LLM API{said}"


def version_with(architecture: str) -> str | None:
    """The version whose LLM API lists this class: the newest of those that a container has, else the newest known."""
    found = [find_release(version) for version in known_versions()]
    able = [
        one for one in found if isinstance(one, Release) and one.line.schema and architecture in class_list(one).classes
    ]
    return next((one.version for one in able if one.container), able[0].version if able else None)
