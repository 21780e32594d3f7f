"""From logits to tokens: penalties and bans, the choice itself, and log-probabilities.

Legend: B rows (sequences that get a token in this step), V vocabulary, W candidates of a row, likeliest first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trtbuild.errors import RequestError, ToolError, TrtbuildError
from trtbuild.runtime.outputs import TokenLogprob
from trtbuild.runtime.sequence import Sequence

# Candidates that are sorted first where top_k does not say how many; all are sorted when these do not hold top_p.
_CANDIDATES = 256


@dataclass(frozen=True, slots=True)
class Choice:
    """The token chosen for one sequence, or why none could be."""

    token_id: int
    logprob: TokenLogprob | None = None
    error: TrtbuildError | None = None


def choose(logits: torch.Tensor, sequences: list[Sequence]) -> list[Choice]:
    """The next token of each sequence from `logits` [B, V], which stay as they are."""
    adjusted = adjust(logits, sequences)
    best, greedy = adjusted.max(dim=-1)
    finite = best.isfinite().tolist()
    tokens: list[int] = greedy.tolist()
    for rows in _sampling_groups(sequences, finite):
        chosen = _sample(adjusted[rows], [sequences[row] for row in rows])
        for row, token_id in zip(rows, chosen, strict=True):
            tokens[row] = token_id
    return choices(logits, sequences, tokens, finite)


def adjust(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """`logits` [B, V] with each sequence's penalties and bans; they stay as they are."""
    changing = [row for row, sequence in enumerate(sequences) if sequence.params.changes_logits]
    if not changing:
        return logits
    adjusted = logits.clone()
    for row in changing:
        _adjust(adjusted[row], sequences[row])
    return adjusted


def choices(logits: torch.Tensor, sequences: list[Sequence], tokens: list[int], finite: list[bool]) -> list[Choice]:
    """What is said of the `tokens` chosen from `logits` [B, V]; where they are not `finite` none could be."""
    logprobs = _chosen_logprobs(logits, sequences, tokens)
    return [
        Choice(token, logprobs[row]) if good else Choice(0, error=no_token(logits[row]))
        for row, (token, good) in enumerate(zip(tokens, finite, strict=True))
    ]


def distribution(logits: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """The probabilities [V] (float64) by which a token of adjusted `logits` [V] is drawn for a sampling sequence."""
    probs = torch.softmax(logits / (sequence.params.temperature or 1.0), dim=-1).double()
    if _num_candidates(sequence) == 0:
        return probs
    every, order = probs.sort(descending=True, stable=True)
    keep, _ = _keep(every[None], [sequence])
    kept = torch.zeros_like(probs).scatter_(0, order, every * keep[0])
    return kept / kept.sum()


def token_logprobs(logits: torch.Tensor, token_ids: list[int], count: int) -> list[TokenLogprob]:
    """The log-probability of one token a row of `logits` [B, V], with the `count` likeliest; computed in float64."""
    wide = logits.double()
    totals = wide.logsumexp(dim=-1, keepdim=True)
    chosen = wide.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])
    ranks = ((wide > chosen).sum(dim=-1) + 1).tolist()
    values = (chosen - totals).squeeze(1).tolist()
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(token_ids)
    if count:
        best = wide.topk(count, dim=-1)
        pairs = zip(best.indices.tolist(), (best.values - totals).tolist(), strict=True)
        tops = [tuple(zip(ids, numbers, strict=True)) for ids, numbers in pairs]
    return [TokenLogprob(*found) for found in zip(token_ids, values, ranks, tops, strict=True)]


def _adjust(row: torch.Tensor, sequence: Sequence) -> None:
    """Apply the penalties and bans of one sequence to its logits [V], in place."""
    params = sequence.params
    if params.repetition_penalty != 1.0:
        # CTRL, https://arxiv.org/abs/1909.05858 section 4.1; both signs as Transformers does it.
        ids = torch.tensor(list(sequence.seen_ids), device=row.device)
        seen = row[ids]
        row[ids] = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
    if sequence.output_counts:
        ids = torch.tensor(list(sequence.output_counts), device=row.device)
        counts = torch.tensor(list(sequence.output_counts.values()), device=row.device, dtype=row.dtype)
        row[ids] -= params.presence_penalty + params.frequency_penalty * counts
    banned = _banned(sequence)
    if banned:
        row[torch.tensor(banned, device=row.device)] = float("-inf")


def _banned(sequence: Sequence) -> list[int]:
    """The tokens that must not come next."""
    banned: list[int] = []
    if sequence.num_output < sequence.params.min_tokens:
        banned += sequence.end_ids | sequence.stop_ids
        banned += [word[0] for word in sequence.params.stop_words if len(word) == 1]
    for word in sequence.params.bad_words:
        head = list(word[:-1])
        if not head or sequence.token_ids[-len(head) :] == head:
            banned.append(word[-1])
    return banned


