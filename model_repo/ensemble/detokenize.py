"""Token ids to text: a whole answer, or one piece of it behind the tokens that went before.

A piece's text is the same function of (earlier tokens, new tokens, is this the end) whoever asks: decoding goes through
the earlier tokens first. Where the decoder stands after them is remembered, so that a stream costs no more for it;
what has been forgotten is decoded again.
"""

from __future__ import annotations

import math
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence

from model_repo.ensemble.tensors import filled
from model_repo.llm.text import IncrementalDecoder
from model_repo.llm.wire import BadRequestError, Inputs, flag, ids

_REMEMBERED = 512


class Detokenizer:
    """Answers requests of `postprocessing`."""

    def __init__(self, decode: Callable[[Sequence[int]], str], *, remembered: int = _REMEMBERED) -> None:
        self._decode = decode
        self._limit = remembered
        # By the tokens so far, four bytes each: streams that were given up stay here until others displace them.
        self._places: OrderedDict[bytes, IncrementalDecoder] = OrderedDict()

    def texts(self, inputs: Inputs) -> list[str]:
        """The text of every row of TOKENS_BATCH, its first SEQUENCE_LENGTH tokens; with CONTEXT_IDS the piece's text.

        Raises:
            BadRequestError: shapes do not fit, or earlier tokens are given for several rows.
        """
        tokens, lengths = inputs["TOKENS_BATCH"], inputs["SEQUENCE_LENGTH"]
        rows = tokens.reshape(math.prod(tokens.shape[:-1]), tokens.shape[-1])
        lengths = lengths.reshape(-1)
        if len(rows) != len(lengths):
            raise BadRequestError(f"SEQUENCE_LENGTH: {len(lengths)} lengths for {len(rows)} rows of TOKENS_BATCH")
        pieces = [row[: max(length, 0)].tolist() for row, length in zip(rows, lengths.tolist(), strict=True)]
        if "FINISHED" not in inputs:
            return [self.piece((), piece, finished=True) for piece in pieces]
        if len(pieces) != 1:
            raise BadRequestError(f"CONTEXT_IDS: {len(pieces)} rows of TOKENS_BATCH; pieces come one by one")
        context = ids(inputs, "CONTEXT_IDS") if filled(inputs.get("CONTEXT_IDS")) else ()
        return [self.piece(context, pieces[0], finished=flag(inputs, "FINISHED"))]

    def piece(self, context: tuple[int, ...], new: Sequence[int], *, finished: bool) -> str:
        """The text that `new` adds behind `context`; the end releases what was held back."""
        decoder = self._places.pop(_key(context), None) if context else None
        if decoder is None:
            decoder = IncrementalDecoder(self._decode)
            for token in context:
                decoder.push(token)
        text = "".join([decoder.push(token) for token in new])
        if finished:
            return text + decoder.finish()
        self._places[_key((*context, *new))] = decoder
        if len(self._places) > self._limit:
            self._places.popitem(last=False)
        return text


def _key(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()
