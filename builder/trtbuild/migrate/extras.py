"""Arguments for ``runtime.extra``: held against the new version's schema as a whole, renamed where it renamed them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from trtbuild.compat import facts
from trtbuild.llm_schema import Schema
from trtbuild.llm_validate import validate
from trtbuild.migrate.legacy import Setting

if TYPE_CHECKING:
    from trtbuild.migrate.target import Target
    from trtbuild.migrate.translate import Row

_METHOD = "speculative_config.decoding_type"
_SCHEDULE = "draft_len_schedule"  # its keys are numbers


@dataclass(slots=True)
class _Offer:
    row: int
    path: str
    value: Any
    lost: str | None


@dataclass(slots=True)
class Extras:
    """Values under ``runtime.extra`` by dotted path; `settle` decides which of them stay."""

    values: dict[str, Any] = field(default_factory=dict)
    offers: list[tuple[Setting, str, Any, str | None]] = field(default_factory=list)

    def offer(
        self,
        setting: Setting,
        path: str,
        value: Any,
        as_row: Callable[[Setting, str, Any], Row],
        lost: str | None = None,
    ) -> Row:
        """A row for an argument that may stay; `lost` is what is lost otherwise."""
        self.offers.append((setting, path, value, lost))
        return as_row(setting, f"runtime.extra.{path}", value)

    def settle(self, rows: list[Row], target: Target) -> list[Row]:
        """The rows, after the new version has had its say."""
        schema = target.schema
        if schema is None:
            self.values = {path: value for _, path, value, _ in self.offers}
            return rows
        kept: dict[int, _Offer] = {}
        by_old = {
            (row.where, row.old): index for index, row in enumerate(rows) if row.field.startswith("runtime.extra.")
        }
        for setting, path, value, lost in self.offers:
            new_path, new_value = _respelled(path, value, schema)
            index = by_old[(setting.where, setting.name)]
            kept[index] = _Offer(index, new_path, new_value, lost)
        rows = list(rows)
        while problem := _first_problem(kept, schema):
            where, message = problem
            fallen = [one for one in kept.values() if one.path == where or one.path.startswith(f"{where}.")]
            fallen = fallen or [one for one in kept.values() if where.startswith(f"{one.path}.")] or list(kept.values())
            for one in fallen:
                del kept[one.row]
                note = f"{one.lost}: {message}" if one.lost else message
                rows[one.row] = replace(rows[one.row], field="", value="", kind="dropped", note=note)
        for one in kept.values():
            self.values[one.path] = one.value
            rows[one.row] = _renamed(rows[one.row], one)
        return rows


def _respelled(path: str, value: Any, schema: Schema) -> tuple[str, Any]:
    """An argument in the words of the new version."""
    if path == _METHOD:
        return path, _method(str(value), schema)
    if schema.has(path):
        return path, value
    pairs = [(row["from"], row["to"]) for row in facts("lines")["renamed"]]
    for old, new in [*pairs, *((new, old) for old, new in pairs)]:
        # A rename with another unit is none (acceptance length and rate).
        if path == old and schema.has(new) and "acceptance" not in old:
            return new, value
    return path, value


def _method(name: str, schema: Schema) -> str:
    """A speculative method's name; one that was not renamed stays."""
    for method in facts("speculative")["method"]:
        spellings: Mapping[str, str] = method.get("decoding_type", {})
        if name in spellings.values():
            return spellings.get(schema.header.name, name)
    return name


def _first_problem(kept: Mapping[int, _Offer], schema: Schema) -> tuple[str, str] | None:
    document: dict[str, Any] = {}
    for one in kept.values():
        put(document, one.path, plain(one.value))
    problems = validate(document, schema, partial=True)
    return (problems[0].path, problems[0].message) if problems else None


def plain(value: Any) -> Any:
    """A value with lists where it has tuples."""
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def put(document: dict[Any, Any], path: str, value: Any) -> None:
    """Set a dotted path in a nested document."""
    *sections, last = path.split(".")
    for section in sections:
        document = document.setdefault(section, {})
    document[int(last) if sections[-1:] == [_SCHEDULE] and last.isdecimal() else last] = value


def _renamed(row: Row, offer: _Offer) -> Row:
    path = f"runtime.extra.{offer.path}"
    if path == row.field and str(offer.value) == row.value:
        return row
    if str(offer.value) == row.value or isinstance(offer.value, (bool, list, tuple)):
        return row if path == row.field else replace(row, field=path, kind="renamed")
    return replace(row, field=path, value=str(offer.value), kind="computed")
