"""The prompts that are measured on: the first of a file that leave room for an answer.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.compress.prompts import NO_PROMPT, prompt_ids, prompts_of
from trtbuild.compress.textfiles import TextFile, read_rows
from trtbuild.errors import Problem, RecipeError

FIELD = "--prompts"


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
        raise RecipeError([Problem(FIELD, f"{path} is empty", NO_PROMPT[1])])
    if not any(True for row in read_rows(_file(path)) for _ in prompts_of(row)):
        raise _file(path).problem(*NO_PROMPT)


def read_prompts(path: Path, tokenizer: Any, *, count: int, longest: int) -> Prompts:
    """The first `count` prompts of at most `longest` tokens.

    Raises:
        RecipeError: the file is wrong, or has no such prompt.
    """
    file = _file(path)
    found: dict[tuple[int, ...], None] = {}
    too_long = 0
    for ids in prompt_ids(file, tokenizer):
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
        raise file.problem(*NO_PROMPT)
    return Prompts(tuple(found), too_long)


def _file(path: Path) -> TextFile:
    return TextFile(path, field=FIELD, column_field=None)
