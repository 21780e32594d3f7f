"""Tokenizers that xgrammar could not count, and the real one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trtbuild.adapters.trtllm_tokenizer import tokenizer_info
from trtbuild.errors import CompatibilityError


def test_smollm2(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    info, tokenizer = tokenizer_info(smollm2), AutoTokenizer.from_pretrained(smollm2)
    assert len(info["encoded_vocab"]) == len(tokenizer) == 49152
    assert all(tokenizer.convert_tokens_to_ids(info["encoded_vocab"][place]) == place for place in (0, 1, 999, 49151))
    assert info["stop_token_ids"] == [tokenizer.eos_token_id]


def remove(data: dict[str, Any]) -> None:
    del data["model"]["vocab"][list(data["model"]["vocab"])[100]]


def replace_model(data: dict[str, Any]) -> None:
    data["model"] = {"type": "Unigram", "vocab": [["<|endoftext|>", 0.0], ["<|im_start|>", 0.0], ["<|im_end|>", -1.0]]}


def altered(source: Path, place: Path, change: Callable[[dict[str, Any]], None], config: dict[str, Any]) -> Path:
    place.mkdir()
    data = json.loads((source / "tokenizer.json").read_text())
    change(data)
    (place / "tokenizer.json").write_text(json.dumps(data))
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    return place


def test_pairs_of_token_and_score(tiny_llama: Path, tmp_path: Path) -> None:
    end = {"content": "<|im_end|>", "special": True}
    info = tokenizer_info(altered(tiny_llama, tmp_path / "unigram", replace_model, {"eos_token": end}))
    assert info["encoded_vocab"] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert info["stop_token_ids"] == [2]


@pytest.mark.parametrize(
    ("change", "config", "sentence"),
    [
        (remove, {"eos_token": "<|im_end|>"}, r"has no token \d+, and xgrammar counts them in order; use a model with"),
        (lambda data: data.pop("model"), {"eos_token": "<|im_end|>"}, "guided decoding needs tokenizer.json, and that"),
        (lambda data: None, {"eos_token": "<end>"}, "names no end token of the tokenizer"),
        (lambda data: None, {}, "names no end token of the tokenizer .*; add eos_token, or remove runtime.guided"),
    ],
)
def test_what_xgrammar_could_not_use(
    tiny_llama: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], config: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(CompatibilityError, match=sentence):
        tokenizer_info(altered(tiny_llama, tmp_path / "other", change, config))
