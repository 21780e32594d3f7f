"""The caller's side of a request: its outputs as they come, its result, its cancellation."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator

from trtbuild.errors import RequestError, TrtbuildError
from trtbuild.runtime.outputs import Completion, FinishReason, Output, RequestMetrics, TokenLogprob

logger = logging.getLogger(__name__)


class Request:
    """A submitted request; all its methods may be called from any thread."""

    def __init__(
        self,
        request_id: int,
        prompt_token_ids: tuple[int, ...],
        *,
        on_output: Callable[[Output], None] | None,
        on_cancel: Callable[[int], None],
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self._on_output = on_output
        self._on_cancel = on_cancel
        self._outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        self._done = threading.Event()
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None
        self._prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        self._last: Output | None = None

    @property
    def finished(self) -> bool:
        """Whether the final output has come."""
        return self._done.is_set()

    def cancel(self) -> None:
        """Stop generating and free the blocks; the final output says "cancelled". Does nothing when finished."""
        if not self.finished:
            self._on_cancel(self.request_id)

    def __iter__(self) -> Iterator[Output]:
        """The outputs as they come; each is given out once, the final one to every iteration.

        Raises:
            RequestError: the request was submitted with `on_output`, which gets the outputs instead.
        """
        if self._on_output is not None:
            raise RequestError(
                "the outputs of this request go to its on_output", "submit it without on_output to iterate"
            )
        while True:
            output = self._outputs.get()
            if output.finished:
                self._outputs.put(output)
            yield output
            if output.finished:
                return

    def result(self, timeout: float | None = None) -> Completion:
        """All that the request produced, after waiting for it, at most `timeout` seconds.

        Raises:
            TrtbuildError: the error that ended the request.
            TimeoutError: it is not finished after `timeout` seconds; it goes on.
        """
        if not self._done.wait(timeout) or self._last is None:
            raise TimeoutError(f"request {self.request_id} is not finished after {timeout} seconds")
        if self._last.error is not None:
            raise self._last.error
        return Completion(
            prompt_token_ids=self.prompt_token_ids,
            token_ids=tuple(self._token_ids),
            finish_reason=self._last.finish_reason or "error",
            stop_reason=self._last.stop_reason,
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            prompt_logprobs=self._prompt_logprobs,
            cumulative_logprob=None if self._logprobs is None else sum(one.logprob for one in self._logprobs),
            metrics=self._last.metrics or RequestMetrics(),
        )

    def deliver(self, output: Output) -> None:
        """Called by the engine: keep `output` and hand it on. An `on_output` that fails cancels the request."""
        if self.finished:
            return
        self._token_ids.extend(output.token_ids)
        if output.logprobs is not None:
            self._logprobs = (self._logprobs or []) + list(output.logprobs)
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs
        if output.finished:
            self._last = output
        if self._on_output is None:
            self._outputs.put(output)
        else:
            try:
                self._on_output(output)
            except Exception:  # a caller's mistake must not end the requests of others
                logger.exception("on_output of request %d failed; the request is cancelled", self.request_id)
                self._on_cancel(self.request_id)
        if output.finished:
            self._done.set()


def final_output(
    reason: FinishReason, *, error: TrtbuildError | None = None, metrics: RequestMetrics | None = None
) -> Output:
    """A last output without tokens."""
    return Output(finished=True, finish_reason=reason, error=error, metrics=metrics)
