"""Reading text, JSON lines and Parquet: what is accepted, and the sentence for everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trtbuild.compress.chat import Chat
from trtbuild.compress.textfiles import TextFile, read_rows
from trtbuild.errors import RecipeError

Write = Callable[[str, str | bytes], Path]
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


def values(path: Path, column: str | None = None) -> list[Any]:
    found = [row.value for row in read_rows(TextFile(path, column))]
    return [list(value.messages) if isinstance(value, Chat) else value for value in found]


def refusal(path: Path, column: str | None = None) -> tuple[str, str]:
    """The field and the whole sentence of the one problem."""
    with pytest.raises(RecipeError) as caught:
        values(path, column)
    (problem,) = caught.value.problems
    return problem.path, str(problem)


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), path)
    return path


def test_plain_text_comes_back_whole_in_sections(write: Write) -> None:
    text = "\n".join(f"line {number} of a long file, with é and 漢字" for number in range(6000))
    rows = list(read_rows(TextFile(write("long.txt", text))))
    assert len(rows) == 4
    assert "".join(str(row.value) for row in rows) == text
    assert rows[0].where == "line 1"
    assert all(str(row.value).endswith("\n") for row in rows[:-1])


def test_byte_order_mark_is_not_text(write: Write) -> None:
    assert values(write("bom.md", b"\xef\xbb\xbf# Title\n")) == ["# Title\n"]


def test_json_lines_skip_blank_lines_and_empty_rows(write: Write) -> None:
    path = write("rows.jsonl", '{"text": "one"}\n\n{"text": ""}\n{"text": null}\n{"text": "two"}\n')
    assert [(row.where, row.value) for row in read_rows(TextFile(path))] == [("line 1", "one"), ("line 5", "two")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"title": "t", "text": "body"}, "body"),
        ({"id": 3, "messages": CHAT}, CHAT),
        ({"id": 3, "story": "only text column"}, "only text column"),
        ({"title": "t", "content": "body"}, "body"),
    ],
)
def test_column_is_detected(write: Write, tmp_path: Path, row: dict[str, Any], expected: object) -> None:
    assert values(write("rows.jsonl", json.dumps(row))) == [expected]
    assert values(write_parquet(tmp_path / "rows.parquet", {name: [value] for name, value in row.items()})) == [
        expected
    ]


def test_chosen_column_wins(write: Write, tmp_path: Path) -> None:
    assert values(write("rows.jsonl", '{"text": "a", "other": "b"}'), "other") == ["b"]
    assert values(write_parquet(tmp_path / "rows.parquet", {"text": ["a"], "other": ["b"]}), "other") == ["b"]


def test_parquet_of_many_rows_keeps_order_and_skips_nulls(tmp_path: Path) -> None:
    texts = [None if number % 50 == 0 else f"row {number}" for number in range(200)]
    assert values(write_parquet(tmp_path / "rows.parquet", {"text": texts})) == [text for text in texts if text]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.txt", "", "is empty; give a file with text, or leave the field out to use the shipped text"),
        ("empty.parquet", "", "is empty"),
        ("binary.txt", b"\x7fELF\x02\x00\x01", "is binary: a zero byte at offset 5; give text in UTF-8"),
        ("utf16.jsonl", '{"text": "a"}'.encode("utf-16"), "is binary"),
        ("latin.txt", b"fine\ncaf\xe9\n", "is not UTF-8: byte 0xe9 in line 2 at column 4; convert the file to UTF-8"),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', "is not UTF-8: byte 0xe9 in line 1"),
        ("bad.jsonl", '{"text": "a"}\n{"text": }\n', "is not JSON in line 2, column 10: Expecting value"),
        ("deep.jsonl", "[" * 100_000, "nests too deep in line 1"),
        ("list.jsonl", '["a"]', 'holds a list in line 1; write one JSON object a line, for example {"text": "..."}'),
        ("number.jsonl", '{"text": "a"}\n{"text": 7}', "holds a number in line 2, column 'text'; allowed are text, or"),
        (
            "chat.jsonl",
            '{"messages": [{"from": "x", "value": "y"}]}',
            "has no role or no content in message 1 of line 1",
        ),
        ("broken.parquet", b"PAR1" + bytes(range(64)) + b"PAR1", "is not a readable Parquet file: "),
        ("short.parquet", b"PAR1", "is not a readable Parquet file: "),
        ("data.csv", "a,b", "ends in .csv; use one of .txt, .md, .jsonl, .parquet"),
        ("data", "a,b", "ends in nothing; use one of"),
    ],
)
def test_bad_file_is_refused(write: Write, name: str, content: str | bytes, sentence: str) -> None:
    path = write(name, content)
    field, text = refusal(path)
    assert field == "compress.calibration.data"
    assert text.startswith(f"compress.calibration.data: {path} {sentence}")


def test_missing_file_and_directory_are_refused(tmp_path: Path) -> None:
    assert "none.txt does not exist; give the path" in refusal(tmp_path / "none.txt")[1]
    assert "holds no file of text" in refusal(tmp_path)[1]


def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    # A file whose first byte cannot be read, for root too: address 0 of this process.
    path = tmp_path / "memory.txt"
    path.symlink_to("/proc/self/mem")
    assert "cannot be read: Input/output error" in refusal(path)[1]


def test_wrong_column_names_the_columns(write: Write, tmp_path: Path) -> None:
    for path in (
        write("rows.jsonl", '{"title": "a", "body": "b"}'),
        write_parquet(tmp_path / "rows.parquet", {"title": ["a"], "body": ["b"]}),
    ):
        field, text = refusal(path, "txt")
        assert field == "compress.calibration.column"
        assert f"columns of {path}: body, title; set compress.calibration.column to" in text
        field, text = refusal(path)
        assert field == "compress.calibration.column"
        assert "more than one column could be the text" in text


def test_no_usable_column_is_refused(write: Write, tmp_path: Path) -> None:
    for path in (write("rows.jsonl", '{"id": 1}'), write_parquet(tmp_path / "rows.parquet", {"id": [1]})):
        field, text = refusal(path)
        assert field == "compress.calibration.column"
        assert f"no column holds text or chat messages; columns of {path}: id" in text


def test_row_without_the_column_names_its_line(write: Write) -> None:
    field, text = refusal(write("rows.jsonl", '{"text": "a"}\n{"body": "b"}\n'))
    assert field == "compress.calibration.column"
    assert "line 2 has no column 'text'" in text


def test_column_of_a_plain_text_file_is_refused(write: Write) -> None:
    field, text = refusal(write("a.txt", "text"), "text")
    assert field == "compress.calibration.column"
    assert "is plain text and has no columns; leave it out" in text


def test_number_column_of_parquet_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", {"id": [1]})
    assert "holds a number in row 1, column 'id'" in refusal(path, "id")[1]


def test_truncated_parquet_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", {"text": ["words and more words"] * 1000})
    path.write_bytes(path.read_bytes()[:-20])
    assert "is not a readable Parquet file: " in refusal(path)[1]


def test_damaged_parquet_data_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", {"text": [f"words {number}" for number in range(1000)]})
    whole = bytearray(path.read_bytes())
    whole[4:200] = b"\xff" * 196
    path.write_bytes(whole)
    assert "is not a readable Parquet file: " in refusal(path)[1]
