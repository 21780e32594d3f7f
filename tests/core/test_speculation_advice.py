"""Which setting of speculation is advised for which measurements, and how it comes into a recipe's text."""

from __future__ import annotations

import pytest

from trtbuild.recipe_edit import with_section
from trtbuild.speculation_advice import Candidate, Measured, advise
from trtbuild.speculation_picture import draw
from trtbuild.yaml_text import parse_yaml

NGRAM: dict[str, object] = {"method": "ngram", "max_matching_ngram_size": 2}
DRAFT: dict[str, object] = {"method": "draft_target", "draft": "/small"}
QUIET = {1: 0.01, 4: 0.01, 16: 0.01}


def rows(section: dict[str, object], *speed_ups: tuple[int, int, float]) -> list[Measured]:
    """(batch, length, speed-up) of one family, each over three runs that agree."""
    return [Measured(Candidate(section, length), batch, value, (value,) * 3) for batch, length, value in speed_ups]


def test_the_best_length_of_each_batch_becomes_a_schedule_that_ends() -> None:
    measured = rows(
        NGRAM, (1, 3, 1.4), (1, 5, 1.8), (4, 3, 1.3), (4, 5, 1.1), (16, 1, 1.03), (16, 3, 0.9), (16, 5, 0.7)
    )
    advice = advise(measured, QUIET)
    assert advice.section == NGRAM | {"max_draft_len": 5, "draft_len_schedule": {1: 5, 4: 3, 16: 0}}
    assert (advice.lengths, advice.off_from) == ({1: 5, 4: 3, 16: 0}, 16)
    assert (
        "1.80x with 5 tokens at 1 request, 1.30x with 3 tokens at 4 requests; off from 16 requests on"
        in advice.sentence
    )
    assert advice.to_json()["section"]["draft_len_schedule"] == [[1, 5], [4, 3], [16, 0]]


def test_one_length_for_all_batches_needs_no_schedule() -> None:
    advice = advise(rows(NGRAM, (1, 3, 1.4), (4, 3, 1.3), (16, 3, 1.2)), QUIET)
    assert advice.section == NGRAM | {"max_draft_len": 3}
    assert advice.off_from is None


def test_nothing_helps_is_said_plainly() -> None:
    advice = advise(rows(NGRAM, (1, 3, 1.04), (4, 3, 0.9)), {1: 0.01, 4: 0.01})
    assert (advice.section, advice.off_from, advice.lengths) == (None, 1, {1: 0, 4: 0})
    assert advice.sentence.startswith("nothing helps: ")
    assert "the nearest was ngram, 2 matched, 3 drafted, 1.04x at 1 request" in advice.sentence
    assert advise([], {}).sentence == "nothing was measured"


@pytest.mark.parametrize(
    ("speed_ups", "noise", "helps"),
    [
        ((1.06, 1.06), 0.01, True),
        ((1.06, 1.06), None, True),  # one run without drafts alone: the margin
        ((1.04, 1.04), 0.01, False),  # below the margin
        ((1.2, 1.2), 0.25, False),  # below what equal runs differ by
        ((1.6, 0.9), 0.01, False),  # not faster each time
        ((2.0,), 0.01, False),  # measured once
    ],
)
def test_a_gain_counts_above_the_noise(speed_ups: tuple[float, ...], noise: float | None, *, helps: bool) -> None:
    row = Measured(Candidate(NGRAM, 3), 1, sum(speed_ups) / len(speed_ups), speed_ups)
    assert (advise([row], {1: noise}).section is not None) == helps


def test_of_equal_lengths_the_shortest_and_of_equal_families_the_first() -> None:
    assert advise(rows(NGRAM, (1, 2, 1.49), (1, 3, 1.5), (1, 7, 1.505)), {1: 0.0}).lengths == {1: 2}
    two = [*rows(NGRAM, (1, 3, 1.49)), *rows(DRAFT, (1, 3, 1.5))]
    assert advise(two, {1: 0.0}).section == NGRAM | {"max_draft_len": 3}
    better = [*rows(NGRAM, (1, 3, 1.49)), *rows(DRAFT, (1, 3, 1.6))]
    assert advise(better, {1: 0.0}).section == DRAFT | {"max_draft_len": 3}


