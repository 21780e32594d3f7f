"""Answers as padded batches, in an order that follows from the seed alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtbuild.training.answers import Answered
from trtbuild.training.request import Request

IGNORED = -100  # torch.nn.CrossEntropyLoss leaves such labels out


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences padded on the right, all [batch, tokens].

    `foreseen` is 1 where the target's next token belongs to its answer; `following` is that token there, else
    `IGNORED`.
    """

    ids: Tensor
    mask: Tensor
    foreseen: Tensor
    following: Tensor


def make_batch(answered: Sequence[Answered], device: torch.device) -> Batch:
    """One batch of these answers."""
    longest = max(len(one.ids) for one in answered)
    ids, mask, foreseen = (torch.zeros(len(answered), longest, dtype=torch.long) for _ in range(3))
    for row, one in enumerate(answered):
        length = len(one.ids)
        ids[row, :length] = torch.tensor(one.ids)
        mask[row, :length] = 1
        foreseen[row, len(one.prompt) - 1 : length - 1] = 1
    following = torch.full_like(ids, IGNORED)
    following[:, :-1] = torch.where(foreseen[:, :-1] == 1, ids[:, 1:], IGNORED)
    return Batch(*(tensor.to(device) for tensor in (ids, mask, foreseen, following)))


def schedule(count: int, request: Request) -> list[list[int]]:
    """Which answers are in which step, over all epochs; each epoch has every answer once, in another order."""
    steps = []
    for epoch in range(request.epochs):
        order = list(range(count))
        random.Random(f"{request.seed}:{epoch}").shuffle(order)  # noqa: S311 -- no secret
        steps += [order[start : start + request.batch_size] for start in range(0, count, request.batch_size)]
    return steps


def frequent_tokens(answered: Iterable[Answered], size: int) -> list[int]:
    """The `size` tokens that stand most often in answers, ascending; where too few do, those of the lowest numbers."""
    counts = Counter(token for one in answered for token in one.answer)
    chosen = [token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))][:size]
    known = set(chosen)
    more = (token for token in range(size + len(known)) if token not in known)
    return sorted([*chosen, *(next(more) for _ in range(size - len(chosen)))])
