"""One request between the engine's thread and the sender: gathers outputs, makes text, says what to send."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from .backend import Handle
from .contract import Generate
from .text import IncrementalDecoder, StopScanner
from .wire import logprob_json

_METRICS = (
    "arrival_time_ns",
    "first_scheduled_time_ns",
    "first_token_time_ns",
    "last_token_time_ns",
    "kv_cache_reused_block",
    "kv_cache_missed_block",
    "kv_cache_alloc_new_blocks",
    "kv_cache_alloc_total_blocks",
    "kv_cache_hit_rate",
    # Only a runtime that drafts has these.
    "acceptance_rate",
    "total_accepted_draft_tokens",
    "total_draft_tokens",
)


class Choice:
    """One answer: its tokens, its text with stop strings applied, and what of both is new."""

    def __init__(
        self, request: Generate, decode: Callable[[Sequence[int]], str], *, echo: tuple[str, list[int]]
    ) -> None:
        self._min_tokens = request.sampling.min_tokens
        self._decoder = IncrementalDecoder(decode)
        self._scanner = StopScanner(request.stop)
        self.text, ids = echo
        self.ids = list(ids)
        self.logprobs: list[Any] = []
        self.prompt_logprobs: tuple[Any, ...] | None = None
        self.cumulative_logprob = 0.0
        self.generated = 0
        self.finish_reason: str | None = None
        self.stop_reason = ""
        self.metrics: Any = None
        self.error: Exception | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more comes, or nothing more counts."""
        return self.finish_reason is not None

    def take(self, output: Any) -> bool:
        """Add one engine output; whether a stop string has just ended the answer, so that the engine should stop."""
        if self.finished:
            return False
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        # The token that ends an answer, end-of-text or one the caller named, is reported but is no part of the text.
        spoken = len(output.token_ids) - (1 if output.finished and output.finish_reason == "stop" else 0)
        for place, token_id in enumerate(output.token_ids):
            self._take_token(token_id, output.logprobs[place] if output.logprobs else None)
            if place < spoken and self._add_text(self._decoder.push(token_id)):
                return not output.finished
        if output.finished:
            self._end(output)
        return False

    def new_since(self, text: int, ids: int, logprobs: int) -> tuple[str, list[int], list[Any]]:
        """The text, token ids and log-probabilities behind these positions."""
        return self.text[text:], self.ids[ids:], self.logprobs[logprobs:]

    def _take_token(self, token_id: int, logprob: Any) -> None:
        self.ids.append(token_id)
        self.generated += 1
        if logprob is not None:
            self.logprobs.append(logprob)
            self.cumulative_logprob += logprob.logprob

    def _add_text(self, text: str) -> bool:
        """Add decoded text; whether a stop string was completed. Before `min_tokens` none is looked for."""
        if self.generated <= self._min_tokens:
            self.text += text
            return False
        released, stop = self._scanner.push(text)
        self.text += released
        if stop is None:
            return False
        self.finish_reason, self.stop_reason = "stop", stop
        return True

    def _end(self, output: Any) -> None:
        self.metrics, self.error = output.metrics, output.error
        if self._add_text(self._decoder.finish()):
            return
        self.text += self._scanner.finish()
        self.finish_reason = output.finish_reason
        if output.stop_reason is not None:
            self.stop_reason = str(output.stop_reason)


