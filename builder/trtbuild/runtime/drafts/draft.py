"""A proposal, and the interface of who makes one."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from trtbuild.runtime.scheduler import Chunk
    from trtbuild.runtime.sequence import Sequence
    from trtbuild.runtime.step_logits import StepLogits


@dataclass(slots=True, eq=False)
class Draft:
    """Tokens that may come next, and by which distributions they were drawn.

    `probs` [tokens, vocabulary] are those distributions; without them its drafter is sure of every token. `parents`
    makes a tree of the tokens: the place in `tokens` of the one before each, which comes earlier there, -1 for the last
    known token. Without it each follows the one before.
    """

    tokens: list[int]
    probs: torch.Tensor | None = None
    parents: list[int] | None = None
    # The places of the tokens that the model took, once it is known.
    path: list[int] = field(default_factory=list)

    @property
    def accepted(self) -> int:
        """How many of the tokens the model took."""
        return len(self.path)

    def parent(self, place: int) -> int:
        """The place of the token before that at `place`, -1 for the last known one."""
        return place - 1 if self.parents is None else self.parents[place]

    def behind(self, place: int, token: int) -> int | None:
        """The place of `token` behind that at `place`, None where it was not drafted."""
        if self.parents is None:
            return place + 1 if place + 1 < len(self.tokens) and self.tokens[place + 1] == token else None
        places = range(place + 1, len(self.tokens))
        return next((at for at in places if self.parents[at] == place and self.tokens[at] == token), None)

    def cut(self, count: int) -> Draft:
        """The first `count` tokens."""
        probs = None if self.probs is None else self.probs[:count]
        return Draft(self.tokens[:count], probs, None if self.parents is None else self.parents[:count])


@dataclass(frozen=True, slots=True)
class Ask:
    """One sequence for which at most `count` tokens in a row are to be drafted, and at most `room` in a tree."""

    sequence: Sequence
    count: int
    room: int = 0

    @property
    def may_sample(self) -> bool:
        """Whether tokens may be drawn with their distributions.

        A seed promises the tokens that come without speculation: tokens that are merely compared with them keep that.
        """
        params = self.sequence.params
        return not params.is_greedy and params.seed is None


class Drafter(Protocol):
    """Proposes tokens; called in the engine's thread alone."""

    def propose(self, asks: Many[Ask]) -> list[Draft | None]:
        """What may come behind the known tokens of each sequence; None where nothing is proposed."""

    def observe(self, chunks: Many[Chunk], step: StepLogits) -> None:
        """See what a step has computed, with the tokens that it brought already in their sequences."""

    def forget(self, sequence: Sequence) -> None:
        """Let go of what is held for a sequence that has ended."""

    def release(self) -> None:
        """Give all memory back."""
