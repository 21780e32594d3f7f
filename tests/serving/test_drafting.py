"""Rounds of drafts and verification give the engine's own answer, whatever is drafted."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from model_repo.ensemble.drafting import Rounds
from model_repo.ensemble.question import parse
from model_repo.ensemble.words import pack, unpack
from model_repo.llm.wire import BadRequestError

END = 0
PROMPT = [7, 8, 9]


class Script:
    """A model that continues `PROMPT` with `said`, and after it with the end token; it verifies drafts."""

    def __init__(self, said: list[int], wrong: Callable[[int], bool] = lambda _: False) -> None:
        self.said = said
        self.wrong = wrong
        self.seen: list[Mapping[str, Any]] = []

    def token(self, place: int) -> int:
        token = self.said[place] if place < len(self.said) else END
        return token + 100 if self.wrong(place) else token

    def __call__(self, inputs: Mapping[str, Any], outputs: tuple[str, ...]) -> dict[str, Any]:
        self.seen.append(dict(inputs))
        ids, stops = inputs["input_ids"].reshape(-1).tolist(), unpack(inputs, "stop_words_list")
        assert ids[: len(PROMPT)] == PROMPT
        assert int(inputs["input_lengths"].item()) == len(ids)
        drafted = inputs.get("draft_input_ids", np.zeros((1, 0), np.int32)).reshape(-1).tolist()
        least = int(inputs["min_tokens"].item()) if "min_tokens" in inputs else 0
        made: list[int] = []
        while len(made) < int(inputs["request_output_len"].item()):
            token = self.token(len(ids) - len(PROMPT) + len(made))
            if token == END and len(made) >= least:
                break
            made.append(55 if token == END else token)
            if drafted and (len(made) > len(drafted) or drafted[len(made) - 1] != made[-1]):
                break  # its own token, after as many of the draft's as are its own too
            if any(tuple(made[-len(word) :]) == word for word in stops):
                break  # found among the tokens of this request alone
        found = {
            "output_ids": np.array([[made]], np.int32).reshape(1, 1, -1),
            "sequence_length": np.array([[len(made)]], np.int32),
            "output_log_probs": np.full((1, 1, len(made)), -0.5, np.float32),
            "cum_log_probs": np.array([[-0.5 * len(made)]], np.float32),
            "num_input_tokens": np.array([[len(ids)]], np.int32),
            "num_output_tokens": np.array([[len(made)]], np.int32),
            "total_draft_tokens": np.array([[len(drafted)]], np.int32),
            "total_accepted_draft_tokens": np.array([[max(len(made) - 1, 0)]], np.int32),
            "acceptance_rate": np.array([[0.0]], np.float32),
            "generation_logits": np.arange(len(made) * 4, dtype=np.float32).reshape(1, 1, -1, 4),
        }
        return {name: found[name] for name in outputs if name in found}


OUTPUTS = ("output_ids", "sequence_length")


def rounds(target: Script, draft: Script, *, room: int, count: int = 4, **more: Any) -> Rounds:
    inputs = {
        "input_ids": np.array([PROMPT], np.int32),
        "input_lengths": np.array([[3]], np.int32),
        "request_output_len": np.array([[room]], np.int32),
    } | more.pop("inputs", {})
    return Rounds(target, draft, inputs, more.pop("outputs", OUTPUTS), count, **more)


def answer(made: Rounds) -> list[int]:
    return [token for found in made.run() for token in found["output_ids"].reshape(-1).tolist()]


def test_the_answer_is_the_engine_s_whatever_is_drafted() -> None:
    chance = random.Random(0)
    for count, length, room in itertools.product((1, 2, 5, 9), (0, 1, 6, 13), (1, 2, 7, 20)):
        said = [chance.randrange(1, 50) for _ in range(length)]
        bad = {place for place in range(40) if chance.random() < 0.4}
        target, draft = Script(said), Script(said, bad.__contains__)
        assert answer(rounds(target, draft, room=room, count=count)) == said[:room], (count, length, room)


def test_good_drafts_save_requests_to_the_engine() -> None:
    said = list(range(1, 31))
    target, draft = Script(said), Script(said)
    assert answer(rounds(target, draft, room=30, count=4)) == said
    assert len(target.seen) == 6, "four drafted tokens and one of its own each time"
    assert target.seen[1]["draft_input_ids"].tolist() == [[6, 7, 8, 9]]
    assert draft.seen[1]["request_output_len"].item() == draft.seen[1]["min_tokens"].item() == 4
    assert draft.seen[-1]["input_ids"].size == len(PROMPT) + 25
    assert not {"draft_input_ids", "draft_logits"} & set(draft.seen[0])


def test_nobody_drafts_more_than_there_is_room_for() -> None:
    said = list(range(1, 31))
    target, draft = Script(said), Script(said)
    assert answer(rounds(target, draft, room=7, count=5)) == said[:7]
    assert [one["request_output_len"].item() for one in draft.seen] == [5]
    assert [one["request_output_len"].item() for one in target.seen] == [6, 1]


def test_an_end_token_inside_a_draft_ends_the_answer_at_once() -> None:
    said = [3, 4, 5]
    target, draft = Script(said), Script(said)
    assert answer(rounds(target, draft, room=50, count=8)) == said
    assert len(target.seen) == 1


def test_the_least_number_of_tokens_counts_over_all_rounds() -> None:
    target, draft = Script([3, 4, 5]), Script([3, 4, 5])
    made = rounds(target, draft, room=9, count=2, inputs={"min_tokens": np.array([[5]], np.int32)})
    assert answer(made) == [3, 4, 5, 55, 55]
    assert [one["min_tokens"].item() for one in target.seen] == [5, 2]


def test_each_round_draws_from_another_seed() -> None:
    target, draft = Script(list(range(1, 10))), Script([])
    answer(rounds(target, draft, room=4, count=2, inputs={"seed": np.array([[2**64 - 1]], np.uint64)}))
    assert [one["seed"].item() for one in target.seen][:3] == [2**64 - 1, 0, 1]
    assert draft.seen[0]["seed"].dtype == np.uint64


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_a_stop_word_that_two_rounds_share_ends_the_answer(count: int) -> None:
    said = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    target, draft = Script(said), Script(said)
    stops = pack([[5, 6, 7], [2, 9]])
    assert answer(rounds(target, draft, room=10, count=count, inputs={"stop_words_list": stops})) == said[:7]


def test_numbers_are_those_of_the_whole_answer() -> None:
    said = list(range(1, 12))
    target, draft = Script(said), Script(said, lambda place: place == 2)
    outputs = (*OUTPUTS, "output_log_probs", "cum_log_probs", "num_input_tokens", "num_output_tokens",
               "total_draft_tokens", "total_accepted_draft_tokens", "acceptance_rate")  # fmt: skip
    stops = pack([[9]])
    inputs = {"stop_words_list": stops, "return_log_probs": np.array([[True]])}
    found = list(rounds(target, draft, room=11, count=4, outputs=outputs, inputs=inputs).run())
    assert sum(one["num_output_tokens"].item() for one in found) == 9
    assert sum(one["output_log_probs"].size for one in found) == 9
    assert found[-1]["cum_log_probs"].item() == pytest.approx(-4.5)
    assert found[-1]["num_input_tokens"].item() == 3
    drafted = found[-1]["total_draft_tokens"].item()
    assert found[-1]["acceptance_rate"].item() == pytest.approx(
        found[-1]["total_accepted_draft_tokens"].item() / drafted
    )
    assert drafted > 4
    assert "return_log_probs" not in draft.seen[0]


def test_the_engine_gets_the_draft_s_logits_where_they_are_wanted() -> None:
    said = list(range(1, 10))
    target, draft = Script(said), Script(said)
    answer(rounds(target, draft, room=9, count=3, use_draft_logits=True))
    assert draft.seen[0]["return_generation_logits"].tolist() == [[True]]
    assert target.seen[0]["draft_logits"].shape == (1, 3, 4)
    assert target.seen[0]["draft_logits"].dtype == np.float32
    assert "draft_logits" not in target.seen[-1] or target.seen[-1]["draft_input_ids"].size


def test_nothing_is_asked_once_nobody_wants_the_answer() -> None:
    said = list(range(1, 30))
    target, draft = Script(said), Script(said)
    answer(rounds(target, draft, room=29, count=2, wanted=lambda: len(target.seen) < 2))
    assert len(target.seen) == 2


def test_a_draft_model_that_proposes_nothing_costs_only_speed() -> None:
    said = [1, 2, 3]
    target = Script(said)

    def silent(inputs: Mapping[str, Any], outputs: tuple[str, ...]) -> dict[str, Any]:
        return {}

    made = Rounds(target, silent, rounds(target, target, room=9).inputs, OUTPUTS, 4)
    assert answer(made) == said
    assert [one["request_output_len"].item() for one in target.seen] == [1, 1, 1, 1]


def asked(**inputs: Any) -> dict[str, Any]:
    return {"text_input": np.array([["a"]], dtype=object)} | {
        name: np.array([[value]]) if not isinstance(value, np.ndarray) else value for name, value in inputs.items()
    }


def test_requests_are_drafted_unless_they_say_otherwise() -> None:
    assert parse(asked(), streaming=True, draft_tokens=5).draft_tokens == 5
    assert parse(asked(num_draft_tokens=2), streaming=True, draft_tokens=5).draft_tokens == 2
    assert parse(asked(num_draft_tokens=0), streaming=True, draft_tokens=5).draft_tokens == 0
    assert parse(asked(beam_width=1, return_context_logits=False), streaming=True, draft_tokens=5).draft_tokens == 5
    empty = np.array([[b""]], dtype=object)
    assert parse(asked(guided_decoding_guide=empty), streaming=True, draft_tokens=5).draft_tokens == 5
    assert parse(asked(), streaming=True).draft_tokens == 0


@pytest.mark.parametrize(
    "against",
    [
        {"beam_width": 2},
        {"return_generation_logits": True},
        {"lora_task_id": np.array([[0]], np.uint64)},
        {"guided_decoding_guide_type": np.array([[b"json"]], dtype=object)},
    ],
)
def test_what_does_not_go_with_drafts_is_answered_without_them_or_refused(against: dict[str, Any]) -> None:
    assert parse(asked(**against), streaming=True, draft_tokens=5).draft_tokens == 0
    name = next(iter(against))
    with pytest.raises(BadRequestError, match=f"{name}: does not go together with drafts"):
        parse(asked(num_draft_tokens=3, **against), streaming=True, draft_tokens=5)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"num_draft_tokens": 6}, "num_draft_tokens: 6 is out of range; ask for 0 to 5"),
        ({"num_draft_tokens": -1}, "num_draft_tokens: -1 is out of range"),
        ({"num_draft_tokens": 0, "use_draft_logits": True}, "use_draft_logits: nothing is drafted for this request"),
    ],
)
def test_bad_wishes(inputs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadRequestError, match=sentence):
        parse(asked(**inputs), streaming=True, draft_tokens=5)


GUIDE = {"guided_decoding_guide_type": b"json_schema", "guided_decoding_guide": b"{}"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, None),
        ({"guided_decoding_guide_type": b"json", "guided_decoding_guide": b""}, None),
        ({"guided_decoding_guide_type": b"", "guided_decoding_guide": b""}, None),
        (
            {"guided_decoding_guide_type": b"schema"},
            "guided_decoding_guide_type: 'schema' is unknown; send one of json",
        ),
        ({"guided_decoding_guide_type": b""}, "guided_decoding_guide: comes without a type"),
        ({"guided_decoding_guide": b""}, "guided_decoding_guide: json_schema needs one"),
    ],
)
def test_a_guide_that_the_engine_would_pass_over_is_refused(changes: dict[str, bytes], sentence: str | None) -> None:
    inputs = asked(**{name: np.array([[value]], dtype=object) for name, value in (GUIDE | changes).items()})
    if sentence is None:
        assert parse(inputs, streaming=True).to_engine
        return
    with pytest.raises(BadRequestError, match=sentence):
        parse(inputs, streaming=True)
