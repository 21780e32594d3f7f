"""Samples that are documents, what samples cover, and which experts are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trtbuild.compress.coverage import coverage_of, expert_notes, script_shares
from trtbuild.compress.textdata import CalibrationSpec, load_samples, load_tokenizer
from trtbuild.errors import RecipeError

Write = Callable[[str, str | bytes], Path]


def spec(data: Path, **changes: Any) -> CalibrationSpec:
    values: dict[str, Any] = {"column": None, "count": 3, "length": 64, "seed": 0, "packing": "padded"}
    return CalibrationSpec(data=data, **values | changes)


def rows(*texts: str) -> str:
    return "\n".join(json.dumps({"text": text}) for text in texts)


def test_a_sample_is_a_document(tokenizer_dir: Path, write: Write) -> None:
    path = write("a.jsonl", rows("x" * 40, "too short", "y" * 16, "z" * 400))
    samples = load_samples(spec(path), tokenizer_dir)
    tokenizer = load_tokenizer(tokenizer_dir)
    assert [tokenizer.decode(window) for window in samples.input_ids] == ["x" * 32, "y" * 16, "z" * 64]
    assert (samples.tokens, samples.documents) == (112, 4)
    assert samples.coverage is not None
    assert samples.coverage.to_json() == {
        "tokens": 112, "samples": 3, "documents": 3, "shortest": 16, "median": 32, "longest": 64,
        "scripts": {"Latin": 1.0},
    }  # fmt: skip
    assert samples.coverage.sentence() == (
        "112 tokens of text in 3 samples of 16 to 64, from 3 documents; scripts: Latin 100.0%"
    )


def test_paragraphs_are_the_documents_of_plain_text(tokenizer_dir: Path, write: Write) -> None:
    path = write("a.txt", "\n\n".join(letter * 20 for letter in "abcd") + "\n \n" + "e" * 20)
    samples = load_samples(spec(path, count=5), tokenizer_dir)
    tokenizer = load_tokenizer(tokenizer_dir)
    assert [tokenizer.decode(window) for window in samples.input_ids] == [letter * 16 for letter in "abcde"]


def test_equal_tokens_cut_elsewhere_have_another_digest(tokenizer_dir: Path, write: Write) -> None:
    first, second = (
        load_samples(spec(write(f"{name}.jsonl", rows(*texts)), count=2), tokenizer_dir)
        for name, texts in (("a", ("x" * 16, "x" * 32)), ("b", ("x" * 32, "x" * 16)))
    )
    assert sum(first.input_ids, ()) == sum(second.input_ids, ())
    assert first.digest != second.digest


def test_the_prefix_comes_once(tokenizer_dir: Path, tmp_path: Path, write: Write) -> None:
    from tokenizers import Tokenizer, processors

    raw = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    raw.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = "<|endoftext|>{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "bos")
    raw.save(str(tmp_path / "bos" / "tokenizer.json"))
    chat = write("chat.jsonl", json.dumps({"messages": [{"role": "user", "content": "q" * 50}]}))
    plain = write("plain.jsonl", rows("q" * 50))
    found = [load_samples(spec(path, count=1), tmp_path / "bos").input_ids for path in (chat, plain)]
    assert found[0] == found[1]
    assert found[0][0][:2] == (0, found[0][0][2])


def test_too_few_documents(tokenizer_dir: Path, write: Write) -> None:
    path = write("a.jsonl", rows("x" * 40, "short"))
    with pytest.raises(RecipeError) as caught:
        load_samples(spec(path), tokenizer_dir)
    assert str(caught.value) == (
        "compress.calibration.count: 3 samples need as many documents of 16 tokens or more, "
        f"but {path} has 1 and 1 shorter ones; give more documents, use packing: packed, or set "
        "compress.calibration.count to 1 or less"
    )


def test_tools_reach_the_template(tokenizer_dir: Path, tmp_path: Path, write: Write) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}[{{ tool['function']['name'] }}]{% endfor %}"
        "{% for message in messages %}{{ message['role'] }}:{{ message['content'] }};{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "tools")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what time is it, please?"}]
    tools = [{"type": "function", "function": {"name": "now"}}]
    path = write("chat.jsonl", json.dumps({"messages": messages, "tools": tools}))
    (window,) = load_samples(spec(path, count=1), tmp_path / "tools").input_ids
    assert tokenizer.decode(window).startswith("[now]system:be brief;user:what time is i")


def test_documents_that_windows_hold_a_part_of(tokenizer_dir: Path, write: Write) -> None:
    path = write("a.jsonl", rows(*["w" * 30] * 6))  # 32 tokens each with the blank line
    samples = load_samples(spec(path, count=3, length=64, packing="packed"), tokenizer_dir)
    assert samples.coverage is not None
    assert samples.coverage.documents == 6
    samples = load_samples(spec(path, count=1, length=48, packing="packed"), tokenizer_dir)
    assert samples.coverage is not None
    assert samples.coverage.documents == 2


def test_scripts() -> None:
    assert script_shares("abc déf 123 !") == {"Latin": 1.0}
    assert script_shares("привет мир 漢字 かな カナ ａｂ") == {
        "Cyrillic": 0.5294, "CJK": 0.1176, "Hiragana": 0.1176, "Katakana": 0.1176, "Latin": 0.1176,
    }  # fmt: skip
    assert script_shares("a" * 5000 + "б") == {"Latin": 0.9998, "other": 0.0002}
    assert script_shares("12 34") == {}
    assert coverage_of([(1, 2)], 1, ["12"]).sentence().endswith("scripts: no letters")


def test_experts_are_named_worst_first() -> None:
    tokens = {"layers.0.experts": [100, 100, 7, 100], "layers.1.experts": [0, 1000, 1000, 90]}
    (note,) = expert_notes(tokens)
    assert note.startswith(
        "2 of 8 experts saw too few calibration tokens (an even share is 76): layers.1.experts.0 (0 to"
    )
    assert "layers.0.experts.2 (7 tokens); raise compress.calibration.count" in note
    assert expert_notes({"layers.0.experts": [8, 100]}) == []
    assert expert_notes({}) == []
