"""The recipe's text: sections in the order of a recipe, each value with where it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from trtbuild.migrate.extras import plain, put
from trtbuild.migrate.translate import Draft, Row
from trtbuild.recipe import SCHEMA_VERSION, Recipe
from trtbuild.yaml_text import yaml_key, yaml_scalar

_WIDTH = 118
_LARGEST_PLAIN = 40


def recipe_values(draft: Draft) -> dict[str, Any]:
    """The document of the recipe, in order."""
    given: dict[str, Any] = {"model.path": draft.places.model, "runtime.kind": draft.target.kind}
    if draft.places.tokenizer is not None:
        given["model.tokenizer"] = draft.places.tokenizer
    if draft.target.release is not None:
        given["runtime.version"] = draft.target.release.version
    given |= {path: plain(value) for path, value in draft.values.items()}
    document: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
    for path in _paths(Recipe, ""):
        if path in given:
            put(document, path, given[path])
        for free in sorted(name for name in given if name.startswith(f"{path}.")):
            put(document, free, given[free])
    for path, value in sorted(draft.extras.values.items()):
        extra = document.setdefault("runtime", {}).setdefault("extra", {})
        put(extra, path, plain(value))
    return document


def _paths(section: type[BaseModel], at: str) -> Iterator[str]:
    """Every field of a recipe, in order."""
    for name, field in section.model_fields.items():
        inner, here = field.annotation, f"{at}{name}"
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _paths(inner, f"{here}.")
        else:
            yield here


def recipe_text(document: Mapping[str, Any], draft: Draft, form: str) -> str:
    """The document as YAML with comments."""
    origins: dict[str, str] = {}
    for row in draft.rows:
        if row.field and (row.field not in origins or not row.old):
            origins[row.field] = f"{row.old} in {row.where}" if row.old else row.note
    if draft.places.is_open:
        origins["model.path"] = "FILL IN: the original, unquantized checkpoint, a directory or a hub id"
    elif draft.places.origin is None:
        origins["model.path"] = "--model"
    lines = [
        f"# A trtbuild recipe for {draft.target.described}, migrated from {form}.",
        "# `trtbuild check` holds it against the model, `trtbuild build` makes the package with the new repository.",
        *(_lost(draft.rows)),
        *_lines(document, "", "", origins),
    ]
    if draft.target.kind == "trtllm-engine" and "gpu" not in document.get("target", {}):
        lines += ["", "# FILL IN: an engine is built for one kind of GPU.", "# target:", "#   gpu: H100"]
    return "\n".join(lines) + "\n"


def _lost(rows: Sequence[Row]) -> list[str]:
    losses = [row for row in rows if row.is_loss]
    if not losses:
        return ["# Nothing of the old deployment is lost."]
    lines = ["#", "# Not in this recipe:"]
    for row in losses:
        note = " ".join(row.note.split())
        lines.append(f"#   {row.old} = {_short(row.old_value)} ({row.where}): {note}")
    return [*lines, "#"]


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _LARGEST_PLAIN else flat[: _LARGEST_PLAIN - 3] + "..."


def _lines(section: Mapping[str, Any], at: str, indent: str, origins: Mapping[str, str]) -> list[str]:
    lines = []
    for key, value in section.items():
        path = f"{at}{key}"
        if not indent and isinstance(value, Mapping):
            lines.append("")
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{yaml_key(key)}:", *_lines(value, f"{path}.", f"{indent}  ", origins)]
            continue
        line = f"{indent}{yaml_key(key)}: {yaml_scalar(value, plain=True)}"
        origin = " ".join(origins.get(path, "").split())
        lines.append(f"{line}  # {origin}" if origin else line)
    return lines
