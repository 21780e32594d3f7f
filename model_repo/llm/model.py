"""The Triton Python model of the `llm` layout: one model that takes text, messages or token ids and answers.

`execute` parses, checks and submits; the engine generates in its own thread; one sender thread turns what arrives
into responses. Every request ends with exactly one response that carries the final flag.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from .backend_embedded import Backend, EmbeddedBackend
from .contract import Generate, Limits, max_tokens, parse
from .sender import Sender, send_error
from .stream import Stream
from .text import Codec
from .wire import BadRequestError, flag

logger = logging.getLogger(__name__)


class TritonPythonModel:
    """What Triton's Python backend drives: initialize, execute, finalize."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load tokenizer and engine; an exception here ends up in the server's log, so its text says what is wrong."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        decoupled = bool(config.get("model_transaction_policy", {}).get("decoupled", False))
        engine_dir = (Path(args["model_repository"]) / parameters["engine_dir"]).resolve()
        if not engine_dir.is_dir():
            raise pb_utils.TritonModelException(
                f"{engine_dir}: there is no engine here (parameter engine_dir of config.pbtxt); keep engine/ and "
                "model_repository/ of the package together"
            )
        limits = Limits(
            max_seq_len=int(parameters["max_seq_len"]),
            max_input_tokens=int(parameters["max_input_tokens"]),
            max_output_tokens=int(parameters["max_output_tokens"]),
            default_max_tokens=int(parameters["default_max_tokens"]),
            streaming=decoupled,
        )
        codec = Codec.load(
            engine_dir,
            max_input_tokens=limits.max_input_tokens,
            trust_remote_code=parameters["trust_remote_code"] == "true",
        )
        backend = EmbeddedBackend.load(engine_dir)
        period_s = int(parameters["cancellation_check_period_ms"]) / 1000
        self.start(limits, codec, backend, Sender(backend, model_name=args["model_name"], check_period_s=period_s))
        pb_utils.Logger.log_info(f"{args['model_name']}: {backend.summary}")

    def start(self, limits: Limits, codec: Codec, backend: Backend, sender: Sender) -> None:
        """Put the parts together."""
        self._limits, self._codec, self._backend, self._sender = limits, codec, backend, sender

    def execute(self, requests: list[Any]) -> None:
        """Take in requests; their responses come later, from the sender's thread."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._accept(request, sender)
            except BadRequestError as error:
                send_error(sender, str(error), pb_utils.TritonError.INVALID_ARG)
            except Exception as error:
                logger.exception("a request could not be taken in")
                send_error(sender, f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)

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
            self._sender.post(partial(self._sender.stop, request_id, sender))
            return
        parsed = parse(inputs, self._limits, self._backend.refused)
        text, ids = self._codec.prompt(parsed)
        stream = Stream(parsed, self._codec.decode, prompt=(text, ids), request_id=request_id)
        room = max_tokens(parsed, len(ids), self._limits)
        wanted = frozenset(request.requested_output_names())
        self._sender.post(partial(self._sender.add, stream, sender, wanted))
        # From here on the sender's thread answers, also a refusal: Triton 2.51 crashes when one thread asks whether a
        # request is cancelled while another sends its final response.
        try:
            self._submit(parsed, stream, ids, room)
        except BadRequestError as error:
            self._sender.post(partial(self._sender.refuse, stream, str(error), pb_utils.TritonError.INVALID_ARG))
        except Exception as error:
            logger.exception("a request could not be submitted")
            message = f"{type(error).__name__}: {error}"
            self._sender.post(partial(self._sender.refuse, stream, message, pb_utils.TritonError.INTERNAL))

    def _submit(self, request: Generate, stream: Stream, prompt: list[int], room: int) -> None:
        bad = [ids for word in request.sampling.bad for ids in self._codec.word_ids(word)]
        for choice in range(request.choices):
            sampling = request.for_engine(room, choice)
            stream.attach(
                choice,
                self._backend.submit(prompt, sampling, bad, partial(self._sender.deliver, stream, choice)),
            )
