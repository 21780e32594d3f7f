"""Prompts and answers: what is read, what is held out, what a batch asks the draft to foresee."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_requests import make_request

from trtbuild.compress.journal import Journal
from trtbuild.compress.textdata import load_tokenizer
from trtbuild.errors import RecipeError
from trtbuild.training.answers import Answered, _until_end, answer_all
from trtbuild.training.batches import IGNORED, frequent_tokens, make_batch, schedule
from trtbuild.training.prompts import Prompts, load_prompts
from trtbuild.training.request import parse_request
from trtbuild.training.target import load_target


def prompts_of(tiny_llama: Path, folder: Path, text: str, suffix: str = ".jsonl", **changes: Any) -> Prompts:
    path = folder / f"given{suffix}"
    path.write_text(text, encoding="utf-8")
    return load_prompts(parse_request(make_request(tiny_llama, folder, "medusa") | {"prompts": str(path)} | changes))


def rows(*values: Any, name: str = "text") -> str:
    return "".join(json.dumps({name: value}) + "\n" for value in values)


def test_text_is_taken_as_it_is_and_messages_through_the_template(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    found = prompts_of(tiny_llama, tmp_path, rows("one fox", "two dogs"))
    assert {*found.learned, *found.held_out} == {
        tuple(tokenizer(text)["input_ids"]) for text in ("one fox", "two dogs")
    }
    question = [{"role": "user", "content": "one fox?"}]
    answered = [*question, {"role": "assistant", "content": "a reference answer"}]
    other = [{"role": "user", "content": "two dogs?"}]
    found = prompts_of(tiny_llama, tmp_path, rows(answered, other, name="messages"))
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n")
    assert tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) in {*found.learned, *found.held_out}
    found = prompts_of(tiny_llama, tmp_path, "first line\n\nsecond line\n", ".txt")
    assert {*found.learned, *found.held_out} == {
        tuple(tokenizer(text)["input_ids"]) for text in ("first line", "second line")
    }


def test_held_out_prompts_are_never_learned_from(tiny_llama: Path, tmp_path: Path) -> None:
    text = rows(*(f"prompt {number % 10}" for number in range(40)))
    found = prompts_of(tiny_llama, tmp_path, text, held_out=0.3)
    assert (len(found.learned), len(found.held_out), found.found) == (7, 3, 40)
    assert not set(found.learned) & set(found.held_out)
    assert prompts_of(tiny_llama, tmp_path, text, held_out=0.3) == found
    other = prompts_of(tiny_llama, tmp_path, text, held_out=0.3, seed=1)
    assert set(other.held_out) != set(found.held_out)
    fewer = prompts_of(tiny_llama, tmp_path, text, samples=4)
    assert len(fewer.learned) + len(fewer.held_out) == 4


@pytest.mark.parametrize(
    ("text", "changes", "sentence"),
    [
        ("\n \n", {}, "speculative.train.prompts: .* holds no prompt; give a file with prompts like those"),
        (rows("the same", "the same"), {}, "holds one prompt, however often; give two at least"),
        (
            rows("a" * 300, "b" * 300, "short"), {},
            "speculative.train.max_seq_len: 2 of 3 prompts of .* are longer than 52 tokens, and two others are needed",
        ),
        (rows("a", "b"), {"column": "question"}, "speculative.train.column: line 1 has no column 'question'"),
        (rows(7), {}, "speculative.train.column: no column holds text or chat messages"),
    ],
)  # fmt: skip
def test_prompts_of_no_use(tiny_llama: Path, tmp_path: Path, text: str, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        prompts_of(tiny_llama, tmp_path, text, **changes)


def test_the_target_answers_greedily_and_a_journal_keeps_it(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_target(parse_request(make_request(tiny_llama, tmp_path, "medusa")), torch.device("cpu"))
    prompts = [(5, 6, 7), (8, 9), *((20 + number, 30) for number in range(8))]
    told: list[int] = []
    found, resumed = answer_all(model, prompts, (2,), 6, Journal(tmp_path, "key"), told.append)
    assert (resumed, told) == (0, [8, 2])
    for one in found:
        ids = list(one.prompt)
        for token in one.answer:
            with torch.no_grad():
                assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
        assert len(one.answer) == 6 or one.answer[-1] == 2
        assert 2 not in one.answer[:-1]

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError

    model.generate = never
    again, resumed = answer_all(model, prompts, (2,), 6, Journal(tmp_path, "key"), told.append)
    assert (again, resumed) == (found, 10)


def test_an_answer_ends_with_its_first_end() -> None:
    assert _until_end([5, 2, 2, 2], (2, 3)) == [5, 2]
    assert _until_end([5, 6], (2,)) == [5, 6]


def test_a_batch_foresees_answers_alone() -> None:
    batch = make_batch([Answered((1, 2, 3), (4, 5)), Answered((6,), (7, 8, 9))], torch.device("cpu"))
    assert batch.ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]]
    assert batch.mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.foreseen.tolist() == [[0, 0, 1, 1, 0], [1, 1, 1, 0, 0]]
    none = IGNORED
    assert batch.following.tolist() == [[none, none, 4, 5, none], [7, 8, 9, none, none]]


def test_every_epoch_has_every_answer_once(tiny_llama: Path, tmp_path: Path) -> None:
    asked = parse_request(make_request(tiny_llama, tmp_path, "medusa", epochs=2, batch_size=4))
    steps = schedule(10, asked)
    assert [len(step) for step in steps] == [4, 4, 2] * 2
    first, second = [number for step in steps[:3] for number in step], [number for step in steps[3:] for number in step]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_the_draft_vocabulary_has_the_most_frequent_tokens() -> None:
    answered = [Answered((1,), (9, 9, 8)), Answered((1,), (9, 7, 7))]
    assert frequent_tokens(answered, 2) == [7, 9]
    assert frequent_tokens(answered, 5) == [0, 1, 7, 8, 9]
