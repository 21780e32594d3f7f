"""From a request's text to what the engine takes: token ids, room for the answer, words, end and pad."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from model_repo.ensemble.tensors import filled, one_prompt, renamed
from model_repo.ensemble.words import pack
from model_repo.llm.contract import Generate, Sampling
from model_repo.llm.text import Codec
from model_repo.llm.wire import Array, BadRequestError, Inputs, messages, number, text, whole, words

# The input's name here, and the name that a client of `ensemble` or `tensorrt_llm_bls` knows it by.
_CLIENT_NAMES = {
    "QUERY": "text_input",
    "MESSAGES": "messages",
    "REQUEST_OUTPUT_LEN": "max_tokens",
    "BAD_WORDS_DICT": "bad_words",
    "STOP_WORDS_DICT": "stop_words",
    "EMBEDDING_BIAS_WORDS": "embedding_bias_words",
    "EMBEDDING_BIAS_WEIGHTS": "embedding_bias_weights",
    "END_ID": "end_id",
    "PAD_ID": "pad_id",
}
_REFUSED = {
    "DECODER_QUERY": "decoder_text_input: this model has no encoder",
    "IMAGE_BYTES": "image_bytes_input: this model reads text only",
    "IMAGE_URL": "image_url_input: this model reads text only",
    "IMAGES": "IMAGES: this model reads text only",
    "VIDEO_BYTES": "video_bytes_input: this model reads text only",
    "PROMPT_TABLE_EXTRA_ID": "prompt_table_extra_id: this model takes no prompt embedding table",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for, in tokens."""

    max_seq_len: int
    max_input_tokens: int
    max_output_tokens: int
    default_max_tokens: int

    def room(self, prompt_tokens: int, wanted: int | None) -> int:
        """How many tokens may be generated after a prompt of this length.

        Raises:
            BadRequestError: the prompt is empty or too long, or more tokens are asked for than there is room.
        """
        if not 1 <= prompt_tokens <= self.max_input_tokens:
            raise BadRequestError(
                f"the prompt has {prompt_tokens} tokens and this model takes 1 to {self.max_input_tokens}; "
                f"{'shorten it' if prompt_tokens else 'send some text'}"
            )
        room = min(self.max_output_tokens, self.max_seq_len - prompt_tokens)
        if wanted is None:
            return max(min(self.default_max_tokens, room), 1)
        if not 1 <= wanted <= self.max_output_tokens:
            message = f"max_tokens: {wanted} is out of range; ask for 1 to {self.max_output_tokens} tokens"
            raise BadRequestError(message)
        if wanted > room:
            raise BadRequestError(
                f"max_tokens: {wanted} after a prompt of {prompt_tokens} tokens exceeds the model's sequence length "
                f"{self.max_seq_len}; ask for at most {room} tokens or shorten the prompt"
            )
        return wanted


def end_ids(directory: Path, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer, most usual first: the tokenizer's own, then those that the model's files name."""
    named: list[int] = []
    for file in ("generation_config.json", "config.json"):
        if named or not (directory / file).is_file():
            continue
        found = json.loads((directory / file).read_text(encoding="utf-8")).get("eos_token_id")
        named = found if isinstance(found, list) else [] if found is None else [found]
    own = tokenizer.eos_token_id
    if own is not None and (own in named or not named):
        named = [own, *(token for token in named if token != own)]
    return tuple(named)


class Preprocessor:
    """Makes the engine's tensors of one request."""

    def __init__(self, codec: Codec, limits: Limits, *, ends: Sequence[int], special: bool) -> None:
        self._codec = codec
        self._limits = limits
        self._ends = tuple(ends)
        self._special = special
        pad = codec.tokenizer.pad_token_id
        self._pad = pad if pad is not None else (ends[0] if ends else 0)

    def tensors(self, inputs: Inputs) -> dict[str, Array]:
        """The output tensors, each with its batch dimension.

        Raises:
            BadRequestError: the request is malformed, too long, or asks for what this model cannot do.
        """
        for name, why in _REFUSED.items():
            if filled(inputs.get(name)):
                raise BadRequestError(f"{why}; send the request without it")
        one_prompt(inputs)
        given = {name: a for name, a in renamed(inputs, _CLIENT_NAMES).items() if filled(a)}
        ids = self._ids(given)
        output_len = self._limits.room(len(ids), whole(given, "max_tokens"))
        end = whole(given, "end_id")
        pad = whole(given, "pad_id")
        stops = self._words(given, "stop_words")
        if end is None and len(self._ends) > 1:
            # TensorRT-LLM knows one end id; the model's others end an answer as stop words of one token.
            stops += [[token] for token in self._ends[1:]]
        return {
            "INPUT_ID": np.array([ids], dtype=np.int32),
            "REQUEST_INPUT_LEN": np.array([[len(ids)]], dtype=np.int32),
            "REQUEST_OUTPUT_LEN": np.array([[output_len]], dtype=np.int32),
            # A decoder-only engine ignores these two; upstream sends one pad token as well.
            "DECODER_INPUT_ID": np.array([[self._pad]], dtype=np.int32),
            "REQUEST_DECODER_INPUT_LEN": np.array([[1]], dtype=np.int32),
            "STOP_WORDS_IDS": pack(stops),
            "BAD_WORDS_IDS": pack(self._words(given, "bad_words")),
            "EMBEDDING_BIAS": self._bias(given),
            "OUT_END_ID": np.array([[self._end() if end is None else end]], dtype=np.int32),
            "OUT_PAD_ID": np.array([[self._pad if pad is None else pad]], dtype=np.int32),
        }

    def _end(self) -> int:
        return self._ends[0] if self._ends else -1

    def _ids(self, given: Inputs) -> list[int]:
        if ("text_input" in given) == ("messages" in given):
            what = "text_input and messages are given together" if "messages" in given else "no prompt is given"
            raise BadRequestError(f"{what}; send exactly one of text_input and messages")
        request = Generate(text(given, "text_input"), messages(given), None, Sampling())
        return self._codec.prompt(request, special=self._special)[1]

    def _words(self, given: Inputs, name: str) -> list[list[int]]:
        """The token sequences of each word, at a text's start and after a space; empty words are dropped."""
        array = given.get(name)
        if array is None:
            return []
        kept = np.array([word for word in array.reshape(-1) if word not in (b"", "")], dtype=np.object_)
        return [ids for word in words({name: kept}, name) for ids in self._codec.word_ids(word)]

    def _bias(self, given: Inputs) -> Array:
        """What is added to the logits, by token id; nothing where nobody asked."""
        weights = given.get("embedding_bias_weights")
        chosen = words(given, "embedding_bias_words")
        if weights is None and not chosen:
            return np.zeros((1, 0), dtype=np.float32)
        if weights is None or weights.size != len(chosen):
            count = 0 if weights is None else weights.size
            raise BadRequestError(
                f"embedding_bias_weights: {count} weights for {len(chosen)} embedding_bias_words; send one for each"
            )
        bias = np.zeros((1, len(self._codec.tokenizer)), dtype=np.float32)
        for word, weight in zip(chosen, weights.reshape(-1), strict=True):
            value = number({"weight": np.array([weight])}, "weight")
            for token in self._codec.tokenizer.encode(word, add_special_tokens=False):
                bias[0, token] += value
        return bias
