"""Change one section of a recipe's text, and leave every other byte of it alone."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from trtbuild.yaml_text import yaml_key, yaml_scalar

_WIDTH = 4096  # no line is folded


def with_section(text: str, name: str, values: Mapping[str, Any] | None, *, before: str = "runtime") -> str:
    """`text` with the section `name` holding just `values`; without the section where these are None.

    Comments and the order of the section's lines stay, but for lines that go. A new section stands before the section
    `before`.

    Args:
        text: a recipe that can be read.
        name: of a section at the top.
        values: of the types that YAML has.
        before: where a new section is put.
    """
    document = _reader().load(text)
    if document.fa.flow_style():
        return _rewritten(document, name, values)
    lines = text.splitlines(keepends=True)
    starts = {str(key): document.lc.key(key)[0] for key in document}
    if name not in starts:
        if values is None:
            return text
        place = _above_comments(lines, starts.get(before, len(lines)))
        fresh = "".join(f"{line}\n" for line in section_lines(name, values))
        if place == len(lines) and lines and not lines[-1].endswith("\n"):
            fresh = f"\n{fresh}"
        return "".join(lines[:place]) + fresh + ("\n" if place < len(lines) else "") + "".join(lines[place:])
    start = starts[name]
    end = min((line for line in starts.values() if line > start), default=len(lines))
    end = _without_trailing(lines, start, end)
    if values is None:
        return "".join(lines[:start] + lines[end:])
    block = _reader().load("".join(lines[start:end]))
    if isinstance(block[name], CommentedMap):
        fresh = _rewritten(block, name, values)
    else:
        fresh = "".join(f"{line}\n" for line in section_lines(name, values))
    return "".join(lines[:start]) + fresh + "".join(lines[end:])


def _reader() -> YAML:
    yaml = YAML(typ="rt", pure=True)
    yaml.preserve_quotes = True
    yaml.width = _WIDTH
    return yaml


def _rewritten(document: CommentedMap, name: str, values: Mapping[str, Any] | None) -> str:
    """The document as text, its section changed key by key, so that comments keep their keys."""
    if values is None:
        document.pop(name, None)
    else:
        section = document.setdefault(name, CommentedMap())
        for key in [key for key in section if key not in values]:
            del section[key]
        for key, value in values.items():
            if key not in section or section[key] != value:
                section[key] = _flow(value)
    stream = io.StringIO()
    _reader().dump(document, stream)
    return stream.getvalue()


def _flow(value: Any) -> Any:
    """Mappings on one line."""
    if not isinstance(value, Mapping):
        return value
    found = CommentedMap(value)
    found.fa.set_flow_style()
    return found


def section_lines(name: str, values: Mapping[str, Any]) -> list[str]:
    """A section as it is written where there was none."""
    return [f"{name}:", *(f"  {yaml_key(key)}: {yaml_scalar(value, plain=True)}" for key, value in values.items())]


def _above_comments(lines: list[str], place: int) -> int:
    """The line above the comments that stand over a section."""
    while 0 < place < len(lines) and lines[place - 1].startswith("#"):
        place -= 1
    return place


def _without_trailing(lines: list[str], start: int, end: int) -> int:
    """Less the blank lines and the comments at the margin, which belong to what follows."""
    while end > start + 1 and (not lines[end - 1].strip() or lines[end - 1].startswith("#")):
        end -= 1
    return end
