"""Prompts of a file as token ids: lines of text as they are, conversations through the chat template.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from trtbuild.compress.chat import Chat, render_chat
from trtbuild.compress.textfiles import Row, TextFile, read_rows

NO_PROMPT = ("holds no prompt", "give a file with prompts like those that will be served")


def prompts_of(row: Row) -> Sequence[str | Chat]:
    """The prompts of one row: each line of a plain text; of a conversation all but an answer that ends it."""
    if isinstance(row.value, Chat):
        messages = row.value.messages
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return [replace(row.value, messages=asked)] if asked else []
    return [line for line in row.value.splitlines() if line.strip()] if row.section else [row.value]


def prompt_ids(file: TextFile, tokenizer: Any) -> Iterator[tuple[int, ...]]:
    """The token ids of every prompt, none of them empty.

    Raises:
        RecipeError: the file or its column is wrong, or a conversation does not go through the template.
        HostError: a Parquet file, and pyarrow cannot be imported.
    """
    for row in read_rows(file):
        for prompt in prompts_of(row):
            if isinstance(prompt, str):
                ids = tokenizer(prompt, verbose=False)["input_ids"]
            else:
                ids = _chat(row.where, prompt, tokenizer, file)
            if ids:
                yield tuple(ids)


def _chat(where: str, chat: Chat, tokenizer: Any, file: TextFile) -> list[int]:
    try:
        text = render_chat(chat, tokenizer, add_generation_prompt=True)
    except ValueError as error:
        column = "a column named text" if file.column_field is None else "a column of text"
        hint = f"give {column}, or a tokenizer with a chat template"
        raise file.problem(f"holds chat messages ({where}) that cannot be read: {error}", hint) from error
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
