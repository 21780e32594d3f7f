"""What a computed step means for its sequences: the next tokens, the reported log-probabilities, the ends."""

from __future__ import annotations

import time

import torch

from trtbuild.runtime.advance import StepResult, advance, failed, news
from trtbuild.runtime.drafts.verify import verify
from trtbuild.runtime.outputs import Output
from trtbuild.runtime.sampler import Choice, choose, not_finite, token_logprobs
from trtbuild.runtime.scheduler import Chunk
from trtbuild.runtime.step_logits import StepLogits


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
            results.append((sequence, failed(sequence, not_finite())))
            continue
        place = chunk.end
        sequence.token_ids[place] = token_id
        output = place + 1 - sequence.prompt_len
        if output == 1 or output >= sequence.params.max_tokens or sequence.may_stop(token_id):
            results.append((sequence, news(sequence, Choice(token_id), place + 1)))
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
    generating = [(chunk, rows) for chunk, rows in ready if chunk.sequence.logits is None]
    if not generating:
        return results
    if any(chunk.draft is not None for chunk, _ in generating):
        return results + verify(generating, step.logits)
    last = [rows.stop - 1 for _, rows in generating]
    logits = step.logits if len(last) == step.logits.shape[0] else step.logits[last]
    sequences = [chunk.sequence for chunk, _ in generating]
    for sequence, choice in zip(sequences, choose(logits, sequences), strict=True):
        results.append((sequence, advance(sequence, choice)))
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
