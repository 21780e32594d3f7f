"""What a computed step means for its sequences: the next tokens, the reported log-probabilities, the ends."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TypeAlias

import torch

from trtbuild.errors import TrtbuildError
from trtbuild.runtime.outputs import FinishReason, Output, TokenLogprob
from trtbuild.runtime.sampler import Choice, choose, not_finite, token_logprobs
from trtbuild.runtime.scheduler import Chunk
from trtbuild.runtime.sequence import Sequence
from trtbuild.runtime.step_logits import StepLogits

# One sequence's news. A bare token: nothing else is to be said of it, and more will come.
StepResult: TypeAlias = "tuple[Sequence, Output | int]"


def promise_tokens(chunks: list[Chunk], step: StepLogits) -> bool:
    """Keep places for the tokens of a launched step, if the device chooses all of them: the next step need not wait."""
    if step.likeliest is None or not all(chunk.sequence.plain for chunk in chunks):
        return False
    for chunk, rows in zip(chunks, step.rows, strict=True):
        if chunk.is_last:
            chunk.sequence.promise(rows.stop - 1)
    return True


def finish_promised(chunks: list[Chunk], step: StepLogits) -> list[StepResult]:
    """Put the tokens into the places that `promise_tokens` kept, and say what is new: little work for each.

    A sequence that has ended meanwhile gets nothing: it was in the step before its end was known.
    """
    assert step.likeliest is not None  # noqa: S101  else nothing was promised
    tokens = step.likeliest()
    now = time.monotonic_ns()
    results: list[StepResult] = []
    for chunk, rows in zip(chunks, step.rows, strict=True):
        sequence = chunk.sequence
        if sequence.finished:
            continue
        sequence.scheduled_ns = sequence.scheduled_ns or now
        if not chunk.is_last:
            continue
        sequence.unknown -= 1
        token_id = tokens[rows.stop - 1]
        if token_id < 0:
            results.append((sequence, _failed(sequence, not_finite())))
            continue
        place = chunk.end
        sequence.token_ids[place] = token_id
        output = place + 1 - sequence.prompt_len
        if output == 1 or output >= sequence.params.max_tokens or sequence.may_stop(token_id):
            results.append((sequence, _news(sequence, Choice(token_id), place + 1)))
            continue
        sequence.last_token_ns = now
        results.append((sequence, token_id))
    return results


def finish_step(chunks: list[Chunk], step: StepLogits) -> list[StepResult]:
    """Choose the next token of every sequence whose last token was computed, and say what is new of it."""
    live = [(chunk, rows) for chunk, rows in zip(chunks, step.rows, strict=True) if not chunk.sequence.finished]
    for chunk, rows in live:
        sequence = chunk.sequence
        sequence.scheduled_ns = sequence.scheduled_ns or time.monotonic_ns()
        if sequence.wants_every_position and chunk.start < sequence.prompt_len:
            _keep_prompt(chunk, step.logits[rows])
    ready = [(chunk, rows) for chunk, rows in live if chunk.is_last]
    scored = [chunk.sequence for chunk, _ in ready if chunk.sequence.logits is not None]
    results: list[StepResult] = [
        (one, Output(finished=True, finish_reason="length", metrics=one.metrics())) for one in scored
    ]
    generating = [(chunk.sequence, rows.stop - 1) for chunk, rows in ready if chunk.sequence.logits is None]
    if not generating:
        return results
    last = [row for _, row in generating]
    logits = step.logits if len(last) == step.logits.shape[0] else step.logits[last]
    sequences = [sequence for sequence, _ in generating]
    for sequence, choice in zip(sequences, choose(logits, sequences), strict=True):
        results.append((sequence, _advance(sequence, choice)))
    return results


def _keep_prompt(chunk: Chunk, logits: torch.Tensor) -> None:
    """Keep what is wanted of a prompt chunk's logits [count, V]; what a pre-empted sequence computes again is known."""
    sequence = chunk.sequence
    if sequence.logits is not None:
        known = sum(part.shape[0] for part in sequence.logits)
        sequence.logits.append(logits[known - chunk.start :].clone())
        return
    if not sequence.prompt_logprobs:
        sequence.prompt_logprobs.append(None)
    known = len(sequence.prompt_logprobs)
    # The logits at position p speak of the token at p + 1.
    targets = sequence.token_ids[known : min(chunk.end + 1, sequence.prompt_len)]
    if targets:
        rows = logits[known - 1 - chunk.start :][: len(targets)]
        sequence.prompt_logprobs += token_logprobs(rows, targets, sequence.params.prompt_logprobs or 0)


def _advance(sequence: Sequence, choice: Choice) -> Output:
    """Add the chosen token and say whether it is the last."""
    if choice.error is not None:
        return _failed(sequence, choice.error)
    sequence.append(choice.token_id)
    return _news(sequence, choice, len(sequence.token_ids))


def _failed(sequence: Sequence, error: TrtbuildError) -> Output:
    return Output(finished=True, finish_reason="error", error=error, metrics=sequence.metrics())


def _news(sequence: Sequence, choice: Choice, length: int) -> Output:
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
