"""Read the user's text: plain text, JSON lines or Parquet, row by row, with an error that says where and what.

Nothing here knows a tokenizer. A row is text, or a list of chat messages that the caller puts through a chat template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trtbuild.errors import HostError, Problem, RecipeError
from trtbuild.recipe_fields import TEXT_SUFFIXES

Message = dict[str, Any]

_PREFERRED = ("text", "messages", "content")
_SECTION_CHARS = 65_536
_PROBE_BYTES = 8192
_BATCH_ROWS = 64


@dataclass(frozen=True, slots=True)
class TextFile:
    """One file and the recipe's names for it, which the errors carry."""

    path: Path
    column: str | None = None
    field: str = "compress.calibration.data"
    column_field: str | None = "compress.calibration.column"

    def problem(self, message: str, hint: str = "") -> RecipeError:
        """The error to raise for the file itself."""
        return RecipeError([Problem(self.field, f"{self.path} {message}", hint)])

    def column_problem(self, message: str, columns: list[str]) -> RecipeError:
        """The error to raise for a column; names the columns that are there."""
        there = ", ".join(columns) or "none"
        if self.column_field is None:
            hint = "name the column text, or messages for chat messages"
            return RecipeError([Problem(self.field, f"{self.path}: {message}; its columns: {there}", hint)])
        hint = f"set {self.column_field} to a column of text or of chat messages"
        return RecipeError([Problem(self.column_field, f"{message}; columns of {self.path}: {there}", hint)])


@dataclass(frozen=True, slots=True)
class Row:
    """One document of a file, and where it stands (``line 3``)."""

    where: str
    value: str | list[Message]


def read_rows(file: TextFile) -> Iterator[Row]:
    """The documents of `file` in order; a plain text file comes in sections of about 65,536 characters.

    Raises:
        RecipeError: the file is missing, empty, of another kind, damaged, or lacks the column.
        HostError: a Parquet file, and pyarrow cannot be imported.
    """
    _check_readable(file)
    readers: dict[str, Callable[[TextFile], Iterator[Row]]] = {
        ".txt": _plain_rows,
        ".md": _plain_rows,
        ".jsonl": _json_rows,
        ".parquet": _parquet_rows,
    }
    return readers[file.path.suffix.lower()](file)


def _check_readable(file: TextFile) -> None:
    if not file.path.exists():
        raise file.problem("does not exist", "give the path of a .txt, .md, .jsonl or .parquet file")
    if not file.path.is_file():
        raise file.problem("is not a file", "give the path of one .txt, .md, .jsonl or .parquet file")
    suffix = file.path.suffix.lower()
    if suffix not in TEXT_SUFFIXES:
        raise file.problem(f"ends in {suffix or 'nothing'}", f"use one of {', '.join(TEXT_SUFFIXES)}")
    try:
        with file.path.open("rb") as stream:
            start = stream.read(_PROBE_BYTES)
    except OSError as error:
        raise file.problem(f"cannot be read: {error.strerror}") from error
    if not start:
        raise file.problem("is empty", "give a file with text, or leave the field out to use the shipped text")
    if suffix != ".parquet" and b"\0" in start:
        hint = "give text in UTF-8; convert UTF-16 first"
        raise file.problem(f"is binary: a zero byte at offset {start.index(0)}", hint)


def _lines(file: TextFile, stream: BinaryIO) -> Iterator[tuple[int, str]]:
    for number, raw in enumerate(stream, start=1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            what = f"is not UTF-8: byte 0x{raw[error.start]:02x} in line {number} at column {error.start + 1}"
            raise file.problem(what, "convert the file to UTF-8") from error
        yield number, line.removeprefix("\ufeff") if number == 1 else line


def _plain_rows(file: TextFile) -> Iterator[Row]:
    if file.column is not None:
        message = f"{file.column!r} is given, but {file.path} is plain text and has no columns"
        raise RecipeError([Problem(file.column_field or file.field, message, "leave it out")])
    section: list[str] = []
    size = first = 0
    with file.path.open("rb") as stream:
        for number, line in _lines(file, stream):
            first = first or number
            section.append(line)
            size += len(line)
            if size >= _SECTION_CHARS:
                yield Row(f"line {first}", "".join(section))
                section, size, first = [], 0, 0
    if section:
        yield Row(f"line {first}", "".join(section))


def _json_rows(file: TextFile) -> Iterator[Row]:
    column = file.column
    with file.path.open("rb") as stream:
        for number, line in _lines(file, stream):
            if not line.strip():
                continue
            row = _json_object(file, number, line)
            if column is None:
                column = _choose_column(file, {name: _is_usable(value) for name, value in row.items()})
            if column not in row:
                raise file.column_problem(f"line {number} has no column {column!r}", sorted(row))
            value = _checked(file, f"line {number}", column, row[column])
            if value:
                yield Row(f"line {number}", value)


def _json_object(file: TextFile, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        what = f"is not JSON in line {number}, column {error.colno}: {error.msg}"
        raise file.problem(what, "write one JSON object a line") from error
    except RecursionError as error:
        raise file.problem(f"nests too deep in line {number}", "write one flat JSON object a line") from error
    if not isinstance(row, dict):
        what = f"holds {_kind(row)} in line {number}"
        raise file.problem(what, 'write one JSON object a line, for example {"text": "..."}')
    return row


def _parquet_rows(file: TextFile) -> Iterator[Row]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise HostError(
            f"{file.path} is Parquet, and pyarrow cannot be imported: {error}", "pip install pyarrow"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(file.path) as table:
            types = {field.name: field.type for field in table.schema_arrow}
            column = file.column or _choose_column(file, {name: _is_text_type(kind) for name, kind in types.items()})
            if column not in types:
                raise file.column_problem(f"there is no column {column!r}", sorted(types))
            for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    checked = _checked(file, f"row {number}", column, value)
                    if checked:
                        yield Row(f"row {number}", checked)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise file.problem(f"is not a readable Parquet file: {reason}", "write the file again") from error


def _is_text_type(kind: Any) -> bool:
    return str(kind) in {"string", "large_string", "string_view"} or str(kind).startswith(("list<", "large_list<"))


def _choose_column(file: TextFile, usable: Mapping[str, bool]) -> str:
    """The column that holds the text: a usual name, else the only one that can."""
    candidates = [name for name, possible in usable.items() if possible]
    for name in _PREFERRED:
        if name in candidates:
            return name
    if len(candidates) == 1:
        return candidates[0]
    what = "more than one column could be the text" if candidates else "no column holds text or chat messages"
    raise file.column_problem(what, sorted(usable))


def _is_usable(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _checked(file: TextFile, where: str, column: str, value: object) -> str | list[Message] | None:
    """`value` if it is text or chat messages; None if it is empty, which a row may be."""
    if value is None or value == []:
        return None
    if isinstance(value, str):
        return value if value.strip() else None
    allowed = 'allowed are text, or chat messages such as [{"role": "user", "content": "..."}]'
    if not isinstance(value, list):
        raise file.problem(f"holds {_kind(value)} in {where}, column {column!r}", allowed)
    for index, message in enumerate(value):
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and message.get("content")):
            what = f"has no role or no content in message {index + 1} of {where}, column {column!r}"
            raise file.problem(what, allowed)
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)
