"""The user's prompts as token ids: lines of text as they are, conversations through the chat template.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtbuild.compress.chat import Chat, render_chat
from trtbuild.compress.textfiles import Row, TextFile, read_rows
from trtbuild.errors import Problem, RecipeError

FIELD = "--prompts"
_HINT = "give a file with prompts like those that will be served"


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids of each prompt, no two alike; `too_long` were passed over among them."""

    ids: tuple[tuple[int, ...], ...]
    too_long: int


def refuse_file(path: Path) -> None:
    """Refuse a file that holds no prompt, before anything is built for it.

    Raises:
        RecipeError: it is missing, empty, of another kind or damaged.
        HostError: a Parquet file, and pyarrow cannot be imported.
    """
    if path.is_file() and path.stat().st_size == 0:
        raise RecipeError([Problem(FIELD, f"{path} is empty", _HINT)])
    if not any(True for row in read_rows(_file(path)) for _ in _prompts(row)):
        raise _file(path).problem("holds no prompt", _HINT)


def read_prompts(path: Path, tokenizer: Any, *, count: int, longest: int) -> Prompts:
    """The first `count` prompts of at most `longest` tokens.

    Raises:
        RecipeError: the file is wrong, or has no such prompt.
    """
    file = _file(path)
    found: dict[tuple[int, ...], None] = {}
    too_long = 0
    for ids in _token_ids(file, tokenizer):
        if len(ids) > longest:
            too_long += 1
        else:
            found[ids] = None
        if len(found) == count:
            break
    if not found and too_long:
        what = f"all {too_long} prompts of {path} are longer than {longest} tokens"
        hint = "raise runtime.max_seq_len, or give shorter prompts"
        raise RecipeError([Problem(FIELD, f"{what}, which leave no room for answers", hint)])
    if not found:
        raise file.problem("holds no prompt", _HINT)
    return Prompts(tuple(found), too_long)


def _file(path: Path) -> TextFile:
    return TextFile(path, field=FIELD, column_field=None)


def _token_ids(file: TextFile, tokenizer: Any) -> Iterator[tuple[int, ...]]:
    for row in read_rows(file):
        for prompt in _prompts(row):
            if isinstance(prompt, str):
                ids = tokenizer(prompt, verbose=False)["input_ids"]
            else:
                ids = _chat(row.where, prompt, tokenizer, file)
            if ids:
                yield tuple(ids)


def _prompts(row: Row) -> Sequence[str | Chat]:
    """Each line of a plain text; of a conversation all but an answer that ends it."""
    if isinstance(row.value, Chat):
        messages = row.value.messages
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return [replace(row.value, messages=asked)] if asked else []
    return [line for line in row.value.splitlines() if line.strip()] if row.section else [row.value]


def _chat(where: str, chat: Chat, tokenizer: Any, file: TextFile) -> list[int]:
    try:
        text = render_chat(chat, tokenizer, add_generation_prompt=True)
    except ValueError as error:
        hint = "give a column named text, or a tokenizer with a chat template"
        raise file.problem(f"holds chat messages ({where}) that cannot be read: {error}", hint) from error
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
