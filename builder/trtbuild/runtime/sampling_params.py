"""What one request asks for: how many tokens, how they are chosen, where to stop, what to report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from trtbuild.errors import RequestError

# Below this the division by the temperature leaves float32 no room: the request is greedy.
_SMALLEST_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The choices of one request; the names are those of TensorRT-LLM's LLM API.

    Greedy unless temperature, top_k, top_p or min_p ask for sampling; temperature 0, top_k 1 and top_p 0 are greedy too
    (TensorRT-LLM: `SamplingParams.params_imply_greedy_decoding`, tensorrt_llm/sampling_params.py @1.2). The order is
    penalties, banned tokens, temperature, top_k, top_p, min_p; top_p is taken of what top_k left.
    `repetition_penalty` counts prompt and output, `presence_penalty` and `frequency_penalty` count the output.
    `stop_words` and `bad_words` are sequences of token ids. `logprobs` is how many of the likeliest tokens to report
    beside the chosen one (0: only the chosen one).
    """

    max_tokens: int = 32
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()
    stop_words: Sequence[Sequence[int]] = field(default=())
    bad_words: Sequence[Sequence[int]] = field(default=())
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        asked = (self.temperature, self.top_k, self.top_p, self.min_p)
        if all(value is None for value in asked):
            return True
        cold = self.temperature is not None and self.temperature < _SMALLEST_TEMPERATURE
        return cold or self.top_k == 1 or self.top_p == 0

    @property
    def changes_logits(self) -> bool:
        """Whether penalties or bans touch the logits before a token is chosen."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.min_tokens > 0
            or bool(self.bad_words)
        )

    @property
    def is_plain(self) -> bool:
        """Whether nothing but the likeliest tokens of the model's own logits is asked for."""
        reports = self.logprobs is not None or self.prompt_logprobs is not None
        return self.is_greedy and not self.changes_logits and not reports

    def validate(self, vocab_size: int) -> None:
        """Check every field.

        Raises:
            RequestError: naming the field, its value and what is allowed.
        """
        _whole("max_tokens", self.max_tokens, 1)
        _whole("min_tokens", self.min_tokens, 0, self.max_tokens, "max_tokens")
        _number("temperature", self.temperature, 0.0)
        _whole("top_k", self.top_k, 0)
        _number("top_p", self.top_p, 0.0, 1.0)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0)
        if self.repetition_penalty == 0:
            raise RequestError("repetition_penalty: 0 is out of range; it is above 0", "1 means no penalty")
        _number("presence_penalty", self.presence_penalty, -math.inf)
        _number("frequency_penalty", self.frequency_penalty, -math.inf)
        _whole("seed", self.seed, 0, 2**64 - 1)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos: {self.ignore_eos!r} is neither true nor false")
        _whole("logprobs", self.logprobs, 0, vocab_size, "the vocabulary")
        _whole("prompt_logprobs", self.prompt_logprobs, 0, vocab_size, "the vocabulary")
        check_token_ids("stop_token_ids", self.stop_token_ids, vocab_size)
        for name, words in (("stop_words", self.stop_words), ("bad_words", self.bad_words)):
            for word in words:
                if not len(word):
                    raise RequestError(f"{name}: one of the words is empty; a word has at least one token")
                check_token_ids(name, word, vocab_size)


def check_token_ids(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Check that every id names a token.

    Raises:
        RequestError: naming `name`, the first bad id and its place.
    """
    for place, token_id in enumerate(token_ids):
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{name}[{place}]: {token_id!r} is no token of this model; "
                f"token ids are whole numbers from 0 to {vocab_size - 1}"
            )


def _whole(name: str, value: object, low: int, high: int | None = None, what: str = "") -> None:
    if value is None and name not in ("max_tokens", "min_tokens"):
        return
    good = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    if good:
        return
    limit = f"at least {low}" if high is None else f"from {low} to {high}" + (f" ({what})" if what else "")
    raise RequestError(f"{name}: {value!r} is out of range; it is a whole number {limit}")


def _number(name: str, value: object, low: float, high: float | None = None) -> None:
    if value is None and name in ("temperature", "top_p", "min_p"):
        return
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    good = good and value >= low and (high is None or value <= high)  # type: ignore[operator]
    if good:
        return
    if high is not None:
        limit = f"from {low:g} to {high:g}"
    else:
        limit = f"of at least {low:g}" if math.isfinite(low) else "that is finite"
    raise RequestError(f"{name}: {value!r} is out of range; it is a number {limit}")
