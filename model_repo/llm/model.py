"""The Triton Python model of the `llm` layout: one model that takes text, messages or token ids and answers.

`execute` parses, checks and submits; the engine generates in its own thread; one sender thread turns what arrives
into responses. Every request ends with exactly one response that carries the final flag.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from .backend import Backend
from .contract import Generate, Limits, max_tokens, parse
from .sender import Sender, take_in
from .stream import Stream
from .text import Codec
from .wire import BadRequestError, flag, refuse_misnamed


class TritonPythonModel:
    """What Triton's Python backend drives: initialize, execute, finalize."""

    _instances = 1

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
        # A runtime may have to prepare the process before anything else is imported.
        load = _loader(args, config, parameters, engine_dir)
        codec = Codec.load(
            engine_dir,
            max_input_tokens=limits.max_input_tokens,
            trust_remote_code=parameters["trust_remote_code"] == "true",
        )
        backend = load()
        self._instances = _instance_count(config)
        sender = Sender(
            backend,
            model_name=args["model_name"],
            check_period_s=int(parameters["cancellation_check_period_ms"]) / 1000,
            # Each instance is a process of its own and would overwrite the others' gauges.
            instance=args["model_instance_name"] if self._instances > 1 else None,
        )
        self.start(limits, codec, backend, sender)
        pb_utils.Logger.log_info(f"{args['model_name']}: {backend.summary}")

    def start(self, limits: Limits, codec: Codec, backend: Backend, sender: Sender) -> None:
        """Put the parts together."""
        self._limits, self._codec, self._backend, self._sender = limits, codec, backend, sender

    def execute(self, requests: list[Any]) -> None:
        """Take in requests; their responses come later, from the sender's thread."""
        take_in(requests, self._accept)

    def finalize(self) -> None:
        """End what runs, with final responses, and free the engine."""
        self._sender.close()
        self._backend.close()

    def _accept(self, request: Any, sender: Any) -> None:
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        refuse_misnamed(request.parameters())
        request_id = request.request_id()
        if flag(inputs, "stop"):
            if not request_id:
                raise BadRequestError("stop: the request has no id; send the id of the request that is to be stopped")
            if self._instances > 1:
                raise BadRequestError(
                    f"stop: this model has {self._instances} instances, and the other request may run in any of them; "
                    "cancel its call or close its connection instead"
                )
            self._sender.post(partial(self._sender.stop, request_id, sender))
            return
        parsed = parse(inputs, self._limits, self._backend.refused)
        text, ids = self._codec.prompt(parsed)
        stream = Stream(parsed, self._codec.decode, prompt=(text, ids), request_id=request_id)
        room = max_tokens(parsed, len(ids), self._limits)
        wanted = frozenset(request.requested_output_names())
        self._sender.begin(stream, sender, wanted, partial(self._submit, parsed, stream, ids, room))

    def _submit(self, request: Generate, stream: Stream, prompt: list[int], room: int) -> None:
        bad = [ids for word in request.sampling.bad for ids in self._codec.word_ids(word)]
        for choice in range(request.choices):
            sampling = request.for_engine(room, choice)
            stream.attach(
                choice,
                self._backend.submit(prompt, sampling, bad, partial(self._sender.deliver, stream, choice)),
            )


def _instance_count(config: Mapping[str, Any]) -> int:
    return sum(int(group.get("count", 1)) for group in config.get("instance_group", [])) or 1


def _loader(
    args: Mapping[str, str], config: Mapping[str, Any], parameters: Mapping[str, str], engine_dir: Path
) -> Callable[[], Backend]:
    """What loads the runtime that config.pbtxt names; the other's modules are never imported."""
    runtime = parameters["runtime"]
    if runtime == "embedded":
        from .backend_embedded import EmbeddedBackend

        return partial(EmbeddedBackend.load, engine_dir)
    if runtime != "trtllm":
        raise pb_utils.TritonModelException(
            f"parameter runtime of config.pbtxt is {runtime!r}; this model drives embedded and trtllm"
        )
    from .backend_trtllm import load
    from .trtllm_process import SetupError, place

    try:
        gpus = place(parameters, args["model_instance_name"], _instance_count(config), os.environ)
    except SetupError as error:
        raise pb_utils.TritonModelException(str(error)) from error
    return partial(load, engine_dir, gpus=gpus, adapters=json.loads(parameters.get("lora_adapters", "{}")))
