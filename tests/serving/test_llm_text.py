"""Incremental detokenization and stop strings: pieces put together are the whole text, and nothing leaks."""

from __future__ import annotations

import random
from typing import Any

import pytest
from model_repo.llm.text import IncrementalDecoder, StopScanner

TEXTS = [
    "plain ASCII, with  two spaces and\nnewlines\n",
    "emoji 👩‍🚀👨‍👩‍👧‍👦🏳️‍🌈 and flags 🇩🇪🇯🇵",
    "combining e\u0301 a\u0308\u0323 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L",
    "漢字かな交じり文 中文 한국어",
    "العربية עברית \u202bright to left\u202c",
    "math 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ∀x∈ℝ: ⌈x⌉ = −⌊−x⌋",
    "a real replacement sign \ufffd in the middle, and at the end \ufffd",
    " leading space", "   ", "\u200b\u200d", "",
]  # fmt: skip


def decoder(tokenizer: Any) -> IncrementalDecoder:
    return IncrementalDecoder(
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    incremental = decoder(tokenizer)
    return [*(incremental.push(token) for token in ids), incremental.finish()]


def whole(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def byte_fallback_tokenizer() -> Any:
    """Like Llama 2's: pieces with ▁ for spaces, a token for every byte, and a decoder that strips the first space."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [*"abcdefghijklmnopqrstuvwxyzABCMTZ,.:;()=▁é漢", "▁hello", "▁world", "lo", "he"]
    vocabulary = list(dict.fromkeys(pieces))
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(vocabulary)},
            merges=[("l", "o"), ("h", "e")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_text_comes_back_whole(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    got = pieces(tokenizer, ids)
    assert "".join(got) == whole(tokenizer, ids) == text


@pytest.mark.parametrize("text", [text for text in TEXTS if "\ufffd" not in text])
def test_byte_fallback_text_comes_back_whole(text: str) -> None:
    tokenizer = byte_fallback_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    got = pieces(tokenizer, ids)
    assert "".join(got) == whole(tokenizer, ids) == text
    assert "\ufffd" not in "".join(got)


def test_characters_are_never_sent_in_halves(tokenizer: Any) -> None:
    ids = tokenizer.encode("👩‍🚀 é 漢", add_special_tokens=False)
    assert len(ids) > 12, "the tokenizer must split characters for this test to mean anything"
    assert all("\ufffd" not in piece for piece in pieces(tokenizer, ids))


def test_random_tokens_equal_the_tokenizer_s_own_decoding(tokenizer: Any) -> None:
    """Random ids are mostly invalid UTF-8 and special tokens: the hardest case for a byte-level decoder."""
    draw = random.Random(7)
    for _ in range(300):
        ids = [draw.randrange(320) for _ in range(draw.randrange(1, 80))]
        assert "".join(pieces(tokenizer, ids)) == whole(tokenizer, ids), ids


def test_endless_broken_bytes_still_flow(tokenizer: Any) -> None:
    broken = tokenizer.encode("👩", add_special_tokens=False)[0]
    ids = [broken] * 400 + tokenizer.encode("ok", add_special_tokens=False)
    incremental = decoder(tokenizer)
    got = [incremental.push(token) for token in ids]
    assert sum(1 for piece in got if piece) > 300, "broken characters are not held for ever"
    assert len(incremental._window) < 64, "the window stays short"
    assert "".join(got) + incremental.finish() == whole(tokenizer, ids)


def test_byte_fallback_stays_close_to_the_truth_on_random_bytes() -> None:
    """Transformers breaks a whole run of bytes when its end is broken; we keep the good characters before it."""
    tokenizer = byte_fallback_tokenizer()
    byte = tokenizer.convert_tokens_to_ids
    ids = [byte("<0xC3>"), byte("<0xA9>"), byte("<0xF0>"), byte("a")]
    assert "".join(pieces(tokenizer, ids)) == "é\ufffda"
    draw = random.Random(3)
    for _ in range(200):
        run = [draw.randrange(3, 290) for _ in range(draw.randrange(1, 40))]
        joined = "".join(pieces(tokenizer, run))
        rest = iter(joined)
        assert all(char in rest for char in whole(tokenizer, run) if char.isalpha()), "every good character, in order"


def scan(stops: list[str], parts: list[str]) -> tuple[str, str | None, list[str]]:
    scanner, sent = StopScanner(stops), []
    for part in parts:
        released, stop = scanner.push(part)
        sent.append(released)
        if stop is not None:
            return "".join(sent), stop, sent
    return "".join(sent) + scanner.finish(), None, sent


@pytest.mark.parametrize(
    ("stops", "text", "kept", "stop"),
    [
        (["END"], "some text END and more", "some text ", "END"),
        (["END"], "ENDING", "", "END"),
        (["END"], "the EN is not it", "the EN is not it", None),
        (["\n\n"], "one\ntwo\n\nthree", "one\ntwo", "\n\n"),
        (["aab"], "aaaab", "aa", "aab"),
        (["c", "abcd"], "xxabcd", "xxab", "c"),
        (["👩‍🚀"], "an 👩‍🚀!", "an ", "👩‍🚀"),
        (["END"], "almost EN", "almost EN", None),
    ],
)
def test_stop_strings_cut_the_text(stops: list[str], text: str, kept: str, stop: str | None) -> None:
    assert scan(stops, list(text))[:2] == (kept, stop)


def test_no_split_of_the_text_leaks_a_stop_string() -> None:
    draw = random.Random(11)
    for _ in range(500):
        text = "".join(draw.choice("ab") for _ in range(30))
        stop = "".join(draw.choice("ab") for _ in range(draw.randrange(1, 6)))
        parts, rest = [], text
        while rest:
            cut = draw.randrange(1, 5)
            parts.append(rest[:cut])
            rest = rest[cut:]
        kept, found, sent = scan([stop], parts)
        place = text.find(stop)
        assert (kept, found) == ((text, None) if place < 0 else (text[:place], stop))
        assert stop not in "".join(sent)