def test_no_larger_batch_gets_a_longer_draft_since_a_schedule_begins_with_the_longest() -> None:
    assert advise(rows(NGRAM, (1, 2, 1.5), (4, 2, 1.2), (4, 7, 1.6)), {1: 0.0, 4: 0.0}).lengths == {1: 2, 4: 2}
    assert advise(rows(NGRAM, (1, 2, 1.0), (4, 2, 1.5)), {1: 0.0, 4: 0.0}).section is None


RECIPE = """\
# our recipe
schema_version: 1

model:
  path:   /x     # aligned   by hand
compress: {format: fp8}

# how it is served
runtime:
    kind: embedded
    max_batch_size: 16
"""
ADVISED = {"method": "ngram", "max_draft_len": 5, "draft_len_schedule": {1: 5, 4: 3, 16: 0}}


def test_a_new_section_leaves_every_other_line_as_it_is() -> None:
    text = with_section(RECIPE, "speculative", ADVISED)
    added = [line for line in text.splitlines() if line not in RECIPE.splitlines()]
    assert added == [
        "speculative:", "  method: ngram", "  max_draft_len: 5", "  draft_len_schedule: {1: 5, 4: 3, 16: 0}",
    ]  # fmt: skip
    assert [line for line in text.splitlines() if line and line not in added] == [
        line for line in RECIPE.splitlines() if line
    ]
    assert list(parse_yaml(text)) == ["schema_version", "model", "compress", "speculative", "runtime"]
    assert with_section(text, "speculative", ADVISED) == text


def test_a_section_that_is_there_keeps_its_comments_and_order() -> None:
    section = (
        "\nspeculative:\n  # why we draft\n  max_draft_len: 2  # short\n  method: ngram\n  draft: /small\n\n# end\n"
    )
    text = with_section(RECIPE + section, "speculative", ADVISED)
    assert text.startswith(RECIPE)
    assert text.endswith("\n\n# end\n")
    assert parse_yaml(text)["speculative"] == ADVISED
    assert list(parse_yaml(text)["speculative"]) == ["max_draft_len", "method", "draft_len_schedule"]
    assert "  # why we draft\n" in text
    assert "# short" in text
    assert with_section(RECIPE + section, "speculative", None) == f"{RECIPE}\n\n# end\n"


def test_recipes_on_one_line_and_without_an_end_of_line() -> None:
    one = with_section("{schema_version: 1, runtime: {kind: embedded}}\n", "speculative", ADVISED)
    assert parse_yaml(one)["speculative"] == ADVISED
    last = with_section("schema_version: 1", "speculative", ADVISED)
    assert parse_yaml(last) == {"schema_version": 1, "speculative": ADVISED}
    null = with_section("speculative:\nschema_version: 1\n", "speculative", ADVISED)
    assert parse_yaml(null) == {"speculative": ADVISED, "schema_version": 1}


def test_the_picture_fills_what_is_advised() -> None:
    advice = advise(rows(NGRAM, (1, 3, 1.4), (1, 5, 1.2)), {1: 0.01})
    shown = [
        NGRAM | {"batch": 1, "max_draft_len": length, "speed_up": value, "tokens_per_step": 1.5}
        for length, value in ((3, 1.4), (5, 1.2))
    ]
    study = {
        "rows": shown, "without_drafts": [{"batch": 1}], "advice": advice.to_json(), "prompts": {"used": 3},
        "measured_on": {"compute_dtype": "float32", "device": "cpu"},
    }  # fmt: skip
    picture = draw(study)
    filled = [line for line in picture.splitlines() if "<circle" in line and 'fill="white"' not in line]
    assert len(filled) == 1
    assert "ngram, 2 matched, 3 drafted: 1.40" in filled[0]
    assert "gains count from here on: 1.050" in picture