class Stream:
    """One request's answers, and how much of them was sent.

    Outputs arrive in the engine's thread by `deliver`; all else happens in the sender's thread.
    """

    def __init__(
        self,
        request: Generate,
        decode: Callable[[Sequence[int]], str],
        *,
        prompt: tuple[str, list[int]],
        request_id: str,
    ) -> None:
        self.request = request
        self.request_id = request_id
        self.cancelled_by: str | None = None
        self._prompt_tokens = len(prompt[1])
        echo = prompt if request.echo else ("", [])
        self._choices = [Choice(request, decode, echo=echo) for _ in range(request.choices)]
        self._handles: list[Handle | None] = [None] * request.choices
        self._unwanted = [False] * request.choices
        self._arrived: deque[tuple[int, Any]] = deque()
        self._sent = (0, 0, 0)
        self._prompt_logprobs_sent = False
        # Only a stream, or a text to search, needs the sender before the end.
        self._every_output = request.every_output

    @property
    def streaming(self) -> bool:
        """Whether responses are sent before the end."""
        return self.request.streaming

    def deliver(self, choice: int, output: Any) -> bool:
        """Keep one output (engine's thread); whether the sender should look at it now."""
        self._arrived.append((choice, output))
        return self._every_output or output.finished

    def attach(self, choice: int, handle: Handle) -> None:
        """Remember how to end a sequence, and end it at once if that was asked for while it was being submitted."""
        self._handles[choice] = handle
        if self._unwanted[choice]:
            handle.cancel()

    def cancel(self, why: str | None = None) -> None:
        """End every sequence; the engine's final outputs then end the request."""
        self.cancelled_by = self.cancelled_by or why
        for choice in range(len(self._choices)):
            self._cancel_choice(choice)

    def absorb(self) -> bool:
        """Take in everything that has arrived; whether there was anything."""
        anything = False
        while self._arrived:
            choice, output = self._arrived.popleft()
            anything = True
            if self._choices[choice].take(output):
                self._cancel_choice(choice)
        return anything

    @property
    def finished(self) -> bool:
        """Whether every answer is complete."""
        return all(choice.finished for choice in self._choices)

    @property
    def cancelled(self) -> bool:
        """Whether an answer was cut off by a cancellation."""
        return any(choice.finish_reason == "cancelled" for choice in self._choices)

    @property
    def error(self) -> Exception | None:
        """What went wrong in the engine, if anything did."""
        return next((choice.error for choice in self._choices if choice.error is not None), None)

    def values(self) -> dict[str, list[Any]]:
        """What to send now, by output name: everything at the end, else what is new (or all of it, if asked for)."""
        choices, since = self._choices, self._sent if not self.request.cumulative else (0, 0, 0)
        news = [choice.new_since(*since) for choice in choices]
        first = choices[0]
        self._sent = (len(first.text), len(first.ids), len(first.logprobs))
        values: dict[str, list[Any]] = {
            "text_output": [text for text, _, _ in news],
            "output_ids": [token for _, ids, _ in news for token in ids],
        }
        if self.request.sampling.logprobs is not None:
            values["logprobs"] = [_json(entry) for _, _, entries in news for entry in entries]
        if self._wants_prompt_logprobs(first):
            self._prompt_logprobs_sent = True
            values["prompt_logprobs"] = [_json(entry) for entry in first.prompt_logprobs or ()]
        if self.finished:
            values |= self._final_values()
        return values

    def _wants_prompt_logprobs(self, first: Choice) -> bool:
        if self.request.sampling.prompt_logprobs is None or first.prompt_logprobs is None:
            return False
        return self.request.cumulative or not self._prompt_logprobs_sent

    def _final_values(self) -> dict[str, list[Any]]:
        choices, request = self._choices, self.request
        values: dict[str, list[Any]] = {
            "num_input_tokens": [self._prompt_tokens],
            "num_output_tokens": [choice.generated for choice in choices],
        }
        if request.return_finish_reason:
            values["finish_reason"] = [choice.finish_reason or "" for choice in choices]
        if request.return_stop_reason:
            values["stop_reason"] = [choice.stop_reason for choice in choices]
        if request.return_cumulative_logprob:
            values["cumulative_logprob"] = [choice.cumulative_logprob for choice in choices]
        metrics = choices[0].metrics
        if request.return_perf_metrics and metrics is not None:
            found = {name: getattr(metrics, name, None) for name in _METRICS}
            values |= {name: [value] for name, value in found.items() if value is not None}
        return values

    def _cancel_choice(self, choice: int) -> None:
        self._unwanted[choice] = True
        handle = self._handles[choice]
        if handle is not None:
            handle.cancel()


def _json(entry: Any) -> str:
    if entry is None:  # a text's first token has nothing before it that could predict it
        return "null"
    return logprob_json(entry.token_id, entry.logprob, entry.rank, entry.top)
