"""From the logits of a step with drafts to the tokens that it brings: as many as were right, and one more.

Each place of a draft is looked at in turn, for all sequences together: the model's token there is chosen just as
without speculation, after the penalties, bans and random numbers of the tokens before it. A sequence goes on to its
next place while the draft holds that very token. So a greedy answer, and one with a seed, are token for token those of
an engine that drafts nothing. A token that was drawn goes by `acceptance.settle` instead.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import torch

from trtbuild.runtime.advance import StepResult, advance
from trtbuild.runtime.drafts.acceptance import settle
from trtbuild.runtime.drafts.draft import Draft
from trtbuild.runtime.outputs import Output, TokenLogprob
from trtbuild.runtime.sampler import Choice, adjust, choices, choose, distribution
from trtbuild.runtime.scheduler import Chunk

_NONE = Draft([])


@dataclass(slots=True)
class _Walk:
    """One sequence on its way through its draft, at the token at `place` there (-1: the last known one).

    `first` is the row of the logits behind the last known token; those behind the drafted ones follow.
    """

    chunk: Chunk
    draft: Draft
    first: int
    place: int = -1
    outputs: list[Output] = field(default_factory=list)

    @property
    def row(self) -> int:
        """The row of the logits that choose the next token."""
        return self.first + 1 + self.place

    @property
    def drawn(self) -> bool:
        """Whether the next token of the draft was drawn with a distribution."""
        return self.draft.probs is not None and len(self.outputs) < len(self.draft.tokens)

    def take(self, choice: Choice) -> bool:
        """Add the model's token; whether the next place of the draft is to be looked at."""
        sequence = self.chunk.sequence
        found = None if choice.error is not None else self.draft.behind(self.place, choice.token_id)
        if found is not None:
            self.place = found
            self.draft.path.append(found)
            sequence.accepted += 1
        self.outputs.append(advance(sequence, choice))
        return found is not None and not self.outputs[-1].finished

    def result(self) -> StepResult:
        """The news of the sequence, whose keys and values are right up to its last token but one."""
        sequence = self.chunk.sequence
        if self.chunk.draft is not None:
            sequence.num_computed = len(sequence.token_ids) - 1
        return sequence, self.outputs[0] if len(self.outputs) == 1 else _joined(self.outputs)


def verify(ready: Many[tuple[Chunk, slice]], logits: torch.Tensor) -> list[StepResult]:
    """The news of every sequence whose last known token was computed.

    Args:
        ready: the chunks with their rows of `logits`: of a draft's every token, and of the token before it.
        logits: of the step, [rows, V].
    """
    walks = [_Walk(chunk, chunk.draft or _NONE, rows.stop - 1 - chunk.num_drafted) for chunk, rows in ready]
    for walk in walks:
        walk.chunk.sequence.drafted += len(walk.draft.tokens)
    going = walks
    while going:
        rows = logits[[walk.row for walk in going]]
        found = _choose(rows, going)
        going = [walk for walk, choice in zip(going, found, strict=True) if walk.take(choice)]
    return [walk.result() for walk in walks]


def _choose(logits: torch.Tensor, walks: list[_Walk]) -> list[Choice]:
    """The model's token at each walk's place, from `logits` [B, V]."""
    found: dict[int, Choice] = {}
    plain = [index for index, walk in enumerate(walks) if not walk.drawn]
    if plain:
        rows = logits if len(plain) == len(walks) else logits[plain]
        chosen = choose(rows, [walks[index].chunk.sequence for index in plain])
        found.update(zip(plain, chosen, strict=True))
    drawn = [index for index, walk in enumerate(walks) if walk.drawn]
    if drawn:
        found.update(zip(drawn, _settle(logits[drawn], [walks[index] for index in drawn]), strict=True))
    return [found[index] for index in range(len(walks))]


def _settle(logits: torch.Tensor, walks: list[_Walk]) -> list[Choice]:
    """As `_choose`, for drafts with distributions."""
    sequences = [walk.chunk.sequence for walk in walks]
    adjusted = adjust(logits, sequences)
    finite: list[bool] = adjusted.max(dim=-1).values.isfinite().tolist()
    tokens = [0] * len(walks)
    for row, walk in enumerate(walks):
        draft, place = walk.draft, len(walk.outputs)
        if finite[row] and draft.probs is not None:
            target = distribution(adjusted[row], sequences[row])
            tokens[row] = settle(target, draft.probs[place], draft.tokens[place], sequences[row].rng.random)
    return choices(logits, sequences, tokens, finite)


def _joined(outputs: Many[Output]) -> Output:
    """The outputs of one step as one: the last says how the sequence ends, the first what came with it."""
    last = outputs[-1]
    logprobs: list[TokenLogprob] = [one for output in outputs for one in output.logprobs or ()]
    return Output(
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        logprobs=tuple(logprobs) if logprobs else None,
        prompt_logprobs=outputs[0].prompt_logprobs,
        finished=last.finished,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        error=last.error,
        metrics=last.metrics,
    )
