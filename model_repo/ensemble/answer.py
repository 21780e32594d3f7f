"""One request of `tensorrt_llm_bls` between the thread that works on it and the sender: pieces in, responses out."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from model_repo.ensemble.tensors import PASSED_ON
from model_repo.llm.wire import Array

# What a whole answer adds up over its pieces: along the tokens, or as a number. All else is the last piece's.
_JOINED, _SUMMED = "output_log_probs", "num_output_tokens"


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer: its text, and the engine's own outputs that belong to it."""

    text: str = ""
    values: dict[str, Array] = field(default_factory=dict)
    finished: bool = False
    cancelled: bool = False
    error: Exception | None = None


class Answer:
    """What has come of one answer, and how much of it was sent.

    `deliver` is called from the thread that works on the request, all else from the sender's. `on_cancel` is called
    once, when nobody wants the answer any more.
    """

    def __init__(self, *, request_id: str, streaming: bool) -> None:
        self.request_id = request_id
        self.streaming = streaming
        self.cancelled_by: str | None = None
        self.error: Exception | None = None
        self.finished = False
        self.cancelled = False
        self.unwanted = threading.Event()
        self.on_cancel: Callable[[], None] = _nothing
        self._arrived: deque[Piece] = deque()
        self._text = ""
        self._values: dict[str, Array] = {}

    def deliver(self, choice: int, output: Any) -> bool:  # noqa: ARG002 - one answer a request
        """Keep one piece; whether the sender should look at it now."""
        self._arrived.append(output)
        return self.streaming or bool(output.finished)

    def cancel(self, why: str | None = None) -> None:
        """Say that nobody wants the answer any more; the request ends when the engine has."""
        self.cancelled_by = self.cancelled_by or why
        if not self.unwanted.is_set():
            self.unwanted.set()
            self.on_cancel()

    def absorb(self) -> bool:
        """Take in everything that has arrived; whether there was anything."""
        anything = bool(self._arrived)
        while self._arrived:
            piece = self._arrived.popleft()
            if not self.finished:
                self._take(piece)
        return anything

    def values(self) -> dict[str, Any]:
        """What has come since the last response, by output name."""
        text, values = self._text, self._values
        self._text, self._values = "", {}
        return {"text_output": [text]} | {name: array for name, array in values.items() if name in PASSED_ON}

    def _take(self, piece: Piece) -> None:
        self.finished, self.cancelled, self.error = piece.finished, piece.cancelled, piece.error
        self._text += piece.text
        before, new = self._values, dict(piece.values)
        if _JOINED in before and _JOINED in new:
            new[_JOINED] = np.concatenate([before[_JOINED], new[_JOINED]], axis=-1)
        if _SUMMED in before and _SUMMED in new:
            new[_SUMMED] = before[_SUMMED] + new[_SUMMED]
        self._values = before | new


def _nothing() -> None:
    """Before anything runs there is nothing to end."""
