"""`tensorrt_llm_bls` at work on one request: preprocessing, the engine, postprocessing, piece by piece.

Tokens are accumulated: every piece is detokenized behind the tokens before it, so that the pieces put together are the
whole text. The engine always streams to this model where it can, also for a whole answer: only so are stop words found
in the text at once, and a cancelled request ends within a token.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from model_repo.ensemble.answer import Answer, Piece
from model_repo.ensemble.drafting import Rounds
from model_repo.ensemble.lora import arrays_for
from model_repo.ensemble.question import PREPARED, Question
from model_repo.llm.text import StopScanner
from model_repo.llm.wire import Array, BadRequestError

logger = logging.getLogger(__name__)
_STOP_AGAIN_S = 0.2


@dataclass(frozen=True, slots=True)
class Models:
    """The models that a request goes through, and what is known of the engine's; without a draft its name is empty."""

    engine: str
    decoupled: bool
    says_finished: bool
    preprocessing: str = "preprocessing"
    postprocessing: str = "postprocessing"
    draft: str = ""
    adapters: Path | None = None
    engine_names: Mapping[str, str] = field(default_factory=dict)  # what an older backend calls its inputs


class CancelledError(Exception):
    """The engine ended the request because it was told to."""


class Chain:
    """Works on one request; `emit` takes its pieces to the sender."""

    def __init__(self, models: Models, question: Question, answer: Answer, emit: Callable[[Piece], None]) -> None:
        self._models = models
        self._question = question
        self._answer = answer
        self._emit = emit
        self._engine_id = str(uuid.uuid4())
        self._scanner = StopScanner(question.stop_words)
        # Tokens whose text is known, and those behind them. A whole answer without stop words is read once, at its end.
        self._tokens: list[int] = []
        self._new: list[int] = []
        self._in_pieces = question.stream or bool(question.stop_words)
        self._asked = self._done = False
        self._ended = threading.Event()

    def run(self) -> None:
        """From the prompt to the last piece; what goes wrong becomes the last piece."""
        try:
            self._run()
        except CancelledError:
            self._emit(Piece(finished=True, cancelled=True))
        except BadRequestError as error:
            self._emit(Piece(finished=True, error=error))
        except Exception as error:
            if not (self._done or self._answer.unwanted.is_set()):  # else it is the engine's word that it has stopped
                logger.exception("a request failed")
            self._emit(Piece(finished=True, error=error))
        finally:
            self._ended.set()

    def stop_engine(self) -> None:
        """Tell the engine that nobody wants this answer, until it has ended: a word may come before the request."""
        while True:
            try:
                if self._asked:
                    self._stop_once()
            except Exception as error:  # noqa: BLE001 - the server is going down, and the engine with it
                logger.info("the engine was not told of a cancelled request: %s", error)
                self._emit(Piece(finished=True, cancelled=True))
                return
            if self._ended.wait(_STOP_AGAIN_S):
                return

    def _run(self) -> None:
        prepared = self._prepare()
        if self._answer.unwanted.is_set():
            raise CancelledError
        if self._question.echo:
            self._emit(Piece(text=self._echo(prepared["input_ids"])))
        last: Piece | None = None
        for outputs in self._generate(prepared):
            if last is not None:
                continue  # a stop word has ended the answer; the engine runs out
            finished = "finished" in outputs and bool(outputs["finished"].reshape(-1)[0])
            piece = self._piece(outputs, finished=finished)
            if not piece.finished:
                self._emit(piece)
                continue
            last, self._done = piece, True
            if not finished:
                self._stop_once()
        if self._answer.unwanted.is_set():
            raise CancelledError
        # Only now: where the last response is sent first, Triton 2.51 may never end the loop over the engine's.
        self._emit(last or self._piece({}, finished=True))

    def _piece(self, outputs: Mapping[str, Array], *, finished: bool) -> Piece:
        """What one response of the engine adds to the answer, or the end where the engine does not say it."""
        if outputs:
            length = int(outputs["sequence_length"].reshape(-1)[0])
            self._new += outputs["output_ids"].reshape(-1)[:length].tolist()
        text, stopped = "", False
        if finished or self._in_pieces:
            text, stopped = self._scan(self._text(finished=finished))
        if finished and not stopped:
            text += self._scanner.finish()
        values = {name: array for name, array in outputs.items() if name not in ("output_ids", "sequence_length")}
        return Piece(text=text, values=values, finished=finished or stopped)

    def _scan(self, text: str) -> tuple[str, bool]:
        """The text up to the first stop word, which stays in it as in upstream's model; whether there was one."""
        if len(self._tokens) <= self._question.min_tokens:
            return text, False
        released, stop = self._scanner.push(text)
        return (released, False) if stop is None else (released + stop, True)

    def _prepare(self) -> dict[str, Array]:
        inputs = self._question.to_preprocessing
        response = _exec(self._models.preprocessing, inputs, tuple(PREPARED))
        return {PREPARED[name]: array for name, array in response.items() if array.size}

    def _generate(self, prepared: dict[str, Array]) -> Iterator[dict[str, Array]]:
        inputs = self._question.to_engine | prepared
        inputs["exclude_input_in_output"] = np.array([[True]], dtype=np.bool_)
        if self._question.draft_tokens:
            self._asked = True
            yield from self._rounds(inputs).run()
            return
        inputs["streaming"] = np.array([[self._models.decoupled]], dtype=np.bool_)
        began = False
        try:
            for found in self._stream(inputs):
                began = True
                yield found
        except RuntimeError as error:
            arrays = {} if began else arrays_for(self._models.adapters, inputs, str(error))
            if not arrays:
                raise
            yield from self._stream(inputs | arrays)

    def _stream(self, inputs: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
        outputs = self._question.engine_outputs + (("finished",) if self._models.says_finished else ())
        request = _request(self._models.engine, self._called(inputs), outputs, self._engine_id)
        self._asked = True
        if not self._models.decoupled:
            yield _outputs(request.exec())
            return
        for response in request.exec(decoupled=True):
            found = _outputs(response)
            if found:  # a response without tensors only marks the end
                yield found

    def _called(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs under the names of the engine's backend."""
        return {self._models.engine_names.get(name, name): array for name, array in inputs.items()}

    def _rounds(self, inputs: dict[str, Array]) -> Rounds:
        """The same answer from drafts that the engine verifies."""
        return Rounds(
            target=partial(self._whole, self._models.engine, self._engine_id),
            draft=partial(self._whole, self._models.draft, str(uuid.uuid4())),
            inputs=inputs,
            outputs=self._question.engine_outputs,
            draft_tokens=self._question.draft_tokens,
            use_draft_logits=self._question.use_draft_logits,
            wanted=lambda: not (self._done or self._answer.unwanted.is_set()),
        )

    def _whole(
        self, model: str, request_id: str, inputs: Mapping[str, Array], outputs: tuple[str, ...]
    ) -> dict[str, Array]:
        """All that a model answers, at once."""
        whole = self._called(inputs) | {"streaming": np.array([[False]])}
        request = _request(model, whole, outputs, request_id)
        if not self._models.decoupled:
            return _outputs(request.exec())
        found = [_outputs(response) for response in request.exec(decoupled=True)]
        return next((one for one in found if one), {})

    def _text(self, *, finished: bool) -> str:
        """What the new tokens add to the text of those before them."""
        new, self._new = self._new, []
        inputs = {
            "TOKENS_BATCH": np.array([[new]], dtype=np.int32),
            "SEQUENCE_LENGTH": np.array([[len(new)]], dtype=np.int32),
            "CONTEXT_IDS": np.array([self._tokens], dtype=np.int32),
            "FINISHED": np.array([[finished]], dtype=np.bool_),
        }
        self._tokens += new
        return _decoded(_exec(self._models.postprocessing, inputs, ("OUTPUT",))["OUTPUT"])

    def _echo(self, prompt: Array) -> str:
        """The prompt's text: as it was sent, or, of chat messages, as the engine reads it."""
        if self._question.text is not None:
            return self._question.text
        inputs = {"TOKENS_BATCH": prompt.reshape(1, 1, -1), "SEQUENCE_LENGTH": np.array([[prompt.size]], np.int32)}
        return _decoded(_exec(self._models.postprocessing, inputs, ("OUTPUT",))["OUTPUT"])

    def _stop_once(self) -> None:
        """As upstream's `send_cancellation_request`: a request with the same id that says stop."""
        inputs = {
            "input_lengths": np.array([[1]], dtype=np.int32),
            "request_output_len": np.array([[1]], dtype=np.int32),
            "input_ids": np.array([[0]], dtype=np.int32),
            "stop": np.array([[True]], dtype=np.bool_),
        }
        request = _request(self._models.engine, inputs, ("output_ids", "sequence_length"), self._engine_id)
        if self._models.decoupled:
            list(request.exec(decoupled=True))
        else:
            request.exec()


def _request(model: str, inputs: Mapping[str, Array], outputs: tuple[str, ...], request_id: str = "") -> Any:
    tensors = [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in inputs.items()]
    return pb_utils.InferenceRequest(
        model_name=model, inputs=tensors, requested_output_names=list(outputs), request_id=request_id
    )


def _exec(model: str, inputs: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
    return _outputs(_request(model, inputs, outputs).exec())


def _outputs(response: Any) -> dict[str, Array]:
    """The tensors of a response by name.

    Raises:
        BadRequestError: the model refuses the request.
        CancelledError: the model was told to stop.
        RuntimeError: the model failed.
    """
    if not response.has_error():
        return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
    error = response.error()
    if error.code() == pb_utils.TritonError.INVALID_ARG:
        raise BadRequestError(error.message())
    if error.code() == pb_utils.TritonError.CANCELLED:
        raise CancelledError
    raise RuntimeError(error.message())


def _decoded(array: Array) -> str:
    return bytes(array.reshape(-1)[0]).decode("utf-8")
