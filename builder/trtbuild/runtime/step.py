"""What a computed step means for its sequences: the next tokens, the reported log-probabilities, the ends."""

from __future__ import annotations

import time
from typing import TypeAlias

import torch

from trtbuild.runtime.outputs import FinishReason, Output, TokenLogprob
from trtbuild.runtime.sampler import Choice, choose, no_token, token_logprobs
from trtbuild.runtime.scheduler import Chunk
from trtbuild.runtime.sequence import Sequence
from trtbuild.runtime.step_logits import StepLogits

# One sequence's news. A bare token: nothing else is to be said of it, and more will come.
StepResult: TypeAlias = "tuple[Sequence, Output | int]"


def finish_step(chunks: list[Chunk], step: StepLogits) -> list[StepResult]:
    """Choose the next token of every sequence whose last token was computed, and say what is new of it."""
    if step.likeliest is not None and all(chunk.sequence.plain for chunk in chunks):
        return _finish_plain(chunks, step, step.likeliest)
    for chunk, rows in zip(chunks, step.rows, strict=True):
        sequence = chunk.sequence
        sequence.scheduled_ns = sequence.scheduled_ns or time.monotonic_ns()
        if sequence.wants_every_position and chunk.start < sequence.prompt_len:
            _keep_prompt(chunk, step.logits[rows])
    ready = [(chunk, rows) for chunk, rows in zip(chunks, step.rows, strict=True) if chunk.is_last]
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


def _finish_plain(chunks: list[Chunk], step: StepLogits, likeliest: list[int]) -> list[StepResult]:
    """The same where every sequence takes the likeliest token and reports nothing else: little work for each.

    The device waits for this part.
    """
    now = time.monotonic_ns()
    results: list[StepResult] = []
    for chunk, rows in zip(chunks, step.rows, strict=True):
        sequence = chunk.sequence
        sequence.scheduled_ns = sequence.scheduled_ns or now
        if not chunk.is_last:
            continue
        token_id = likeliest[rows.stop - 1]
        if token_id < 0:
            results.append((sequence, _advance(sequence, Choice(0, error=no_token(step.logits[rows.stop - 1])))))
            continue
        output = sequence.num_output + 1
        if output == 1 or output >= sequence.params.max_tokens or sequence.may_stop(token_id):
            results.append((sequence, _advance(sequence, Choice(token_id))))
            continue
        sequence.append(token_id)
        sequence.last_token_ns = now
        results.append((sequence, token_id))
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
        return Output(finished=True, finish_reason="error", error=choice.error, metrics=sequence.metrics())
    sequence.append(choice.token_id)
    sequence.last_token_ns = time.monotonic_ns()
    first = sequence.num_output == 1
    if first:
        sequence.first_token_ns = sequence.last_token_ns
    reason, stop = _end(sequence, choice.token_id)
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


def _end(sequence: Sequence, token_id: int) -> tuple[FinishReason | None, int | None]:
    """Why the sequence ends with `token_id`, if it does, and the id to report."""
    params = sequence.params
    if sequence.num_output >= params.min_tokens:
        if token_id in sequence.end_ids:
            return "stop", None
        if token_id in sequence.stop_ids or any(_ends_with(sequence, word) for word in params.stop_words):
            return "stop", token_id
    return ("length", None) if sequence.num_output >= params.max_tokens else (None, None)


def _ends_with(sequence: Sequence, word: object) -> bool:
    tail = list(word)  # type: ignore[call-overload]
    return sequence.num_output >= len(tail) and sequence.token_ids[-len(tail) :] == tail