def _sampling_groups(sequences: list[Sequence], finite: list[bool]) -> list[list[int]]:
    """The rows to sample, those with the same number of candidates together.

    A row's group depends on its own parameters alone, so that its token does not depend on the rest of the batch.
    """
    groups: dict[int, list[int]] = {}
    for row, sequence in enumerate(sequences):
        if finite[row] and not sequence.params.is_greedy:
            groups.setdefault(_num_candidates(sequence), []).append(row)
    return list(groups.values())


def _num_candidates(sequence: Sequence) -> int:
    """How many of the likeliest tokens to look at: 0 means all of them, unsorted."""
    params = sequence.params
    if params.top_k:
        return params.top_k
    return _CANDIDATES if (params.top_p or 1.0) < 1.0 or params.min_p else 0


def _sample(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    """One token a row of `logits` [B, V] by inverting the cumulative distribution at one random number each."""
    temperatures = [sequence.params.temperature or 1.0 for sequence in sequences]
    probs = torch.softmax(logits / _column(temperatures, logits), dim=-1).double()
    draws = _column([sequence.rng.random() for sequence in sequences], probs)
    count = _num_candidates(sequences[0])
    if count == 0:
        return _invert(probs, draws, None)
    count = min(count, probs.shape[1])
    kept, ids = probs.topk(count, dim=-1)
    keep, enough = _keep(kept, sequences)
    tokens = _invert(kept * keep, draws, ids)
    if count < probs.shape[1]:
        short = (~enough).nonzero().flatten().tolist()
        if short:
            every, order = probs[short].sort(dim=-1, descending=True, stable=True)
            keep, _ = _keep(every, [sequences[row] for row in short])
            for row, token_id in zip(short, _invert(every * keep, draws[short], order), strict=True):
                tokens[row] = token_id
    return tokens


def _keep(probs: torch.Tensor, sequences: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which candidates [B, W] stay, and for which rows [B] that is sure without looking at less likely tokens."""
    ranks = torch.arange(probs.shape[1], device=probs.device)
    total = probs.shape[1]
    top_k = _column([float(sequence.params.top_k or total + 1) for sequence in sequences], probs)
    top_p = _column([1.0 if sequence.params.top_p is None else sequence.params.top_p for sequence in sequences], probs)
    min_p = _column([sequence.params.min_p or 0.0 for sequence in sequences], probs)
    within = ranks < top_k
    before = (probs * within).cumsum(dim=-1) - probs
    # top_p is a share of what top_k left; without top_k that is everything.
    mass = torch.where(top_k <= total, (probs * within).sum(dim=-1, keepdim=True), torch.ones_like(top_p))
    keep = within & ((before < top_p * mass) | (top_p >= 1.0)) & (probs >= min_p * probs[:, :1])
    keep[:, 0] = True
    return keep, ~keep[:, -1] | (top_k.squeeze(1) <= total)


def _invert(weights: torch.Tensor, draws: torch.Tensor, ids: torch.Tensor | None) -> list[int]:
    """For each row of `weights` [B, W] (need not sum to 1) the first place whose cumulative share exceeds `draws`."""
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    places = torch.searchsorted(cumulative, draws * total, right=True)
    # A draw next to 1 may round up to the total: the last place with any weight is meant.
    last = torch.searchsorted(cumulative, total)
    places = torch.minimum(places, last)
    chosen: list[int] = (places if ids is None else ids.gather(1, places)).flatten().tolist()
    return chosen


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype)[:, None]


def _chosen_logprobs(logits: torch.Tensor, sequences: list[Sequence], tokens: list[int]) -> list[TokenLogprob | None]:
    found: list[TokenLogprob | None] = [None] * len(sequences)
    groups: dict[int, list[int]] = {}
    for row, sequence in enumerate(sequences):
        if sequence.params.logprobs is not None:
            groups.setdefault(sequence.params.logprobs, []).append(row)
    for count, rows in groups.items():
        for row, value in zip(rows, token_logprobs(logits[rows], [tokens[row] for row in rows], count), strict=True):
            found[row] = value
    return found


def not_finite() -> TrtbuildError:
    """What is wrong where the likeliest token is none."""
    return ToolError("the model's logits are not finite", "check the checkpoint's scales and its quality evidence")


def no_token(logits: torch.Tensor) -> TrtbuildError:
    """Why no token of `logits` can be chosen."""
    if logits.isnan().any() or not logits.max().isfinite():
        return not_finite()
    return RequestError(
        "bad_words and min_tokens forbid every token of the vocabulary", "allow at least one token to come next"
    )
