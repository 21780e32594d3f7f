"""Windows of tokens for calibration and evaluation."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from trtbuild.compress.textdata import (
    CALIBRATION_TEXT,
    HELDOUT_TEXT,
    CalibrationSpec,
    HeldoutSpec,
    Samples,
    heldout_windows,
    load_samples,
    load_tokenizer,
)
from trtbuild.errors import ArtifactError, RecipeError

Write = Callable[[str, str | bytes], Path]


def spec(data: Path | None = None, **changes: Any) -> CalibrationSpec:
    values: dict[str, Any] = {"column": None, "count": 4, "length": 32, "seed": 0}
    return CalibrationSpec(data=data, **values | changes)


def problem(call: Callable[[], Samples]) -> tuple[str, str]:
    with pytest.raises(RecipeError) as caught:
        call()
    (found,) = caught.value.problems
    return found.path, str(found)


def words(count: int, salt: str = "") -> str:
    return "".join(
        f"{salt} Sentence number {number} says something else than the others, at length.\n" for number in range(count)
    )


def test_samples_are_full_windows_in_the_order_of_the_text(tokenizer_dir: Path, write: Write) -> None:
    path = write("a.txt", words(100))
    tokenizer = load_tokenizer(tokenizer_dir)
    samples = load_samples(spec(path, count=8, length=64), tokenizer_dir)
    assert [len(window) for window in samples.input_ids] == [64] * 8
    assert samples.tokens == 8 * 64
    assert samples.source == str(path)
    text = path.read_text()
    starts = [text.find(tokenizer.decode(window)) for window in samples.input_ids]
    assert min(starts) >= 0
    assert starts == sorted(set(starts))


def test_seed_chooses_and_equal_seeds_agree(tokenizer_dir: Path) -> None:
    first, again, other = (load_samples(spec(seed=seed), tokenizer_dir) for seed in (0, 0, 1))
    assert first == again
    assert first.digest != other.digest
    assert set(first.input_ids) != set(other.input_ids)


def test_documents_are_packed_with_a_blank_line_between(tokenizer_dir: Path, write: Write) -> None:
    path = write("a.jsonl", "\n".join(json.dumps({"text": f"document {number}"}) for number in range(40)))
    samples = load_samples(spec(path, count=1, length=256), tokenizer_dir)
    text = load_tokenizer(tokenizer_dir).decode(samples.input_ids[0])
    assert text.startswith("document 0\n\ndocument 1\n\n")
    assert samples.documents == 40


def test_chat_messages_go_through_the_template(tokenizer_dir: Path, write: Write) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    path = write("chat.jsonl", "\n".join(json.dumps({"id": 1, "messages": messages}) for _ in range(40)))
    samples = load_samples(spec(path, count=1, length=128), tokenizer_dir)
    text = load_tokenizer(tokenizer_dir).decode(samples.input_ids[0])
    assert text.startswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>\n<|im_start|>user")
    assert samples.input_ids[0][0] == 1


def test_chat_without_template_is_refused(tokenizer_dir: Path, write: Write, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    path = write("chat.jsonl", json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    field, text = problem(lambda: load_samples(spec(path), tmp_path / "plain"))
    assert field == "compress.calibration.data"
    assert "holds chat messages (line 1), but the tokenizer has no chat template; give a column of text" in text


def test_messages_that_the_template_refuses_name_their_line(tokenizer_dir: Path, write: Write, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    tokenizer.save_pretrained(tmp_path / "strict")
    path = write("chat.jsonl", json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    _, text = problem(lambda: load_samples(spec(path), tmp_path / "strict"))
    assert "has messages in line 1 that the chat template refuses: roles must alternate" in text


def test_windows_begin_with_what_the_tokenizer_puts_first(tokenizer_dir: Path, tmp_path: Path, write: Write) -> None:
    from tokenizers import Tokenizer, processors

    raw = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    raw.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 2)]
    )
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.save_pretrained(tmp_path / "bos")
    raw.save(str(tmp_path / "bos" / "tokenizer.json"))
    samples = load_samples(spec(write("a.txt", words(50)), count=5), tmp_path / "bos")
    assert samples.prefix == (0,)
    assert [window[0] for window in samples.input_ids] == [0] * 5
    assert [len(window) for window in samples.input_ids] == [32] * 5
    assert all(token not in window[1:] for window in samples.input_ids for token in (0, 2))


def test_too_short_says_found_and_needed(tokenizer_dir: Path, write: Write) -> None:
    path = write("a.txt", "x" * 100)
    field, text = problem(lambda: load_samples(spec(path, count=4, length=32), tokenizer_dir))
    assert field == "compress.calibration.count"
    assert f"4 samples of 32 tokens need 128 tokens, but {path} has 100; give a longer file, or set" in text
    assert text.endswith("compress.calibration.count to 3 or less")
    field, text = problem(lambda: load_samples(spec(path, count=1, length=128), tokenizer_dir))
    assert field == "compress.calibration.data"
    assert "but " + str(path) + " has 100" in text
    assert text.endswith("set compress.calibration.length to 100 or less")
    field, text = problem(lambda: load_samples(spec(count=100_000), tokenizer_dir))
    assert (field, "but the shipped text has" in text) == ("compress.calibration.count", True)


def test_file_of_blank_lines_holds_no_text(tokenizer_dir: Path, write: Write) -> None:
    assert "holds no text" in problem(lambda: load_samples(spec(write("a.jsonl", "\n\n")), tokenizer_dir))[1]


def test_large_file_is_not_read_to_its_end(tokenizer_dir: Path, write: Write) -> None:
    rows = [json.dumps({"text": words(4, salt=str(number))}) for number in range(100)]
    path = write("a.jsonl", "\n".join([*rows, "this is not JSON"]))
    assert load_samples(spec(path, count=2), tokenizer_dir).documents < 10


def test_missing_tokenizer_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no tokenizer could be loaded from"):
        load_samples(spec(), tmp_path)
    with pytest.raises(ArtifactError, match="is not a directory"):
        load_samples(spec(), tmp_path / "none")


def test_heldout_windows_spread_over_the_whole_file(tokenizer_dir: Path, write: Write) -> None:
    path = write("held.txt", "".join(f"number {number}\n" for number in range(1000, 2000)))
    samples = heldout_windows(HeldoutSpec(path, tokens=310, length=31), tokenizer_dir)
    assert len(samples.input_ids) == 10  # ten times 31 predictions
    text = path.read_text()
    tokenizer = load_tokenizer(tokenizer_dir)
    starts = [text.find(tokenizer.decode(window)) for window in samples.input_ids]
    assert starts == sorted(starts)
    gaps = [after - before for before, after in pairwise(starts)]
    assert max(gaps) < 1.5 * min(gaps)
    assert starts[-1] > 0.8 * len(text)


def test_too_little_heldout_text_is_refused(tokenizer_dir: Path, write: Write) -> None:
    path = write("held.txt", "y" * 1000)
    field, text = problem(lambda: heldout_windows(HeldoutSpec(path, tokens=4096, length=512), tokenizer_dir))
    assert field == "quality.data"
    assert "has 1,000 tokens, 1 windows of 513; 8 are needed; give a longer file to evaluate 4,096 tokens" in text
    assert "lower quality.tokens" not in text


@pytest.mark.parametrize("kind", ["same", "link", "copy", "excerpt", "jsonl"])
def test_calibration_text_is_refused_for_evaluation(
    tokenizer_dir: Path, write: Write, tmp_path: Path, kind: str
) -> None:
    calibration = write("calibration.txt", words(300))
    heldout = calibration
    if kind == "link":
        heldout = tmp_path / "link.txt"
        heldout.symlink_to(calibration)
    elif kind == "copy":
        heldout = write("copy.txt", calibration.read_bytes())
    elif kind == "excerpt":
        heldout = write("excerpt.txt", words(200, salt="new") + words(20))
    elif kind == "jsonl":
        heldout = write("rows.jsonl", "\n".join(json.dumps({"text": line}) for line in words(300).splitlines()))
    wanted = HeldoutSpec(heldout, tokens=1024, length=32, calibration=calibration)
    field, text = problem(lambda: heldout_windows(wanted, tokenizer_dir))
    assert field == "quality.data"
    assert "calibration" in text
    assert "a model scores better on text that it was calibrated with" in text


def test_a_few_shared_lines_are_not_a_copy(tokenizer_dir: Path, write: Write) -> None:
    calibration = write("calibration.txt", words(300))
    heldout = write("held.txt", words(200, salt="new") + words(5))
    heldout_windows(HeldoutSpec(heldout, tokens=1024, length=32, calibration=calibration), tokenizer_dir)


def test_shipped_texts_are_refused_in_the_other_role(tokenizer_dir: Path) -> None:
    wanted = HeldoutSpec(CALIBRATION_TEXT, tokens=1024, length=32)
    assert problem(lambda: heldout_windows(wanted, tokenizer_dir))[0] == "quality.data"
    wanted = HeldoutSpec(None, tokens=1024, length=32, calibration=HELDOUT_TEXT)
    assert problem(lambda: heldout_windows(wanted, tokenizer_dir))[0] == "compress.calibration.data"


def test_importing_needs_no_torch() -> None:
    code = "import sys, trtbuild.compress.textdata; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": "builder"})


def _documents(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _runs(documents: list[dict[str, str]], length: int) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for document in documents:
        parts = document["text"].split()
        found |= {tuple(parts[start : start + length]) for start in range(len(parts) - length + 1)}
    return found


def test_shipped_texts_share_no_document_and_no_run_of_twelve_words() -> None:
    calibration, heldout = _documents(CALIBRATION_TEXT), _documents(HELDOUT_TEXT)
    assert (len(calibration), len(heldout)) == (102, 28)
    assert not {d["id"] for d in calibration} & {d["id"] for d in heldout}
    assert not {d["source"] for d in calibration} & {d["source"] for d in heldout if d["licence"] != "PSF-2.0"}
    assert not _runs(calibration, 12) & _runs(heldout, 12)


def test_every_shipped_document_has_its_licence_on_record() -> None:
    record = CALIBRATION_TEXT.with_name("LICENSES.md").read_text(encoding="utf-8")
    for document in _documents(CALIBRATION_TEXT) + _documents(HELDOUT_TEXT):
        assert set(document) == {"id", "title", "source", "licence", "text"}
        row = next(line for line in record.splitlines() if line.startswith(f"| {document['id']} |"))
        assert document["source"] in row
        assert ("PSF-2.0" in row) == (document["licence"] == "PSF-2.0")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in record


@pytest.mark.smollm2
def test_shipped_texts_are_long_enough(smollm2: Path) -> None:
    samples = load_samples(spec(count=128, length=512), smollm2)
    assert samples.tokens == 65_536
    assert samples.prefix == ()
    heldout = heldout_windows(HeldoutSpec(None, tokens=20_480, length=512), smollm2)
    assert heldout.tokens == 40 * 513
