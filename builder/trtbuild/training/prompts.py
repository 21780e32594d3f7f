"""The user's prompts as token ids: read, drawn, and divided into those that are learned from and those held out."""

from __future__ import annotations

import random
from dataclasses import dataclass

from trtbuild.compress.prompts import NO_PROMPT, prompt_ids
from trtbuild.compress.textdata import load_tokenizer
from trtbuild.compress.textfiles import TextFile
from trtbuild.errors import Problem, RecipeError
from trtbuild.training.request import Request

_FIELD = "speculative.train.prompts"
# Prompts are drawn from at most this many times those wanted: a file of many gigabytes is not read to its end.
_POOL_FACTOR = 8


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids of each prompt, no two alike; the held-out ones are never learned from.

    `left_out` counts those that were too long, `found` all that were read.
    """

    learned: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]
    found: int
    left_out: int


def load_prompts(request: Request) -> Prompts:
    """The prompts of `request`; the same for the same file, tokenizer and seed.

    Raises:
        RecipeError: the file or its column is wrong, or fewer than two prompts are left.
        ArtifactError: the checkpoint has no tokenizer that Transformers can load.
        HostError: a Parquet file, and pyarrow cannot be imported.
    """
    tokenizer = load_tokenizer(request.checkpoint, trust_remote_code=request.trust_remote_code)
    file = TextFile(request.prompts, request.column, field=_FIELD, column_field="speculative.train.column")
    longest = request.max_seq_len - request.max_answer_tokens
    pool: dict[tuple[int, ...], None] = {}
    found = left_out = 0
    for ids in prompt_ids(file, tokenizer):
        found += 1
        if len(ids) > longest:
            left_out += 1
        else:
            pool[ids] = None
        if len(pool) >= _POOL_FACTOR * request.samples:
            break
    if len(pool) < 2:
        raise _too_few(file, found, left_out, longest)
    chosen = random.Random(request.seed).sample(list(pool), min(request.samples, len(pool)))  # noqa: S311 -- no secret
    held = min(max(1, round(len(chosen) * request.held_out)), len(chosen) - 1)
    return Prompts(tuple(chosen[held:]), tuple(chosen[:held]), found, left_out)


def _too_few(file: TextFile, found: int, left_out: int, longest: int) -> RecipeError:
    if not found:
        return file.problem(*NO_PROMPT)
    if left_out:
        message = (
            f"{left_out} of {found} prompts of {file.path} are longer than {longest} tokens, and two others are needed"
        )
        return RecipeError([Problem("speculative.train.max_seq_len", message, "raise it, or give shorter prompts")])
    return file.problem(
        "holds one prompt, however often", "give two at least: some are held out to measure acceptance on"
    )
