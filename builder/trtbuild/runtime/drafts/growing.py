"""Drafts while they are made: the next token of each from a drafter's logits."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from trtbuild.runtime.drafts.acceptance import pick
from trtbuild.runtime.drafts.draft import Ask, Draft
from trtbuild.runtime.sampler import distribution


@dataclass(slots=True)
class Growing:
    """The draft of one request so far."""

    ask: Ask
    tokens: list[int] = field(default_factory=list)
    probs: list[torch.Tensor] = field(default_factory=list)
    # The drafter's logits were not finite: the draft ends here.
    is_broken: bool = False

    @property
    def wants_more(self) -> bool:
        """Whether another token is to be drafted."""
        return not self.is_broken and len(self.tokens) < self.ask.count

    def draft(self) -> Draft | None:
        """What was drafted."""
        if not self.tokens:
            return None
        return Draft(self.tokens, torch.stack(self.probs) if self.probs else None)


def grow(drafts: Many[Growing], logits: torch.Tensor, vocab_size: int) -> None:
    """Put the next token behind each draft, from `logits` [drafts, V of the drafter].

    The likeliest one, or for requests that may sample one that is drawn as their own tokens are. `vocab_size` is the
    model's, which may be another than the drafter's.
    """
    logits = logits[:, :vocab_size]
    best, greedy = logits.max(dim=-1)
    finite, likeliest = best.isfinite().tolist(), greedy.tolist()
    for index, one in enumerate(drafts):
        if not finite[index]:
            one.is_broken = True
        elif one.ask.may_sample:
            probs = distribution(logits[index], one.ask.sequence)
            one.tokens.append(pick(probs, one.ask.sequence.rng.random()))
            one.probs.append(functional.pad(probs, (0, vocab_size - probs.shape[0])))
        else:
            one.tokens.append(likeliest[index])
