"""A drafter that knows the answers and is wrong as often as it is told to be."""

from __future__ import annotations

import random
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any

import tiny
from trtbuild.runtime import Engine, SamplingParams, SpeculativeConfig
from trtbuild.runtime.drafts.draft import Ask, Draft
from trtbuild.runtime.drafts.speculation import Speculation


@dataclass
class Oracle:
    """Drafts the tokens of `texts` that begin like a sequence, each right with probability `accuracy`."""

    texts: list[list[int]]
    accuracy: float
    numbers: random.Random = field(default_factory=lambda: random.Random(0))
    lengths: list[int] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)

    def propose(self, asks: Many[Ask]) -> list[Draft | None]:
        self.batches.append(len(asks))
        return [self._propose(ask) for ask in asks]

    def _propose(self, ask: Ask) -> Draft | None:
        known = ask.sequence.token_ids
        self.lengths.append(ask.count)
        text = next((text for text in self.texts if text[: len(known)] == known), None)
        right = [] if text is None else text[len(known) :]
        tokens = [
            right[place] if place < len(right) and self.numbers.random() < self.accuracy else self._any()
            for place in range(ask.count)
        ]
        return Draft(tokens) if tokens else None

    def _any(self) -> int:
        return self.numbers.randrange(tiny.VOCAB_SIZE)

    def observe(self, chunks: Any, step: Any) -> None:
        """Nothing to see."""

    def forget(self, sequence: Any) -> None:
        self.forgotten.append(sequence.request_id)

    def release(self) -> None:
        """Nothing to give back."""


def with_oracle(engine: Engine, texts: list[list[int]], accuracy: float = 0.7, **section: Any) -> Oracle:
    """Have `engine`, which speculates not, draft with an oracle."""
    oracle = Oracle(texts, accuracy)
    config = SpeculativeConfig("ngram", **({"max_draft_len": 5} | section))
    engine._speculation = Speculation(config, oracle, engine._scheduler._config)
    return oracle


def own_drafts(engine: Engine, prompt: list[int], tokens: int, right: list[int] | None = None) -> dict[int, list[int]]:
    """What the engine's drafter proposes for one request, by the length of the text behind which it does.

    With `right`, the text as it will be, what is verified in its place are two right tokens and a wrong one, so that
    drafts are taken in part.
    """
    drafter: Any = engine._speculation._drafter  # type: ignore[union-attr]
    propose, found = drafter.propose, {}

    def watched(asks: Many[Ask]) -> list[Draft | None]:
        drafts = propose(asks)
        length = len(asks[0].sequence.token_ids)
        if drafts[0] is not None:
            found[length] = list(drafts[0].tokens)
        if right is None:
            return drafts
        wrong = [(token + 1) % tiny.VOCAB_SIZE for token in right]
        mixed = [*right[length : length + 2], *wrong[length + 2 : length + 3]]
        return [Draft(mixed[: asks[0].count])]

    drafter.propose = watched
    try:
        engine.generate([prompt], SamplingParams(max_tokens=tokens, ignore_eos=True))
    finally:
        drafter.propose = propose
    return found
