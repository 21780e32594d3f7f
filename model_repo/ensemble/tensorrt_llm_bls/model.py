"""The Triton Python model `tensorrt_llm_bls`: preprocessing, engine and postprocessing as a program.

`execute` only takes requests in. A thread of the pool works on each (`chain`), and one sender thread sends all
responses and asks Triton which clients have gone: Triton 2.51 crashes when one thread asks whether a request is
cancelled while another sends its final response.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from model_repo.ensemble.answer import Answer
from model_repo.ensemble.chain import Chain, Models
from model_repo.ensemble.question import parse, refuse_missing
from model_repo.ensemble.settings import Settings
from model_repo.ensemble.tensors import CLIENT_OUTPUTS
from model_repo.llm.sender import Sender, take_in


class TritonPythonModel:
    """What Triton's Python backend drives: initialize, execute, finalize."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the configuration; the other models are found by name when a request comes."""
        settings = Settings(args)
        if not settings.flag("accumulate_tokens"):
            message = "is 'false': pieces decoded one by one lose spaces and break characters; write true"
            raise settings.fault("accumulate_tokens", message)
        self._declared, self._lacks = settings.outputs, settings.words("engine_lacks")
        draft = settings.text("tensorrt_llm_draft_model_name")
        self._draft_tokens = settings.count("num_draft_tokens") if draft else 0
        self._models = Models(
            engine=settings.text("tensorrt_llm_model_name"),
            decoupled=settings.decoupled,
            says_finished=settings.text("runtime") == "embedded",
            draft=draft,
            adapters=settings.optional_directory("lora_adapters_dir"),
            engine_names=settings.names("engine_input_names"),
        )
        period_s = settings.count("cancellation_check_period_ms") / 1000
        self._sender = Sender(None, model_name=settings.name, check_period_s=period_s, outputs=CLIENT_OUTPUTS)
        self._workers = ThreadPoolExecutor(settings.count("max_running_requests"), thread_name_prefix="trtbuild-bls")

    def execute(self, requests: list[Any]) -> None:
        """Take in requests; their responses come later, from the sender's thread."""
        take_in(requests, self._accept)

    def finalize(self) -> None:
        """End what runs, with final responses."""
        self._sender.close()
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _accept(self, request: Any, sender: Any) -> None:
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        streaming, drafts = self._models.decoupled, self._draft_tokens
        refuse_missing(inputs, self._lacks)
        question = parse(inputs, streaming=streaming, draft_tokens=drafts, declared=self._declared)
        answer = Answer(request_id=request.request_id(), streaming=question.stream)
        chain = Chain(self._models, question, answer, partial(self._sender.deliver, answer, 0))
        # In a thread of its own: that may take a moment.
        answer.on_cancel = threading.Thread(target=chain.stop_engine, name="trtbuild-stop", daemon=True).start
        wanted = frozenset(request.requested_output_names())
        self._sender.post(partial(self._sender.add, answer, sender, wanted))
        self._workers.submit(chain.run)
