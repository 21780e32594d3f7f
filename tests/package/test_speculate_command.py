"""``trtbuild speculate`` as a user types it: on a tiny model, for other runtimes, and with what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from core.test_model import edit_config
from drafts import save_medusa
from tiny import save_checkpoint
from trtbuild.cli import main
from trtbuild.errors import CompatibilityError
from trtbuild.recipe_file import load_recipe
from trtbuild.speculation_advice import Advice, Candidate, Measured, advise
from trtbuild.speculation_candidates import LENGTHS, batches, find_possible
from trtbuild.speculation_study import Asked, write_advice

SECONDS = {"speed_up", "speed_ups", "tokens_per_second"}


def speculate(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["speculate", *map(str, arguments)])


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    long = "word " * 200
    path.write_text(
        f"a stream of tokens, a stream of tokens, a stream\n{long}\none two one two one\n", encoding="utf-8"
    )
    return path


@pytest.fixture
def own(tmp_path: Path, recipe: Path) -> Path:
    """The shared recipe at a place of its own: its store has the compressed model."""
    return Path(shutil.copy(recipe, tmp_path / "own.yaml"))


def advice(*speed_ups: float) -> Advice:
    section = {"method": "ngram", "max_matching_ngram_size": 2}
    rows = [
        Measured(Candidate(section, 3), batch, value, (value,) * 2)
        for batch, value in zip((1, 4), speed_ups, strict=True)
    ]
    return advise(rows, {1: 0.0, 4: 0.0})


def test_a_study_of_the_embedded_engine(own: Path, prompts: Path) -> None:
    before = own.read_text(encoding="utf-8")
    done = speculate(own, "--prompts", prompts, "--set", "runtime.max_batch_size=1", "--time-limit", 4, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["runtime"] == "embedded"
    assert found["prompts"] == {
        "used": 2,
        "too_long": 1,
        "most_tokens": found["prompts"]["most_tokens"],
        "longest_taken": 192,
    }
    assert any(note.startswith("1 prompts of more than 192 tokens were passed over") for note in found["notes"])
    assert "4, 16, 64 requests at once are beyond runtime.max_batch_size 1" in found["notes"]
    (plain,) = found["without_drafts"]
    assert (plain["batch"], plain["missed"] + len(found["rows"])) == (1, 2 * len(LENGTHS))
    for row in found["rows"]:
        assert (row["method"], row["batch"], row["same_answers"]) == ("ngram", 1, 1.0)
        assert row["max_draft_len"] in LENGTHS
        assert row["tokens_per_step"] >= 1
        assert row["accepted"] <= row["drafted"]
        assert len(row["speed_ups"]) in (1, 2, 3)
    assert {"section", "lengths", "speed_ups", "thresholds", "off_from", "sentence"} == set(found["advice"])
    assert Path(found["picture"]).read_text(encoding="utf-8").startswith("<svg ")
    assert Path(found["picture"]) == own.with_name("own-speculation.svg")
    assert own.read_text(encoding="utf-8") == before


def test_of_another_runtime_only_what_carries_over(own: Path, prompts: Path, tmp_path: Path) -> None:
    asked = [own, "--prompts", prompts, "--set", "runtime.kind=trtllm", "--count", 1, "-o", tmp_path / "p.svg"]
    refused = speculate(*asked, "--write")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "--write: the best setting is a matter of seconds, and those of trtllm cannot be measured" in refused.stderr
    done = speculate(*asked, "--json", "--time-limit", 60)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["advice"], found["without_drafts"]) == (None, [])
    assert len(found["rows"]) == 2 * len(LENGTHS)
    assert not any(SECONDS & set(row) for row in found["rows"])
    assert any("hold for greedy answers of trtllm too; seconds do not" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--prompts", "missing.txt"), "--prompts: missing.txt does not exist"),
        (("--draft", "missing"), "--draft: missing is no directory; name a checkpoint directory"),
        (("-o", "no/where/p.svg"), "-o: no/where is no directory; make it first, or name another file"),
        (("--set", "runtime.max_batch_size=0"), "runtime.max_batch_size: "),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_built(
    own: Path, prompts: Path, options: tuple[str, str], sentence: str
) -> None:
    done = speculate(own, "--prompts", prompts, *options)
    assert (done.exit_code, done.stdout) == (2, "")
    assert sentence in done.stderr
    assert "compress" not in done.stderr
    assert not own.with_name("own-speculation.svg").exists()


def test_a_draft_is_a_candidate_where_it_fits_and_else_named_with_the_reason(own: Path, tmp_path: Path) -> None:
    small = save_checkpoint(tmp_path / "small", overrides={"num_hidden_layers": 1, "intermediate_size": 64})
    loaded = load_recipe(own)
    fits = find_possible(loaded, small)
    ours = [section for section in fits.sections if section["method"] == "draft_target"]
    assert [section["max_draft_len"] for section in ours] == list(LENGTHS)
    assert {section["draft"] for section in ours} == {str(small)}
    edit_config(small, max_position_embeddings=64)
    short = find_possible(loaded, small)
    assert "draft_target" not in {candidate.method for candidate in short.candidates}
    assert any("draft_target is not possible: " in text and "knows 64 positions" in text for text in short.refused)


def test_heads_are_found_out_and_draft_no_more_tokens_than_there_are_of_them(own: Path, tmp_path: Path) -> None:
    found = find_possible(load_recipe(own), save_medusa(tmp_path / "heads", heads=2))
    assert {candidate.method for candidate in found.candidates} == {"ngram", "medusa"}
    assert [one.length for one in found.candidates if one.method == "medusa"] == [1, 2]
    assert found.refused == ()


def test_methods_that_the_recipe_s_runtime_lacks_are_no_candidates(own: Path) -> None:
    engine = ["runtime.kind=trtllm-engine", "target.gpu=H100", "serving={max_input_tokens: 200}"]
    with pytest.raises(CompatibilityError, match="no method of speculation is possible for this recipe:\nngram is not"):
        find_possible(load_recipe(own, engine))


def test_batches_end_at_the_recipe_s_limit() -> None:
    assert batches(64) == ([1, 4, 16, 64], None)
    assert batches(20) == ([1, 4, 16], "64 requests at once are beyond runtime.max_batch_size 20")


def test_the_advice_is_written_and_plans(own: Path, prompts: Path) -> None:
    before = own.read_text(encoding="utf-8")
    asked = Asked(recipe=own, prompts=prompts, write=True)
    said = write_advice(load_recipe(own), asked, advice(1.5, 0.9))
    assert said == f"{own}: speculative is written"
    text = own.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line in before.splitlines()] == before.splitlines()
    assert load_recipe(own).recipe.speculative.draft_len_schedule == {1: 3, 4: 0}
    off = write_advice(load_recipe(own), asked, advice(0.9, 0.9))
    assert off.endswith("removed: speculative.draft_len_schedule, speculative.max_draft_len, "
                        "speculative.max_matching_ngram_size")  # fmt: skip
    assert load_recipe(own).recipe.speculative.method == "none"
    now = own.read_text(encoding="utf-8")
    assert write_advice(load_recipe(own), asked, advice(0.9, 0.9)) == f"{own} is left as it is: it drafts nothing"
    assert own.read_text(encoding="utf-8") == now


def test_a_section_that_would_not_plan_is_not_written(own: Path, prompts: Path) -> None:
    before = own.read_text(encoding="utf-8")
    narrow = ["runtime.max_num_tokens=4"]  # a step has no room for three drafted tokens and one more
    with pytest.raises(CompatibilityError, match=r"max_draft_len: 5: .*longer than a step"):
        write_advice(
            load_recipe(own, narrow), Asked(recipe=own, prompts=prompts, overrides=narrow), _longer(advice(1.5, 1.5))
        )
    assert own.read_text(encoding="utf-8") == before


def _longer(found: Advice) -> Advice:
    section = dict(found.section or {}) | {"max_draft_len": 5}
    return Advice(section, found.lengths, found.speed_ups, found.thresholds, found.off_from, found.sentence)
