"""The rule by which a drawn draft token is taken, so that the output's distribution stays the model's own.

Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding", https://arxiv.org/abs/2211.17192,
algorithm 1; Chen et al., "Accelerating Large Language Model Decoding with Speculative Sampling",
https://arxiv.org/abs/2302.01318, algorithm 2. Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def settle(target: torch.Tensor, draft: torch.Tensor, token: int, draw: Callable[[], float]) -> int:
    """The token at a drafted place: `token` with probability min(1, p/q), else one of the residual max(0, p - q).

    `token` was drawn from `draft`. The residual is zero at a token that is refused, so the result differs from it then.

    Args:
        target: p, the model's distribution there [V].
        draft: q, the distribution that the token was drawn from [V].
        token: what was drawn.
        draw: gives a fresh number from 0 to 1, each time it is called.
    """
    if draw() * float(draft[token]) < float(target[token]):
        return token
    residual = (target - draft).clamp_(min=0.0)
    # Where rounding alone has refused the token, nothing is left: the distributions are equal.
    return pick(residual if float(residual.sum()) > 0 else target, draw())


def pick(weights: torch.Tensor, draw: float) -> int:
    """The first place of `weights` [V] (need not sum to 1) whose cumulative share exceeds `draw`."""
    cumulative = weights.double().cumsum(dim=-1)
    total = cumulative[-1:]
    place = torch.searchsorted(cumulative, draw * total, right=True)
    # A draw next to 1 may round up to the total: the last place with any weight is meant.
    return int(torch.minimum(place, torch.searchsorted(cumulative, total)))
