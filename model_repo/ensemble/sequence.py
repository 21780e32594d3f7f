"""One request of `tensorrt_llm` between the engine's thread and the sender: gathers tokens, says what to send."""

from __future__ import annotations

from collections import deque
from typing import Any

from model_repo.ensemble.inflight import Inflight
from model_repo.ensemble.tensors import PERF_METRICS
from model_repo.llm.backend import Handle
from model_repo.llm.sender import UNLOADED

# The engine's name for what upstream's tensors call otherwise.
_METRIC_FIELDS = {"kv_cache_reused_blocks": "kv_cache_reused_block"}


class SequenceStream:
    """The tokens of one answer and how much of them was sent.

    Outputs arrive in the engine's thread by `deliver`; all else happens in the sender's thread.
    """

    def __init__(self, request: Inflight, request_id: str) -> None:
        self.request = request
        self.request_id = request_id
        self.cancelled_by: str | None = None
        self.error: Exception | None = None
        self._arrived: deque[Any] = deque()
        self._handle: Handle | None = None
        self._unwanted = False
        self._ids: list[int] = list(request.input_ids) if request.echo else []
        self._echoed = len(self._ids)
        self._log_probs: list[float] = []
        self._cumulative = 0.0
        self._sent = (0, 0)
        self._reason: str | None = None
        self._metrics: Any = None

    @property
    def streaming(self) -> bool:
        """Whether responses are sent before the end."""
        return self.request.streaming

    @property
    def finished(self) -> bool:
        """Whether nothing more comes."""
        return self._reason is not None

    @property
    def cancelled(self) -> bool:
        """Whether it was cut off by something else than the caller.

        A request that the caller stops ends with an ordinary response, as in upstream's executor: an error in its place
        may never reach a BLS model whose own client has dropped its connection (Triton 2.51).
        """
        return self._reason == "cancelled" and self.cancelled_by == UNLOADED

    def attach(self, handle: Handle) -> None:
        """Remember how to end the sequence, and end it at once if that was asked for in the meantime."""
        self._handle = handle
        if self._unwanted:
            handle.cancel()

    def cancel(self, why: str | None = None) -> None:
        """End the sequence; the engine's final output then ends the request."""
        self.cancelled_by = self.cancelled_by or why
        self._unwanted = True
        if self._handle is not None:
            self._handle.cancel()

    def deliver(self, choice: int, output: Any) -> bool:  # noqa: ARG002 - one answer a request
        """Keep one output (engine's thread); whether the sender should look at it now."""
        self._arrived.append(output)
        return self.streaming or bool(output.finished)

    def absorb(self) -> bool:
        """Take in everything that has arrived; whether there was anything."""
        anything = bool(self._arrived)
        while self._arrived:
            self._take(self._arrived.popleft())
        return anything

    def values(self) -> dict[str, list[Any]]:
        """What to send now, by output name: what is new, and whatever else the request asked for."""
        ids_sent, probs_sent = self._sent
        new_ids, new_probs = self._ids[ids_sent:], self._log_probs[probs_sent:]
        self._sent = (len(self._ids), len(self._log_probs))
        values: dict[str, list[Any]] = {
            "output_ids": [[new_ids]],
            "sequence_length": [[len(new_ids)]],
            "context_ids": [self._ids[:ids_sent]],
            "finished": [[self.finished]],
        }
        request = self.request
        if request.return_log_probs:
            values |= {"output_log_probs": [[new_probs]], "cum_log_probs": [[self._cumulative]]}
        if request.return_num_input_tokens:
            values["num_input_tokens"] = [[len(request.input_ids)]]
        if request.return_num_output_tokens:
            values["num_output_tokens"] = [[len(new_ids) - max(self._echoed - ids_sent, 0)]]
        if request.return_perf_metrics and self._metrics is not None:
            for name in PERF_METRICS:
                values[name] = [[getattr(self._metrics, _METRIC_FIELDS.get(name, name), None) or 0]]
        return values

    def _take(self, output: Any) -> None:
        if self.finished:
            return
        new = list(output.token_ids)
        logprobs = list(output.logprobs or ())
        if output.finished:
            self._reason, self.error, self._metrics = output.finish_reason, output.error, output.metrics
            # As in TensorRT-LLM, the token that ends an answer is no part of it; the tokens of a stop word are.
            if output.finish_reason == "stop" and output.stop_reason in (None, self.request.end_id):
                new, logprobs = new[:-1], logprobs[:-1]
        self._ids += new
        for one in logprobs:
            self._log_probs.append(one.logprob)
            self._cumulative += one.logprob
