"""Read the user's text: plain text, JSON lines, Parquet or Arrow, row by row, with an error that says where and what.

Nothing here knows a tokenizer. A row is text, or chat messages that the caller puts through a chat template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from trtbuild.errors import HostError, Problem, RecipeError
from trtbuild.recipe_fields import TEXT_SUFFIXES
from trtbuild.text_sets import ARROW, text_files

from .chat import ALLOWED, Chat, read_messages, read_tools

_PREFERRED = ("text", "messages", "content", "conversations")
_TOOLS = "tools"
_SECTION_CHARS = 65_536
_PROBE_BYTES = 8192
_BATCH_ROWS = 64


@dataclass(frozen=True, slots=True)
class TextFile:
    """One file, or a directory of files, and the recipe's names for it, which the errors carry."""

    path: Path
    column: str | None = None
    split: str | None = None
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
    """One document of a file, and where it stands (``line 3``); `section`: a part of a plain text file."""

    where: str
    value: str | Chat
    section: bool = False


def read_rows(file: TextFile) -> Iterator[Row]:
    """The documents of `file` in order; a plain text file comes in sections of about 65,536 characters.

    Raises:
        RecipeError: the file is missing, empty, of another kind, damaged, or lacks the column or the split.
        HostError: a Parquet or Arrow file, and pyarrow cannot be imported.
    """
    if file.path.is_dir() or file.split is not None:
        return _rows_of_set(file)
    return _rows_of_file(file)


def _rows_of_set(file: TextFile) -> Iterator[Row]:
    for path in text_files(file.path, file.split):
        for row in _rows_of_file(replace(file, path=path, split=None)):
            yield replace(row, where=f"{path.name}, {row.where}")


def _rows_of_file(file: TextFile) -> Iterator[Row]:
    _check_readable(file)
    readers: dict[str, Callable[[TextFile], Iterator[Row]]] = {
        ".txt": _plain_rows,
        ".md": _plain_rows,
        ".jsonl": _json_rows,
        ".parquet": _parquet_rows,
        ARROW: _arrow_rows,
    }
    return readers[file.path.suffix.lower()](file)


def _check_readable(file: TextFile) -> None:
    if not file.path.exists():
        raise file.problem("does not exist", "give the path of a .txt, .md, .jsonl or .parquet file")
    if not file.path.is_file():
        raise file.problem("is not a file", "give the path of one .txt, .md, .jsonl or .parquet file")
    suffix = file.path.suffix.lower()
    if suffix not in (*TEXT_SUFFIXES, ARROW):
        raise file.problem(f"ends in {suffix or 'nothing'}", f"use one of {', '.join(TEXT_SUFFIXES)}")
    try:
        with file.path.open("rb") as stream:
            start = stream.read(_PROBE_BYTES)
    except OSError as error:
        raise file.problem(f"cannot be read: {error.strerror}") from error
    if not start:
        raise file.problem("is empty", "give a file with text, or leave the field out to use the shipped text")
    if suffix not in {".parquet", ARROW} and b"\0" in start:
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
                yield Row(f"line {first}", "".join(section), section=True)
                section, size, first = [], 0, 0
    if section:
        yield Row(f"line {first}", "".join(section), section=True)


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
            value = _checked(file, f"line {number}", column, row[column], row.get(_TOOLS))
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
    _require_pyarrow(file, "Parquet")
    from pyarrow import parquet

    with _damage(file, "Parquet"), parquet.ParquetFile(file.path) as table:
        columns = _table_columns(file, table.schema_arrow)
        yield from _table_rows(file, columns, table.iter_batches(batch_size=_BATCH_ROWS, columns=columns))


def _arrow_rows(file: TextFile) -> Iterator[Row]:
    """The rows of an Arrow stream, as `datasets` writes them."""
    _require_pyarrow(file, "Arrow")
    import pyarrow as pa

    with _damage(file, "Arrow"), ExitStack() as stack:
        source = stack.enter_context(pa.OSFile(str(file.path)))
        stream = stack.enter_context(pa.ipc.open_stream(source))
        columns = _table_columns(file, stream.schema)
        yield from _table_rows(file, columns, (batch.select(columns) for batch in stream))


def _require_pyarrow(file: TextFile, kind: str) -> None:
    try:
        import pyarrow as pa  # noqa: F401
    except ImportError as error:
        raise HostError(
            f"{file.path} is {kind}, and pyarrow cannot be imported: {error}", "pip install pyarrow"
        ) from error


@contextmanager
def _damage(file: TextFile, kind: str) -> Iterator[None]:
    """While open, what pyarrow refuses becomes a sentence about the file."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise file.problem(f"is not a readable {kind} file: {reason}", "write the file again") from error


def _table_columns(file: TextFile, schema: Any) -> list[str]:
    """The column with the text, and that with the tools of its conversations where there is one."""
    types = {field.name: field.type for field in schema}
    column = file.column or _choose_column(file, {name: _is_text_type(kind) for name, kind in types.items()})
    if column not in types:
        raise file.column_problem(f"there is no column {column!r}", sorted(types))
    return [column] if _TOOLS not in types or column == _TOOLS else [column, _TOOLS]


def _table_rows(file: TextFile, columns: list[str], batches: Iterable[Any]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        values = [batch.column(index).to_pylist() for index in range(len(columns))]
        for row in zip(*values, strict=True):
            number += 1
            checked = _checked(file, f"row {number}", columns[0], row[0], *row[1:])
            if checked:
                yield Row(f"row {number}", checked)


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


def _checked(file: TextFile, where: str, column: str, value: object, tools: object = None) -> str | Chat | None:
    """`value` if it is text or chat messages; None if it is empty, which a row may be."""
    if value is None or value == []:
        return None
    if isinstance(value, str):
        return value if value.strip() else None
    if not isinstance(value, list):
        raise file.problem(f"holds {_kind(value)} in {where}, column {column!r}", ALLOWED)
    messages = read_messages(value)
    if isinstance(messages, int):
        raise file.problem(f"has no role or no content in message {messages} of {where}, column {column!r}", ALLOWED)
    offered = read_tools(tools)
    if offered is None:
        what = f"holds {_kind(tools)} in {where}, column {_TOOLS!r}, beside chat messages"
        raise file.problem(what, "the tools of a conversation are a list of JSON schemas, or the same as JSON text")
    return Chat(messages, offered)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)
