"""What the C++ runtime must know of a tokenizer to follow a grammar: ``xgrammar_tokenizer_info.json``.

Three entries, as upstream's examples/generate_xgrammar_tokenizer_info.py writes them from a fast tokenizer
(NVIDIA/TensorRT-LLM tensorrt_llm/llmapi/tokenizer.py, _xgrammar_tokenizer_info): ``encoded_vocab``, every token in the
order of its number; ``tokenizer_str``, the tokenizer's own description, from which xgrammar reads how tokens become
bytes; ``stop_token_ids``, the end token alone. All three stand in ``tokenizer.json`` and ``tokenizer_config.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtbuild.errors import CompatibilityError
from trtbuild.tokenizer_file import TOKENIZER_FILE, vocabulary

_CONFIG = "tokenizer_config.json"
_HINT = "use a model with a fast tokenizer, or remove runtime.guided_decoding_backend"


def tokenizer_info(directory: Path) -> dict[str, Any]:
    """The contents of the file for the tokenizer in `directory`.

    Raises:
        CompatibilityError: its files do not say what xgrammar needs.
    """
    try:
        text = (directory / TOKENIZER_FILE).read_text(encoding="utf-8")
        numbers = vocabulary(json.loads(text))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        message = f"guided decoding needs {TOKENIZER_FILE}, and that of {directory} cannot be read ({error})"
        raise CompatibilityError(message, _HINT) from None
    ordered = sorted(numbers, key=lambda token: numbers[token])
    gap = next((place for place, token in enumerate(ordered) if numbers[token] != place), None)
    if gap is not None:
        message = f"guided decoding: {directory / TOKENIZER_FILE} has no token {gap}, and xgrammar counts them in order"
        raise CompatibilityError(message, _HINT)
    return {"encoded_vocab": ordered, "tokenizer_str": text, "stop_token_ids": [_end(directory, numbers)]}


def _end(directory: Path, numbers: Mapping[str, int]) -> int:
    try:
        end = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))["eos_token"]
        return numbers[end["content"] if isinstance(end, dict) else end]
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"guided decoding: {directory / _CONFIG} names no end token of the tokenizer ({error!r})"
        raise CompatibilityError(message, "add eos_token, or remove runtime.guided_decoding_backend") from None
