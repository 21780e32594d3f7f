"""The Triton Python model `tensorrt_llm` over the embedded engine: the tensors of TensorRT-LLM's own backend.

`execute` parses, checks and submits; the engine generates in its own thread; one sender thread turns what arrives into
responses. Every request ends with exactly one response that carries the final flag.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import triton_python_backend_utils as pb_utils
from model_repo.ensemble.inflight import Inflight, Limits, parse
from model_repo.ensemble.sequence import SequenceStream
from model_repo.ensemble.settings import Settings
from model_repo.ensemble.tensors import ENGINE_OUTPUTS
from model_repo.llm.backend_embedded import EmbeddedBackend
from model_repo.llm.sender import Sender, take_in
from model_repo.llm.wire import BadRequestError, flag

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """What Triton's Python backend drives: initialize, execute, finalize."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the engine; an exception here ends up in the server's log, so its text says what is wrong."""
        settings = Settings(args)
        self._limits = Limits(
            max_seq_len=settings.count("max_seq_len"),
            max_input_tokens=settings.count("max_input_tokens"),
            max_output_tokens=settings.count("max_output_tokens"),
            streaming=settings.decoupled,
            exclude_input_in_output=settings.flag("exclude_input_in_output"),
        )
        self._backend = EmbeddedBackend.load(settings.directory("engine_dir"), prefix="")
        self._end_ids = self._backend.end_ids
        self._sender = Sender(
            self._backend,
            model_name=settings.name,
            check_period_s=settings.count("cancellation_check_period_ms") / 1000,
            outputs=ENGINE_OUTPUTS,
        )
        pb_utils.Logger.log_info(f"{settings.name}: {self._backend.summary}")

    def execute(self, requests: list[Any]) -> None:
        """Take in requests; their responses come later, from the sender's thread."""
        take_in(requests, self._accept)

    def finalize(self) -> None:
        """End what runs, with final responses, and free the engine."""
        self._sender.close()
        self._backend.close()

    def _accept(self, request: Any, sender: Any) -> None:
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        request_id = request.request_id()
        if flag(inputs, "stop"):
            if not request_id:
                raise BadRequestError("stop: the request has no id; send the id of the request that is to be stopped")
            self._sender.post(partial(self._stop, request_id, sender))
            return
        parsed = parse(inputs, self._limits, self._end_ids)
        stream = SequenceStream(parsed, request_id)
        wanted = frozenset(request.requested_output_names())
        self._sender.begin(stream, sender, wanted, partial(self._submit, parsed, stream))

    def _submit(self, parsed: Inflight, stream: SequenceStream) -> None:
        bad = [list(word) for word in parsed.bad_words]
        deliver = partial(self._sender.deliver, stream, 0)
        stream.attach(self._backend.submit(list(parsed.input_ids), parsed.sampling, bad, deliver))

    def _stop(self, request_id: str, sender: Any) -> None:
        """Cancel the requests of this id; as upstream, no error where it has ended already (`handleStopRequest`)."""
        self._sender.cancel(request_id)
        sender.send(pb_utils.InferenceResponse([]), flags=_FINAL)
