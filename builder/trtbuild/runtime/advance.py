"""What a chosen token means for its sequence: the next output, or the last."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TypeAlias

from trtbuild.errors import TrtbuildError
from trtbuild.runtime.outputs import FinishReason, Output, TokenLogprob
from trtbuild.runtime.sampler import Choice
from trtbuild.runtime.sequence import Sequence

# One sequence's news. A bare token: nothing else is to be said of it, and more will come.
StepResult: TypeAlias = "tuple[Sequence, Output | int]"


def advance(sequence: Sequence, choice: Choice) -> Output:
    """Add the chosen token and say whether it is the last."""
    if choice.error is not None:
        return failed(sequence, choice.error)
    sequence.append(choice.token_id)
    return news(sequence, choice, len(sequence.token_ids))


def failed(sequence: Sequence, error: TrtbuildError) -> Output:
    """The last output of a sequence that went wrong."""
    return Output(finished=True, finish_reason="error", error=error, metrics=sequence.metrics())


def news(sequence: Sequence, choice: Choice, length: int) -> Output:
    """What is to be said of a chosen token, with which the sequence has `length` known ones."""
    sequence.last_token_ns = time.monotonic_ns()
    first = length == sequence.prompt_len + 1
    if first:
        sequence.first_token_ns = sequence.last_token_ns
    reason, stop = _end(sequence, choice.token_id, length)
    prompt: tuple[TokenLogprob | None, ...] | None = None
    if first and sequence.params.prompt_logprobs is not None:
        prompt = tuple(sequence.prompt_logprobs)
    return Output(
        token_ids=(choice.token_id,),
        logprobs=None if choice.logprob is None else (choice.logprob,),
        prompt_logprobs=prompt,
        finished=reason is not None,
        finish_reason=reason,
        stop_reason=stop,
        metrics=sequence.metrics() if reason else None,
    )


def _end(sequence: Sequence, token_id: int, length: int) -> tuple[FinishReason | None, int | None]:
    """Why the sequence of `length` tokens ends with `token_id`, if it does, and the id to report."""
    params, output = sequence.params, length - sequence.prompt_len
    if output >= params.min_tokens:
        if token_id in sequence.end_ids:
            return "stop", None
        tokens = sequence.token_ids[sequence.prompt_len : length] if params.stop_words else []
        if token_id in sequence.stop_ids or any(_ends_with(tokens, word) for word in params.stop_words):
            return "stop", token_id
    return ("length", None) if output >= params.max_tokens else (None, None)


def _ends_with(tokens: list[int], word: Iterable[int]) -> bool:
    tail = list(word)
    return tokens[-len(tail) :] == tail
