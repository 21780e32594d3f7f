"""The sender thread: the only one that sends responses of running requests, watches for cancellation and keeps gauges.

One thread for all of it means no locks, and no response after the final one. It waits for jobs and does nothing while
no request runs; under load the outputs that gather while it sends go out together.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import triton_python_backend_utils as pb_utils

from .wire import OUTPUTS, BadRequestError, tensors

logger = logging.getLogger(__name__)
_CLOSE_TIMEOUT_S = 5.0
UNLOADED = "the model is being unloaded"
_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class Running(Protocol):
    """What the sender needs of a running request.

    `deliver` is called in the engine's thread, the rest in the sender's.
    """

    request_id: str
    cancelled_by: str | None

    @property
    def streaming(self) -> bool:
        """Whether responses are sent before the end."""

    @property
    def finished(self) -> bool:
        """Whether nothing more comes."""

    @property
    def cancelled(self) -> bool:
        """Whether it was cut off."""

    @property
    def error(self) -> Exception | None:
        """What ended it, if something went wrong."""

    def deliver(self, choice: int, output: Any) -> bool:
        """Keep one output; whether the sender should look at it now."""

    def absorb(self) -> bool:
        """Take in everything that has arrived; whether there was anything."""

    def values(self) -> Mapping[str, Sequence[Any]]:
        """What to send now, by output name."""

    def cancel(self, why: str | None = None) -> None:
        """End what runs for it."""


class Counted(Protocol):
    """What the gauges show is read from here."""

    def gauges(self) -> Any:
        """Counts of this moment, with the fields of `backend_embedded.Gauges`."""


def send_error(sender: Any, message: str, code: int) -> None:
    """End a request with an error."""
    response = pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
    sender.send(response, flags=_FINAL)


def take_in(requests: Iterable[Any], accept: Callable[[Any, Any], None]) -> None:
    """Give every request with its sender to `accept`; one that it does not take ends with an error here."""
    for request in requests:
        sender = request.get_response_sender()
        try:
            accept(request, sender)
        except BadRequestError as error:
            send_error(sender, str(error), pb_utils.TritonError.INVALID_ARG)
        except Exception as error:
            logger.exception("a request could not be taken in")
            send_error(sender, f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)


@dataclass(slots=True)
class _Route:
    """Where the responses of one stream go."""

    sender: Any
    wanted: frozenset[str]


class Sender:
    """Owns the running streams."""

    def __init__(
        self,
        backend: Counted | None,
        *,
        model_name: str,
        check_period_s: float,
        instance: str | None = None,
        outputs: Mapping[str, str] = OUTPUTS,
    ) -> None:
        self._period_s = check_period_s
        self._outputs = outputs
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._routes: dict[Running, _Route] = {}
        self._closing = False
        self._metrics = None if backend is None else _Metrics(model_name, instance, backend.gauges)
        self._thread = threading.Thread(target=self._run, name="trtbuild-sender", daemon=True)
        self._thread.start()

    def post(self, job: Callable[[], None]) -> None:
        """Have `job` done in the sender's thread (any thread)."""
        self._jobs.put(job)

    def deliver(self, stream: Running, choice: int, output: Any) -> None:
        """Take one output of the engine (engine's thread)."""
        if stream.deliver(choice, output):
            self._jobs.put(partial(self._advance, stream))

    def close(self) -> None:
        """End every request with a final response, also one whose job still waits, then the thread."""
        self.post(self._cancel_all)
        self._thread.join(_CLOSE_TIMEOUT_S)
        if self._thread.is_alive():  # the engine does not answer: end the requests without it
            self._jobs.put(None)
            self._thread.join(_CLOSE_TIMEOUT_S)

    def add(self, stream: Running, sender: Any, wanted: frozenset[str]) -> None:
        """Start to watch a stream."""
        self._routes[stream] = _Route(sender, wanted)

    def begin(self, stream: Running, sender: Any, wanted: frozenset[str], submit: Callable[[], None]) -> None:
        """Watch a stream and have the engine take it (Triton's thread).

        From the first job on the sender's thread answers, also a refusal: Triton 2.51 crashes when one thread asks
        whether a request is cancelled while another sends its final response.
        """
        self.post(partial(self.add, stream, sender, wanted))
        try:
            submit()
        except BadRequestError as error:
            self.post(partial(self.refuse, stream, str(error), pb_utils.TritonError.INVALID_ARG))
        except Exception as error:
            logger.exception("a request could not be submitted")
            message = f"{type(error).__name__}: {error}"
            self.post(partial(self.refuse, stream, message, pb_utils.TritonError.INTERNAL))

    def refuse(self, stream: Running, message: str, code: int) -> None:
        """End a stream that the engine did not take with an error; what of it runs already is cancelled."""
        stream.cancel()
        send_error(self._routes.pop(stream).sender, message, code)

    def stop(self, request_id: str, sender: Any) -> None:
        """Cancel the running requests of this id and answer the request that asked for it."""
        if not self.cancel(request_id):
            message = f"stop: no running request has the id {request_id!r}; it may have ended already"
            send_error(sender, message, pb_utils.TritonError.NOT_FOUND)
            return
        sender.send(self._response({"text_output": [""], "finish_reason": ["cancelled"]}, None), flags=_FINAL)

    def cancel(self, request_id: str) -> bool:
        """Cancel the running requests of this id; whether there was one."""
        found = [stream for stream in self._routes if stream.request_id == request_id]
        for stream in found:
            stream.cancel(f"request {request_id!r} was stopped by a request with stop: true")
        return bool(found)

    def _run(self) -> None:
        next_look = 0.0
        while not self._closing or self._routes:
            try:
                job = self._jobs.get(timeout=self._period_s if self._routes else None)
            except queue.Empty:
                job = self._look
            if job is None:
                break
            try:
                job()
                if time.monotonic() >= next_look:
                    self._look()
                    next_look = time.monotonic() + self._period_s
            except Exception:  # the others' answers must go on; a stream's own errors are handled in _advance
                logger.exception("the sender goes on after an error")
        for route in self._routes.values():
            send_error(route.sender, UNLOADED, pb_utils.TritonError.CANCELLED)
        self._routes.clear()

    def _advance(self, stream: Running) -> None:
        """Send what is new of one stream; a stream that fails here still gets its final response."""
        route = self._routes.get(stream)
        if route is None:
            self._count()  # the engine's last word after we had ended the request: its blocks are free now
            return
        try:
            self._send(stream, route)
        except Exception as error:
            logger.exception("a response could not be made")
            stream.cancel()
            self._routes.pop(stream, None)
            send_error(route.sender, f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)

    def _send(self, stream: Running, route: _Route) -> None:
        if not stream.absorb():
            return  # an earlier job has sent it already
        finished = stream.finished
        if not finished and not stream.streaming:
            return
        if finished:
            del self._routes[stream]
        if finished and stream.error is not None:
            send_error(route.sender, str(stream.error), _code(stream.error))
        elif finished and stream.cancelled:
            why = stream.cancelled_by or "the request was cancelled"
            send_error(route.sender, why, pb_utils.TritonError.CANCELLED)
        else:
            route.sender.send(self._response(stream.values(), route.wanted), flags=_FINAL if finished else 0)
        if finished:
            self._count()

    def _look(self) -> None:
        """Ask Triton which clients have gone, and refresh the gauges."""
        for stream, route in list(self._routes.items()):
            if stream.cancelled_by is None and route.sender.is_cancelled():
                stream.cancel("the client cancelled the request")
        self._count()

    def _cancel_all(self) -> None:
        self._closing = True
        for stream in list(self._routes):
            stream.cancel(UNLOADED)

    def _count(self) -> None:
        if self._metrics is not None:
            self._metrics.update()

    def _response(self, values: Mapping[str, Sequence[Any]], wanted: frozenset[str] | None) -> Any:
        made = tensors(values, frozenset(values) if wanted is None else wanted, self._outputs)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in made])


