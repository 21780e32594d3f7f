"""Acceptance by position: how often an exported draft foresees the target's own greedy answer.

For every place of an answer from which all positions lie inside it, each position's likeliest token is compared with
the answer's token there, with the answer's own tokens before it (teacher forcing). `match` is the share of equal ones;
`accepted` the share where all positions before are equal too, which is what greedy verification accepts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trtbuild.runtime.drafts.medusa import Head
from trtbuild.training.answers import Answered
from trtbuild.training.drafting import EagleDraft, Seen, eagle_logits, look
from trtbuild.training.request import Request

Draft = Callable[[Seen, Tensor], list[Tensor]]


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Shares by position, from the first token ahead on, over `places` in `answers`.

    `tokens_per_step` is 1 and the accepted shares: what one verification of a single path gives on the average.
    """

    places: int
    answers: int
    match: tuple[float, ...]
    accepted: tuple[float, ...]

    @property
    def tokens_per_step(self) -> float:
        """Tokens of an average step."""
        return 1 + sum(self.accepted)

    def to_json(self) -> dict[str, Any]:
        """As the result of a training has it."""
        return {
            "places": self.places,
            "answers": self.answers,
            "match": list(self.match),
            "accepted": list(self.accepted),
            "tokens_per_step": self.tokens_per_step,
        }


def measure(
    model: Any, draft: Draft, answered: Sequence[Answered], request: Request, advance: Callable[[], None]
) -> Acceptance:
    """The acceptance of `draft` on these answers; `advance` is told of each."""
    steps = request.positions
    with torch.inference_mode():
        equal = [_equal(model, draft, one, request, advance) for one in answered]
    rows = torch.cat([part for part in equal if len(part)]) if any(map(len, equal)) else torch.zeros(0, steps)
    places = len(rows)
    shares = rows.double().mean(0).tolist() if places else [0.0] * steps
    chain = rows.double().cumprod(dim=1).mean(0).tolist() if places else [0.0] * steps
    counted = sum(len(part) > 0 for part in equal)
    return Acceptance(places, counted, tuple(shares), tuple(chain))


def _equal(model: Any, draft: Draft, one: Answered, request: Request, advance: Callable[[], None]) -> Tensor:
    """[places, positions]: whether each position's token is the answer's.

    The place t has the target's state after token t, which is the prompt's last or one of the answer's; token t + 1 is
    the target's own, token t + 2 the first that is drafted.
    """
    steps = request.positions
    ids = torch.tensor(one.ids, device=model.device)
    first, last = len(one.prompt) - 1, len(ids) - 2 - steps
    advance()
    if last < first:
        return torch.zeros(0, steps)
    seen = look(model, ids, request.captured)
    proposed = draft(seen, ids)
    columns = [proposed[step][first : last + 1] == ids[first + 2 + step : last + 3 + step] for step in range(steps)]
    return torch.stack(columns, dim=1).cpu()


def medusa_draft(heads: Sequence[Head]) -> Draft:
    """Each head's likeliest token after every place."""

    def propose(seen: Seen, _: Tensor) -> list[Tensor]:
        return [head.logits(seen.hidden).argmax(-1) for head in heads]

    return propose


def eagle_draft(draft: EagleDraft, request: Request) -> Draft:
    """Each step's likeliest token at every root, as the target numbers it."""
    offsets = draft.tensors.get("d2t")

    def propose(seen: Seen, ids: Tensor) -> list[Tensor]:
        if seen.captured is None:
            raise ValueError("no layers were captured")
        best = [each.argmax(-1) for each in eagle_logits(draft, seen.captured, ids, request.ttt_steps)]
        return best if offsets is None else [each + offsets[each] for each in best]

    return propose
