"""A drafter that knows the answers and is wrong as often as it is told to be."""

from __future__ import annotations

import random
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any

import tiny
from trtbuild.runtime import Engine, SpeculativeConfig
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
