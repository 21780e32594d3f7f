"""Text on both sides of the tokens: prompt and chat template, incremental detokenization, stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .contract import Generate
from .wire import BadRequestError

_BROKEN = "\ufffd"
# UTF-8 has at most three bytes before a character is complete, and a byte-fallback decoder shows each as one sign.
_MAX_PENDING = 3
_LONG_WINDOW = 32


class Codec:
    """One checkpoint's tokenizer and chat template."""

    def __init__(self, tokenizer: Any, max_input_tokens: int, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        longest = max((len(token) for token in tokenizer.get_vocab()), default=1)
        self._max_characters = longest * max_input_tokens

    @classmethod
    def load(
        cls, directory: Path, *, max_input_tokens: int, trust_remote_code: bool, skip_special_tokens: bool = True
    ) -> Codec:
        """The tokenizer in `directory`; it is never looked for anywhere else."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)
        return cls(tokenizer, max_input_tokens, skip_special_tokens=skip_special_tokens)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer itself, for its special tokens."""
        return self._tokenizer

    def prompt(self, request: Generate, *, special: bool = True) -> tuple[str, list[int]]:
        """The prompt's text and token ids; messages go through the model's chat template.

        `special` says whether a text gets the tokenizer's special tokens around it.

        Raises:
            BadRequestError: the prompt is far too long, or the chat template is missing or refuses the messages.
        """
        if request.input_ids is not None:
            ids = list(request.input_ids)
            return self.decode(ids) if request.echo else "", ids
        if request.messages is not None:
            # The template writes the special tokens itself.
            text = self._render(request.messages)
            return text, self._encode("messages", text, special=False)
        text = request.text or ""
        return text, self._encode("text_input", text, special=special)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens, without any tidying of spaces."""
        text: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def word_ids(self, word: str) -> list[list[int]]:
        """The token sequences of a word: at the start of a text, and after a space."""
        found: list[list[int]] = []
        for text in (word, " " + word):
            ids = list(self._tokenizer.encode(text, add_special_tokens=False))
            if ids and ids not in found:
                found.append(ids)
        return found

    def _encode(self, name: str, text: str, *, special: bool) -> list[int]:
        if len(text) > self._max_characters:
            # Tokenizing megabytes only to count them would hold up everyone else.
            raise BadRequestError(
                f"{name}: {len(text)} characters are more than the {self._max_characters} that the longest prompt of "
                "this model can have; shorten it"
            )
        return list(self._tokenizer.encode(text, add_special_tokens=special))

    def _render(self, messages: list[dict[str, Any]]) -> str:
        if not getattr(self._tokenizer, "chat_template", None):
            raise BadRequestError("messages: this checkpoint has no chat template; send text_input")
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of the checkpoint's author: it may raise anything
            raise BadRequestError(f"messages: the model's chat template refuses them ({error})") from error
        return text


class IncrementalDecoder:
    """Turns tokens into text one by one, so that the pieces put together are the whole text.

    A token may hold a part of a character, and some decoders strip the space in front of a text. So the new tokens are
    decoded behind the tokens before them, whose text is cut off again, and a trailing sign for a broken character is
    held back until the next tokens complete it or show that nothing will.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._context_text = ""
        self._window: list[int] = []
        self._given = 0

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; may be empty."""
        self._window.append(token_id)
        text = self._window_text()
        pending = 0
        while pending < _MAX_PENDING and text.endswith(_BROKEN, 0, len(text) - pending):
            pending += 1
        certain = text[: len(text) - pending]
        delta, self._given = certain[self._given :], max(self._given, len(certain))
        if text and not pending:
            self._begin_window()
        elif len(self._window) > _LONG_WINDOW:
            self._shorten_window()
        return delta

    def finish(self) -> str:
        """The rest, when no token follows: characters that stayed broken show as such."""
        delta = self._window_text()[self._given :]
        self._begin_window()
        return delta

    def _window_text(self) -> str:
        whole = self._decode(self._context + self._window)
        if whole.startswith(self._context_text):
            return whole[len(self._context_text) :]
        # A byte-fallback decoder shows a whole run of bytes as broken when its end is: judge the new bytes alone.
        return self._decode(self._window)

    def _begin_window(self) -> None:
        self._context, self._window, self._given = self._window, [], 0
        self._context_text = self._decode(self._context)

    def _shorten_window(self) -> None:
        """Drop the start of a window of endless broken characters where the text divides cleanly."""
        cut = len(self._window) - 2 * _MAX_PENDING
        head, tail = self._window[:cut], self._window[cut:]
        text = self._decode(head)
        if len(text) <= self._given and text + self._decode(tail) == self._window_text():
            self._context, self._context_text, self._window = [], "", tail
            self._given -= len(text)


class StopScanner:
    """Finds stop strings in a text that comes in pieces; what may be the start of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that is certainly no part of a stop string, and the stop string that ends it, if one is complete."""
        if not self._stops:
            return text, None
        held = self._held + text
        found = [(place, stop) for stop in self._stops if (place := held.find(stop)) >= 0]
        if found:
            place, stop = min(found)
            self._held = ""
            return held[:place], stop
        keep = max(_overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], None

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
