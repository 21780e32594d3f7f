"""Sets of calibration text: directories, data sets on disk, their splits, and what is read and digested of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trtbuild.compress.chat import Chat
from trtbuild.compress.textfiles import TextFile, read_rows
from trtbuild.errors import RecipeError
from trtbuild.manifest import DigestCache
from trtbuild.source import digest_paths
from trtbuild.text_sets import text_files

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


def save_to_disk(path: Path, shards: list[dict[str, list[Any]]], split: str | None = None) -> Path:
    """Write what `datasets.Dataset.save_to_disk` writes, as far as it is read."""
    import pyarrow as pa

    path.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
    for name, columns in zip(names, shards, strict=True):
        table = pa.table(columns)
        with pa.OSFile(str(path / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    (path / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names], "_split": split, "_fingerprint": "x"})
    )
    (path / "dataset_info.json").write_text("{}")
    return path


def touch(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps({"text": name}))
    return path


def names_of(path: Path, split: str | None = None) -> list[str]:
    return [file.relative_to(path).as_posix() for file in text_files(path, split)]


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(RecipeError) as caught:
        call()
    return str(caught.value)


def test_a_saved_data_set_is_read_in_the_order_of_its_state(tmp_path: Path) -> None:
    path = save_to_disk(tmp_path / "set", [{"text": ["b", "c", "d"]}, {"text": ["a"]}], split="train")
    assert [row.value for row in read_rows(TextFile(path))] == ["b", "c", "d", "a"]
    assert [row.value for row in read_rows(TextFile(path, split="train"))] == ["b", "c", "d", "a"]
    assert next(iter(read_rows(TextFile(path)))).where == "data-00000-of-00002.arrow, row 1"
    assert "no split 'test' in" in refusal(lambda: text_files(path, "test"))


def test_a_saved_dictionary_of_splits(tmp_path: Path) -> None:
    for split in ("test", "train"):
        save_to_disk(tmp_path / split, [{"text": [split]}], split)
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["test", "train"]}))
    assert [row.value for row in read_rows(TextFile(tmp_path))] == ["train"]
    assert [row.value for row in read_rows(TextFile(tmp_path, split="test"))] == ["test"]
    text = refusal(lambda: text_files(tmp_path, "dev"))
    assert text == f"compress.calibration.split: there is no split 'dev' in {tmp_path}; its splits: test, train"


def test_damaged_data_sets(tmp_path: Path) -> None:
    path = save_to_disk(tmp_path / "set", [{"text": ["a"]}, {"text": ["b"]}])
    arrow = path / "data-00001-of-00002.arrow"
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[: len(whole) // 2])
    assert "is not a readable Arrow file" in refusal(lambda: list(read_rows(TextFile(path))))
    arrow.unlink()
    assert "data-00001-of-00002.arrow is missing, state.json names it" in refusal(lambda: text_files(path))
    state = path / "state.json"
    state.write_text(json.dumps({"_data_files": [], "_indices_data_files": None}))
    assert "state.json names no data files" in refusal(lambda: text_files(path))
    state.write_text(json.dumps({"_indices_data_files": [{"filename": "indices.arrow"}]}))
    assert "selects its rows by an index file; save it again" in refusal(lambda: text_files(path))
    state.write_text("{")
    assert "state.json cannot be read" in refusal(lambda: text_files(path))


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["b.txt", "a.md", "README.md", "LICENSE.txt", ".hidden.txt"], None, ["a.md", "b.txt"]),
        (["data/train-00001-of-00002.jsonl", "data/train-00000-of-00002.jsonl", "data/test-00000-of-00001.jsonl"], None,
         ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]),
        (["data/train-00000-of-00001.jsonl", "data/odd.split-00000-of-00001-ab12.jsonl"], "odd.split",
         ["data/odd.split-00000-of-00001-ab12.jsonl"]),
        (["en/train/0.jsonl", "en/valid/0.jsonl"], "validation", ["en/valid/0.jsonl"]),
        (["chat_train.jsonl", "chat_dev.jsonl", "notes.pdf"], None, ["chat_train.jsonl"]),
        (["only-test.jsonl"], None, ["only-test.jsonl"]),
        (["deep/er/x.jsonl", "__pycache__/y.jsonl"], None, ["deep/er/x.jsonl"]),
    ],
)  # fmt: skip
def test_directories(names: list[str], split: str | None, expected: list[str], tmp_path: Path) -> None:
    assert names_of(touch(tmp_path, *names), split) == expected


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (
            ["a.csv", "b.json.gz"],
            None,
            r"holds no file of text, only .csv, .gz; it may hold .txt, .md, .jsonl, .parquet",
        ),
        (["a.txt", "b.jsonl"], None, "holds files of several kinds: .jsonl, .txt; name a directory with one kind"),
        (["a_test.jsonl", "a_dev.jsonl"], None, "no split named train; name one of its splits: test, validation"),
        (["a.jsonl"], "train", "tell no splits; remove it"),
    ],
)
def test_directories_that_are_refused(names: list[str], split: str | None, message: str, tmp_path: Path) -> None:
    assert message in refusal(lambda: text_files(touch(tmp_path, *names), split))


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    touch(tmp_path, "a.jsonl")
    text = refusal(lambda: text_files(tmp_path / "a.jsonl", "train"))
    assert text == f"compress.calibration.split: 'train' is set, but {tmp_path}/a.jsonl is one file; remove it"


def test_digests_tell_what_is_read_and_nothing_else(tmp_path: Path) -> None:
    touch(tmp_path, "data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", "README.md")

    def digest(split: str | None = None) -> str:
        return digest_paths("compress", {"data": tmp_path}, DigestCache(None), split)["data"]

    first = digest()
    assert first.startswith("data/train-00000-of-00001.jsonl:")
    assert first == digest("train") != digest("test")
    (tmp_path / "README.md").write_text("other")
    (tmp_path / "data" / "test-00000-of-00001.jsonl").write_text("{}")
    assert digest() == first
    (tmp_path / "data" / "train-00000-of-00001.jsonl").write_text("{}")
    assert digest() != first
    other = digest_paths("evaluate", {"calibration": tmp_path}, DigestCache(None), "test")
    assert other["calibration"].startswith("data/test-")


def chats(path: Path, rows: list[dict[str, Any]]) -> list[Chat]:
    path.write_text("\n".join(map(json.dumps, rows)))
    found = [row.value for row in read_rows(TextFile(path))]
    assert all(isinstance(value, Chat) for value in found)
    return found  # type: ignore[return-value]


def test_tools_and_their_calls(tmp_path: Path) -> None:
    calls = [{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {}}}]}]
    tools = [{"type": "function", "function": {"name": "now", "description": "The time", "strict": None}}]
    rows = [
        {"messages": CHAT + calls, "tools": tools},
        {"messages": CHAT, "tools": json.dumps(tools)},
        {"messages": CHAT},
    ]
    first, second, third = chats(tmp_path / "a.jsonl", rows)
    assert first.messages[2] == calls[0] | {"content": ""}
    assert first.tools == ({"type": "function", "function": {"name": "now", "description": "The time"}},)
    assert json.loads(json.dumps(second.tools[0]["function"]["name"])) == "now"
    assert third.tools == ()
    bad = refusal(lambda: chats(tmp_path / "a.jsonl", [{"messages": CHAT, "tools": 3}]))
    assert "holds a number in line 1, column 'tools', beside chat messages; the tools of a conversation are" in bad


def test_the_words_of_sharegpt(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
    (chat,) = chats(tmp_path / "a.jsonl", [{"conversations": said, "id": "1"}])
    assert list(chat.messages) == CHAT
    said[1]["from"] = "nobody"
    text = refusal(lambda: chats(tmp_path / "a.jsonl", [{"conversations": said}]))
    assert "has no role or no content in message 2 of line 1" in text
