"""``tokenizer.json``: which number each token has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TOKENIZER_FILE = "tokenizer.json"


def vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Every token's number, added tokens included, from the parsed file (huggingface/tokenizers, 0.22).

    Raises:
        KeyError, TypeError, IndexError: it is no such file.
    """
    known = tokenizer["model"]["vocab"]
    if isinstance(known, list):  # unigram: pairs of token and score
        known = {pair[0]: number for number, pair in enumerate(known)}
    return dict(known) | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
