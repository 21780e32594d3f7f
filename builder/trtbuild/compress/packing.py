"""Text to samples of token ids: packed one after another into full windows, or a document in each.

Where the tokenizer begins every text with a token of its own (BOS), every sample begins with it too, because such
models predict badly without it. Nothing is padded: a sample that is shorter than others goes through the model as it
is, so that no padding can widen a range or enter a Hessian.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from trtbuild.recipe_fields import MIN_CALIBRATION_LENGTH

from .chat import Chat, render_chat
from .textfiles import Row, TextFile, read_rows

# Samples are drawn from at most this many times the text needed: a file of many gigabytes is not read to its end.
_POOL_FACTOR = 8
# Lines this long are unlikely to be equal by chance.
_PASSAGE_CHARS = 60
_BLANK_LINES = re.compile(r"\n\s*\n")


@dataclass(frozen=True, slots=True)
class Pool:
    """What samples are drawn from.

    Args:
        windows: The samples.
        tokens: Of all text that was read.
        documents: That were read.
        prefix: The ids that the tokenizer puts before every text.
        passages: Digests of long lines of the documents.
        starts: Of the packed documents: where each begins in the row of all tokens; empty where nothing is packed.
        short: Documents that were passed over, being shorter than the shortest sample.
    """

    windows: list[tuple[int, ...]]
    tokens: int
    documents: int
    prefix: tuple[int, ...]
    passages: frozenset[bytes]
    starts: list[int] = field(default_factory=list)
    short: int = 0

    def documents_in(self, chosen: Sequence[int]) -> int:
        """How many documents the windows with these numbers hold a part of."""
        if not self.starts:
            return len(chosen)
        body = len(self.windows[0]) - len(self.prefix)
        touched: set[int] = set()
        for index in chosen:
            first = bisect_right(self.starts, index * body) - 1
            touched.update(range(first, bisect_left(self.starts, (index + 1) * body)))
        return len(touched)


def pack(file: TextFile, tokenizer: Any, length: int, *, needed: int) -> Pool:
    """All full windows of `length` tokens of the file, or of its beginning if it holds far more than needed."""
    prefix = text_prefix(tokenizer)
    body = length - len(prefix)
    limit = _POOL_FACTOR * needed * body
    ids: list[int] = []
    starts: list[int] = []
    found: set[bytes] = set()
    for row in read_rows(file):
        found.update(passages(row))
        starts.append(len(ids))
        ids += _ids(_text(row, tokenizer, file), tokenizer)
        if len(ids) >= limit:
            break
    _refuse_nothing(file, ids)
    return Pool(full_windows(ids, prefix, body), len(ids), len(starts), prefix, frozenset(found), starts)


def lay_out(file: TextFile, tokenizer: Any, length: int, *, needed: int) -> Pool:
    """A window for each document, cut to `length`; a plain text file's documents are its paragraphs."""
    prefix = text_prefix(tokenizer)
    windows: list[tuple[int, ...]] = []
    tokens = short = 0
    for row in read_rows(file):
        for text in _documents(row, tokenizer, file):
            window = _fitted(prefix, _ids(text, tokenizer), length)
            tokens += len(window)
            if len(window) < MIN_CALIBRATION_LENGTH:
                short += 1
            else:
                windows.append(window)
        if len(windows) >= _POOL_FACTOR * needed:
            break
    _refuse_nothing(file, windows or ([0] if short else []))
    return Pool(windows, tokens, len(windows) + short, prefix, frozenset(), short=short)


def full_windows(ids: Sequence[int], prefix: tuple[int, ...], body: int) -> list[tuple[int, ...]]:
    """`ids` in full windows of `body` tokens, each with the prefix before it; what is left over at the end goes."""
    return [prefix + tuple(ids[start : start + body]) for start in range(0, len(ids) - body + 1, body)]


def begun(prefix: tuple[int, ...], ids: Sequence[int]) -> tuple[int, ...]:
    """`ids` with the prefix before them, which chat templates may have written themselves."""
    return tuple(ids) if tuple(ids[: len(prefix)]) == prefix else prefix + tuple(ids)


def text_prefix(tokenizer: Any) -> tuple[int, ...]:
    """The ids that the tokenizer puts before every text, usually none or BOS."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start])
    return ()


def passages(row: Row) -> Iterator[bytes]:
    """Digests of the long lines of a document; of the whole document if it has none."""
    text = row.value if isinstance(row.value, str) else row.value.spoken()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    long = [line for line in lines if len(line) >= _PASSAGE_CHARS] or [" ".join(lines)]
    for line in long:
        yield hashlib.blake2b(line.encode(), digest_size=16).digest()


def sample_length(tokens: int, length: int) -> int:
    """The length of a sample that is made of a document of `tokens`: at most `length`, else a multiple of 16.

    What a layer is called with is kept for each length, so that there must not be as many lengths as documents.
    """
    return length if tokens >= length else tokens // MIN_CALIBRATION_LENGTH * MIN_CALIBRATION_LENGTH


def _fitted(prefix: tuple[int, ...], ids: list[int], length: int) -> tuple[int, ...]:
    whole = begun(prefix, ids)
    return whole[: sample_length(len(whole), length)]


def _ids(text: str, tokenizer: Any) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _text(row: Row, tokenizer: Any, file: TextFile) -> str:
    if isinstance(row.value, str):
        # A section of a plain text file ends with its line; a document of one line is set apart by a blank one.
        return row.value if row.section else row.value.rstrip("\n") + "\n\n"
    return _rendered(row.where, row.value, tokenizer, file)


def _documents(row: Row, tokenizer: Any, file: TextFile) -> list[str]:
    if not isinstance(row.value, str):
        return [_rendered(row.where, row.value, tokenizer, file)]
    if not row.section:
        return [row.value]
    return [text for text in _BLANK_LINES.split(row.value) if text.strip()]


def _rendered(where: str, chat: Chat, tokenizer: Any, file: TextFile) -> str:
    if not tokenizer.chat_template:
        hint = "give a column of text, or a tokenizer with a chat template"
        raise file.problem(f"holds chat messages ({where}), but the tokenizer has no chat template", hint)
    try:
        return render_chat(chat, tokenizer)
    except ValueError as error:
        raise file.problem(f"has messages in {where} that the chat template refuses: {error}") from error


def _refuse_nothing(file: TextFile, found: Sequence[Any]) -> None:
    if not found:
        raise file.problem("holds no text", "give a file with text, or leave the field out to use the shipped text")
