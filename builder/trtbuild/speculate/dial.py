"""A drafter that stands before others: it hands on to one of them, cuts drafts to a length, and counts."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

from trtbuild.runtime.drafts.draft import Ask, Draft, Drafter
from trtbuild.runtime.scheduler import Chunk
from trtbuild.runtime.sequence import Sequence
from trtbuild.runtime.step_logits import StepLogits


@dataclass(slots=True)
class Counts:
    """What was verified: `turns` of one sequence in one step behind its prompt, `drafts` that some of these had."""

    turns: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0


class Dial:
    """Lets one engine draft in turn with several drafters; `turn` is called while it has no requests."""

    def __init__(self, drafter: Drafter) -> None:
        self.counts = Counts()
        self.failed = False
        self._drafter, self._length = drafter, 1

    def turn(self, drafter: Drafter, length: int) -> None:
        """Draft with `drafter` from now on, at most `length` tokens, and count anew."""
        self._drafter, self._length, self.counts = drafter, length, Counts()

    def propose(self, asks: Many[Ask]) -> list[Draft | None]:
        """The drafter's own drafts."""
        return self._drafter.propose([replace(one, count=min(one.count, self._length)) for one in asks])

    def observe(self, chunks: Many[Chunk], step: StepLogits) -> None:
        """Count what a step has verified."""
        for chunk in chunks:
            behind_prompt = chunk.end - chunk.num_drafted > chunk.sequence.prompt_len
            self.counts.turns += chunk.is_last and behind_prompt
            if chunk.draft is not None:
                self.counts.drafts += 1
                self.counts.drafted += chunk.num_drafted
                self.counts.accepted += chunk.draft.accepted
        self._drafter.observe(chunks, step)

    def forget(self, sequence: Sequence) -> None:
        """Let the drafter let go of a request."""
        self._drafter.forget(sequence)

    def release(self) -> None:
        """The engine ends, or gives drafting up."""
        self.failed = True
        self._drafter.release()
