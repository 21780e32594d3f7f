"""The measurement itself: what is counted, in which order it runs, and which prompts it takes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from trtbuild.errors import RecipeError, ToolError
from trtbuild.runtime import EngineConfig, KvCacheConfig, SpeculativeConfig
from trtbuild.speculate.bench import Bench, Run
from trtbuild.speculate.measure import measure_batch
from trtbuild.speculate.prompts import read_prompts, refuse_file
from trtbuild.speculate.run import run

PROMPTS = [tuple([*range(10 + 7 * start, 18 + 7 * start)] * 3) for start in range(4)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bench(tiny_llama: Path) -> Iterator[Bench]:
    """N-grams with two lengths, and the model as its own draft, which foresees every token."""
    cache = KvCacheConfig(max_tokens=2048, enable_block_reuse=False)
    config = EngineConfig(max_batch_size=4, max_seq_len=256, device="cpu", compute_dtype="float64", kv_cache=cache)
    own = str(tiny_llama)
    sections = [SpeculativeConfig("ngram", max_draft_len=length) for length in (2, 5)]
    sections += [SpeculativeConfig("draft_target", max_draft_len=length, draft=own) for length in (1, 3)]
    with Bench(tiny_llama, config, sections) as made:
        yield made


@pytest.mark.parametrize("batch", [1, 4])
def test_answers_are_those_without_drafts_and_every_token_is_accounted_for(bench: Bench, batch: int) -> None:
    plain = bench.run(None, PROMPTS, batch=batch, tokens=24)
    assert (plain.counts.turns, len(plain.answers)) == (0, 4)
    for index in range(4):
        run = bench.run(index, PROMPTS, batch=batch, tokens=24)
        assert run.answers == plain.answers
        counts, behind_first = run.counts, run.tokens - len(run.answers)
        # A turn brings one token more than it accepts; the last turn of an answer may end in an accepted one.
        assert 0 <= counts.turns + counts.accepted - behind_first <= len(run.answers)
        assert counts.drafted <= counts.drafts * bench.sections[index].max_draft_len
        assert counts.drafts <= counts.turns


def test_a_draft_that_is_the_model_is_accepted_and_longer_drafts_take_fewer_turns(bench: Bench) -> None:
    one, three = (bench.run(index, PROMPTS, batch=4, tokens=24).counts for index in (2, 3))
    assert (one.accepted, three.accepted) == (one.drafted, three.drafted)
    assert three.turns < one.turns


def test_no_run_remembers_the_answers_of_the_one_before(bench: Bench) -> None:
    fresh = [tuple(range(90 + 31 * start, 100 + 31 * start)) for start in range(4)]
    first = bench.run(1, fresh, batch=1, tokens=24).counts
    assert bench.run(1, fresh, batch=1, tokens=24).counts == first


def test_the_step_that_reads_a_prompt_is_no_turn(bench: Bench) -> None:
    assert bench.run(0, PROMPTS, batch=4, tokens=1).counts.turns == 0


class FakeRuns:
    """Answers at chosen speeds: without drafts 10 tokens a second, with candidate n what `speeds` says."""

    def __init__(self, speeds: Sequence[float]) -> None:
        self.speeds, self.order = speeds, []  # type: ignore[var-annotated]

    def run(self, index: int | None, prompts: Sequence[tuple[int, ...]], *, batch: int, tokens: int) -> Run:
        """One answer of ten tokens for each prompt."""
        self.order.append(index)
        speed = 10.0 if index is None else self.speeds[index]
        return Run(tuple((1,) * 10 for _ in prompts), 10 * len(prompts) / speed)


def test_the_fastest_run_again_and_each_stands_between_runs_without_drafts() -> None:
    fake = FakeRuns([9.0, 20.0, 8.0, 15.0, 7.0, 6.0])
    found = measure_batch(fake, PROMPTS, 1, range(6), seconds=3600, on_run=lambda _: None, rounds=3)
    assert {index: len(row.runs) for index, row in found.rows.items()} == {0: 3, 1: 3, 2: 3, 3: 3, 4: 1, 5: 1}
    assert found.rows[1].to_json()["speed_up"] == pytest.approx(2.0)
    assert found.noise == 0
    order = fake.order[2:]  # the first two warm up
    assert order[:9] == [None, 0, 1, 2, None, 3, 4, 5, None]
    assert order[9:15] == [None, 1, 3, 0, None, 2]


def test_a_time_that_is_over_leaves_candidates_out_and_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr("trtbuild.speculate.measure.monotonic", lambda: next(clock))
    found = measure_batch(FakeRuns([9.0] * 6), PROMPTS, 1, range(6), seconds=35, on_run=lambda _: None, rounds=3)
    assert (sorted(found.rows), found.missed) == ([0, 1, 2], 3)


def test_a_length_without_room_for_an_answer_is_the_recipe_s_fault(tiny_llama: Path) -> None:
    request = {"limit_s": 60, "model": str(tiny_llama), "engine": {"trust_remote_code": False, "max_seq_len": 64}}
    with pytest.raises(RecipeError, match=r"runtime\.max_seq_len: 64 leaves no room for answers of 64 tokens"):
        run(request, lambda *_: None)


def test_a_drafter_that_fails_ends_the_measurement(tiny_llama: Path) -> None:
    class Broken:
        def propose(self, _: Any) -> Any:
            raise RuntimeError("no")

        def release(self) -> None:
            pass

    config = EngineConfig(device="cpu", kv_cache=KvCacheConfig(max_tokens=512, enable_block_reuse=False))
    with Bench(tiny_llama, config, [SpeculativeConfig("ngram")]) as made:
        made._drafter = lambda _: Broken()  # type: ignore[assignment, method-assign, return-value]
        with pytest.raises(ToolError, match="drafting with ngram has failed"):
            made.run(0, PROMPTS[:1], batch=1, tokens=8)


class Words:
    """A tokenizer of words, with a chat template of one word for each message."""

    chat_template = "yes"

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """A number for each word."""
        return {"input_ids": [len(word) for word in text.split()]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        """The contents, and the generation prompt."""
        return " ".join(message["content"] for message in messages) + " assistant"


def test_prompts_are_lines_rows_or_conversations_up_to_the_answer(tmp_path: Path) -> None:
    lines = tmp_path / "a.txt"
    lines.write_text("a bb\n\nccc\na bb\ndddd e f\n", encoding="utf-8")
    found = read_prompts(lines, Words(), count=9, longest=2)
    assert (found.ids, found.too_long) == (((1, 2), (3,)), 1)
    assert read_prompts(lines, Words(), count=1, longest=9).ids == ((1, 2),)
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "left out"}]
    rows = tmp_path / "b.jsonl"
    rows.write_text(json.dumps({"messages": chat}) + "\n", encoding="utf-8")
    assert read_prompts(rows, Words(), count=9, longest=9).ids == ((5, 9),)


def test_prompts_that_cannot_be_used(tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(RecipeError) as caught:
            refuse_file(path)
        return str(caught.value)

    empty, blank, only = (tmp_path / name for name in ("empty.txt", "blank.txt", "answers.jsonl"))
    empty.write_text("")
    blank.write_text("\n \n")
    only.write_text('{"messages": [{"role": "assistant", "content": "x"}]}\n')
    assert refusal(empty) == f"--prompts: {empty} is empty; give a file with prompts like those that will be served"
    assert "blank.txt holds no prompt" in refusal(blank)
    assert "answers.jsonl holds no prompt" in refusal(only)
    assert "does not exist" in refusal(tmp_path / "no.txt")
    other = tmp_path / "a.csv"
    other.write_text("a")
    assert "ends in .csv" in refusal(other)
    blank.write_text("a b c\n")
    with pytest.raises(RecipeError, match="all 1 prompts of .* are longer than 2 tokens, which leave no room"):
        read_prompts(blank, Words(), count=9, longest=2)
