"""Trees of drafts: what a token sees, whose keys are kept, and that answers stay the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from runtime.fp8 import fp8_checkpoint
from runtime.oracle import Oracle, with_oracle
from runtime.test_speculation import TIGHT, every_kind, make_prompts, run, same, texts
from trtbuild.errors import ArtifactError
from trtbuild.runtime import Engine, SpeculativeConfig
from trtbuild.runtime.drafts.draft import Ask, Draft
from trtbuild.runtime.drafts.tree import tree_of

Load = Callable[..., Engine]
WIDTH = 3


def test_a_token_sees_those_on_its_way() -> None:
    tree = tree_of((-1, -1, 0, 0, 2))
    assert tree.depths == (0, 1, 1, 2, 2, 3)
    assert tree.sees.int().tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0], [1, 1, 0, 0, 1, 0], [1, 1, 0, 1, 0, 1],
    ]  # fmt: skip


class TreeOracle(Oracle):
    """Three tokens behind every right one, the right one among them in any place as often as it is told."""

    def _propose(self, ask: Ask) -> Draft | None:
        known = ask.sequence.token_ids
        text = next((text for text in self.texts if text[: len(known)] == known), None)
        tokens: list[int] = []
        parents: list[int] = []
        parent = -1
        for depth in range(min(ask.count, (ask.room - 1) // WIDTH)):
            place = len(known) + depth
            row = self.numbers.sample(range(tiny.VOCAB_SIZE), WIDTH)
            right = self.numbers.randrange(WIDTH)
            if text is not None and place < len(text) and self.numbers.random() < self.accuracy:
                row = [text[place] if at == right else other for at, other in enumerate(row) if other != text[place]]
            tokens += row
            parents += [parent] * len(row)
            parent = len(tokens) - len(row) + min(right, len(row) - 1)
        return Draft(tokens, parents=parents) if tokens else None


def with_trees(engine: Engine, answers: list[list[int]], accuracy: float = 0.8) -> None:
    oracle = with_oracle(engine, answers, accuracy)
    engine._speculation._drafter = TreeOracle(oracle.texts, accuracy, random.Random(1))  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "qwen3", "gpt_oss"])
@pytest.mark.parametrize("limits", [{}, TIGHT], ids=["roomy", "tight"])
def test_answers_are_the_same(engine: Load, name: str, limits: dict[str, Any]) -> None:
    prompts = make_prompts(0)
    expected = run(engine(name), prompts)
    drafting = engine(name, **limits)
    with_trees(drafting, texts(prompts, expected))
    moved: list[int] = []
    keep = drafting._runner.keep_paths

    def watched(chunks: Any) -> None:
        paths = [chunk.draft.path for chunk in chunks if chunk.draft is not None]
        moved.extend(path != list(range(len(path))) for path in paths)
        keep(chunks)

    drafting._runner.keep_paths = watched  # type: ignore[method-assign]
    for _ in range(2):
        assert [one.token_ids for one in run(drafting, prompts)] == [one.token_ids for one in expected]
    # The answers' own keys were moved about: longer texts begin in blocks of them.
    longer = [[*text, 9] for text in texts(prompts, expected)]
    plain = run(engine(name), longer)
    assert [one.token_ids for one in run(drafting, longer)] == [one.token_ids for one in plain]
    assert sum(moved) > 5
    stats = drafting.stats()
    assert stats.accepted_draft_tokens > 40
    assert stats.free_blocks == stats.total_blocks


def test_every_way_to_choose_in_a_cache_of_codes(engine: Load, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = fp8_checkpoint(checkpoint("llama"), tmp_path / "fp8", kv=True)
    prompts = make_prompts(2)
    plain, drafting = engine(path=path, dtype="fp8"), engine(path=path, dtype="fp8")
    kinds = every_kind(run(plain, prompts))
    expected = run(plain, prompts, kinds)
    with_trees(drafting, texts(prompts, expected))
    for one, other in zip(run(drafting, prompts, kinds), expected, strict=True):
        same(one, other)
    assert drafting.stats().accepted_draft_tokens > 10


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        (((0,), (1, 0)), "is no tree; name every path that a longer one goes on from, once"),
        (((0,), (0,)), "is no tree"),
        ((), "is no list of paths of ranks for medusa"),
        (((0,), (-1,)), "is no list of paths of ranks for medusa"),
    ],
)
def test_a_tree_that_is_none(choices: Any, sentence: str) -> None:
    with pytest.raises(ArtifactError, match=sentence):
        SpeculativeConfig("medusa", draft="draft", choices=choices)