def _code(error: Exception) -> Any:
    wrong_request = isinstance(error, BadRequestError)
    return pb_utils.TritonError.INVALID_ARG if wrong_request else pb_utils.TritonError.INTERNAL


class _Metrics:
    """Gauges on the server's metrics port, named as those of TensorRT-LLM's C++ backend, so that dashboards work.

    That backend has none of drafts: theirs has a name of our own, and is there only where the runtime drafts.
    """

    def __init__(self, model_name: str, instance: str | None, read: Callable[[], Any]) -> None:
        self._read = read
        self._last: Any = None
        gauge = pb_utils.MetricFamily.GAUGE
        self._families = [
            pb_utils.MetricFamily(name="nv_trt_llm_kv_cache_block_metrics", description="KV cache blocks", kind=gauge),
            pb_utils.MetricFamily(name="nv_trt_llm_request_metrics", description="Requests", kind=gauge),
        ]
        labels = {"model": model_name, "version": "1"} | ({} if instance is None else {"instance": instance})
        blocks, requests = self._families
        self._places = {
            "max_blocks": (blocks, {**labels, "kv_cache_block_type": "max"}),
            "used_blocks": (blocks, {**labels, "kv_cache_block_type": "used"}),
            "free_blocks": (blocks, {**labels, "kv_cache_block_type": "free"}),
            "reusable_blocks": (blocks, {**labels, "kv_cache_block_type": "reusable"}),
            "running": (requests, {**labels, "request_type": "active"}),
            "waiting": (requests, {**labels, "request_type": "waiting"}),
        }
        if getattr(read(), "draft_tokens", None) is not None:
            drafts = pb_utils.MetricFamily(name="trtbuild_draft_tokens", description="Verified drafts", kind=gauge)
            self._families.append(drafts)
            self._places |= {
                "draft_tokens": (drafts, {**labels, "draft_token_type": "verified"}),
                "accepted_draft_tokens": (drafts, {**labels, "draft_token_type": "accepted"}),
            }
        self._gauges: dict[str, Any] = {}
        self.update()

    def update(self) -> None:
        """Set the gauges that have changed; each costs a message to the server. One never told is never shown."""
        now = self._read()
        for name, (family, labels) in self._places.items():
            value = getattr(now, name)
            if value is None or (self._last is not None and getattr(self._last, name) == value):
                continue
            if name not in self._gauges:
                self._gauges[name] = family.Metric(labels=labels)
            self._gauges[name].set(value)
        self._last = now
