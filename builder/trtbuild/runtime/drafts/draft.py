"""A proposal, and the interface of who makes one."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from trtbuild.runtime.scheduler import Chunk
    from trtbuild.runtime.sequence import Sequence
    from trtbuild.runtime.step_logits import StepLogits


@dataclass(slots=True, eq=False)
class Draft:
    """Tokens that may come next, and by which distributions they were drawn.

    `probs` [tokens, vocabulary] are those distributions; without them its drafter is sure of every token.
    """

    tokens: list[int]
    probs: torch.Tensor | None = None
    # How many of the tokens the model took, once it is known.
    accepted: int = 0

    def cut(self, count: int) -> Draft:
        """The first `count` tokens."""
        return Draft(self.tokens[:count], None if self.probs is None else self.probs[:count])


@dataclass(frozen=True, slots=True)
class Ask:
    """One sequence for which at most `count` tokens are to be drafted."""

    sequence: Sequence
    count: int

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
