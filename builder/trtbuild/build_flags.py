"""Flags of ``trtllm-build`` per release line: look-ups in ``_compat/build_flags.toml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from packaging.version import InvalidVersion, Version

from trtbuild.compat import facts
from trtbuild.errors import CompatibilityError
from trtbuild.releases import lines

Kind = Literal["number", "text", "path", "choice", "switch", "list"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One flag without its dashes; without `default` it is off or follows from the model."""

    name: str
    kind: Kind
    plugin: bool
    default: str | int | None = None
    allowed: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagTable:
    """What ``trtllm-build`` of some release lines takes, and where it was read.

    `releases` are those whose own files were read; none where only a neighbouring commit could be.
    """

    name: str
    lines: tuple[str, ...]
    releases: tuple[str, ...]
    repo: str
    path: str
    commit: str
    proof: str
    date: Any
    flags: Mapping[str, Flag]

    def note(self, version: str) -> str:
        """What is known of these flags for one version, as the plan says it."""
        said = "" if version in self.releases else "not "
        return f"flags of trtllm-build: {self.commit[:8]}, {said}proven identical to {version}"


@cache
def flag_tables() -> tuple[FlagTable, ...]:
    """Every table, oldest first."""
    data = facts("build_flags")
    names = [row["name"] for row in data["table"]]
    return tuple(
        FlagTable(
            **row | {"lines": tuple(row["lines"]), "releases": tuple(row["releases"])},
            flags=_flags_at(place, names, data),
        )
        for place, row in enumerate(data["table"])
    )


def _flags_at(place: int, names: list[str], data: Mapping[str, Any]) -> dict[str, Flag]:
    """The rows that hold for the table at `place`."""
    found: dict[str, Flag] = {}
    for part in ("build", "plugin"):
        for name, rows in data[part].items():
            for row in rows:
                first = names.index(row["from"]) if "from" in row else 0
                last = names.index(row["to"]) if "to" in row else len(names) - 1
                if first <= place <= last:
                    found[name] = _flag(name, row, plugin=part == "plugin")
    return found


def _flag(name: str, row: Mapping[str, Any], *, plugin: bool) -> Flag:
    return Flag(
        name=name,
        kind=row["kind"],
        plugin=plugin,
        default=row.get("default"),
        allowed=tuple(row.get("allowed", ())),
        aliases=tuple(row.get("aliases", ())),
    )


def flag_table(version: str) -> FlagTable:
    """The flags that a version of TensorRT-LLM takes.

    Raises:
        CompatibilityError: no table covers this version.
    """
    known = f"{flag_tables()[0].name} to {flag_tables()[-1].name}"
    try:
        parsed = Version(version)
    except InvalidVersion:
        raise CompatibilityError(f"{version!r} is no TensorRT-LLM version; known are {known}") from None
    line = next((line.name for line in lines() if line.holds(parsed)), None)
    for table in flag_tables():
        if line in table.lines:
            return table
    raise CompatibilityError(
        f"the flags of trtllm-build {version} are not known; known are {known}",
        "use one of these, or the runtime trtllm for newer versions, which have no trtllm-build",
    )


def elsewhere(name: str, here: FlagTable) -> str:
    """The end of a sentence: in which other lines a flag exists that `here` does not have; empty where in none."""
    having = [table.name for table in flag_tables() if name in table.flags]
    if not having or here.name in having:
        return ""
    return f", {having[0]} to {having[-1]} have it" if len(having) > 1 else f", {having[0]} has it"


def known_plugins() -> frozenset[str]:
    """The plugins' flags of every table."""
    return frozenset(name for table in flag_tables() for name, flag in table.flags.items() if flag.plugin)
