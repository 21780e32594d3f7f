"""What an older deployment says, whatever form it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Section = Literal["own", "triton", "build", "checkpoint", "llm", "recipe"]
Clients = Literal["llm", "ensemble"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting that is set, in the words of its source.

    Args:
        section: the table of ``_compat/legacy_names.toml`` that knows its name.
        name: dotted where the source nests it.
        value: text from a config.pbtxt or a command line, else as JSON or YAML has it; None only where null says
            something.
        where: file, and model where there are several.
    """

    section: Section
    name: str
    value: Any
    where: str


@dataclass(frozen=True, slots=True)
class Unset:
    """A setting that the source names and leaves open: an unfilled placeholder, an empty text or null."""

    name: str
    text: str
    where: str


@dataclass(frozen=True, slots=True)
class Legacy:
    """An older deployment.

    Args:
        form: what it is, as a message calls it.
        root: relative places in it start here.
        settings: every setting that is set, most important first.
        unset: every setting that is named and left open.
        version: of TensorRT-LLM, where the source says it.
        clients: the interface that clients use, where the source has one.
        model_name: of the one model that clients ask, for the interface `llm`.
        original: class and sizes of the checkpoint that it was made of, where nothing else leads there.
    """

    form: str
    root: Path
    settings: tuple[Setting, ...]
    unset: tuple[Unset, ...] = ()
    version: str | None = None
    clients: Clients | None = None
    model_name: str | None = None
    original: dict[str, Any] | None = None


def leaves(document: Mapping[str, Any], at: str = "") -> list[tuple[str, Any]]:
    """Every value of a nested document under its dotted path; an empty section is a value."""
    found: list[tuple[str, Any]] = []
    for key, value in document.items():
        here = f"{at}.{key}" if at else str(key)
        found += leaves(value, here) if isinstance(value, Mapping) and value else [(here, value)]
    return found


def split_unset(section: Section, pairs: list[tuple[str, Any]], where: str) -> tuple[list[Setting], list[Unset]]:
    """Settings of one document, and what it leaves open: null, and sections without content."""
    settings = [Setting(section, name, value, where) for name, value in pairs if not _is_open(value)]
    return settings, [Unset(name, _shown(value), where) for name, value in pairs if _is_open(value)]


def _is_open(value: Any) -> bool:
    return value is None or value in ("", {}, [])


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)
