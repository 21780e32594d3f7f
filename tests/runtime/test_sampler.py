"""Choosing tokens: penalties and filters against plain references, and the distribution of what is drawn."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch

from trtbuild.errors import RequestError, ToolError
from trtbuild.runtime import SamplingParams
from trtbuild.runtime.sampler import _invert, choose, token_logprobs
from trtbuild.runtime.sequence import Sequence

V = 50
DRAWS = 20_000
# Upper 1e-6 point of chi-square, by degrees of freedom (Wilson-Hilferty); the seeds are fixed, so it never flickers.
Z = 4.753


def sequence(prompt: list[int] | None = None, output: list[int] | None = None, **params: Any) -> Sequence:
    prompt = prompt or [0]
    made = Sequence(
        request_id=0, prompt_len=len(prompt), token_ids=list(prompt), params=SamplingParams(**params),
        end_ids=frozenset({2}), stop_ids=frozenset(params.get("stop_token_ids", ())),
        rng=random.Random(params.get("seed", 0)),
    )  # fmt: skip
    made.seen_ids.update(dict.fromkeys(prompt))
    for token in output or []:
        made.append(token)
    return made


def random_logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 2


def reference_probs(logits: torch.Tensor, params: SamplingParams) -> list[float]:
    """The distribution by the definitions, one token after the other, in plain Python floats."""
    scaled = (logits.double() / (params.temperature or 1.0)).tolist()
    weights = [2.718281828459045**value for value in scaled]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    if params.top_k:
        order = order[: params.top_k]
    mass = sum(weights[token] for token in order)
    kept, before = [], 0.0
    for token in order:
        share = weights[token] / mass
        if kept and params.top_p is not None and before >= params.top_p:
            break
        if kept and params.min_p is not None and weights[token] < params.min_p * weights[order[0]]:
            break
        kept.append(token)
        before += share
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(weights))]


def draw(logits: torch.Tensor, params: dict[str, Any], count: int) -> Counter[int]:
    """`count` draws for one row of logits, in batches of rows with seeds of their own."""
    found: Counter[int] = Counter()
    rows = 500
    sequences = [sequence(seed=seed, **params) for seed in range(rows)]
    batch = logits.expand(rows, -1)
    for _ in range(count // rows):
        found.update(choice.token_id for choice in choose(batch, sequences))
    return found


def chi_square_excess(found: Counter[int], probs: list[float], total: int) -> float:
    """How far chi-square lies above its 1e-6 point; negative is good. Rare tokens are counted together."""
    cells: list[tuple[float, int]] = []
    rare_expected, rare_found = 0.0, 0
    for token, prob in enumerate(probs):
        if prob == 0:
            assert found[token] == 0, f"token {token} has probability 0 and was drawn"
        elif prob * total < 10:
            rare_expected, rare_found = rare_expected + prob * total, rare_found + found[token]
        else:
            cells.append((prob * total, found[token]))
    if rare_expected >= 10:
        cells.append((rare_expected, rare_found))
    statistic = sum((seen - expected) ** 2 / expected for expected, seen in cells)
    free = max(1, len(cells) - 1)
    limit = free * (1 - 2 / (9 * free) + Z * (2 / (9 * free)) ** 0.5) ** 3
    return statistic - limit


CASES: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.7},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.95, "min_p": 0.05},
    {"top_p": 1.0, "top_k": 0},
]


@pytest.mark.parametrize("params", CASES, ids=str)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    logits = random_logits(seed=1)
    probs = reference_probs(logits[0], SamplingParams(**params))
    assert chi_square_excess(draw(logits, params, DRAWS), probs, DRAWS) < 0


def test_the_distribution_test_notices_a_wrong_temperature() -> None:
    logits = random_logits(seed=1)
    probs = reference_probs(logits[0], SamplingParams(temperature=1.0))
    assert chi_square_excess(draw(logits, {"temperature": 0.9}, DRAWS), probs, DRAWS) > 0


@pytest.mark.parametrize("params", [{"top_p": 0.995}, {"min_p": 1e-4}, {"top_p": 0.3}], ids=str)
def test_filters_look_beyond_the_first_candidates(params: dict[str, Any]) -> None:
    """With a flat distribution over 1,200 tokens the kept ones are far more than are sorted first."""
    logits = torch.randn(1, 1200, generator=torch.Generator().manual_seed(3)) * 0.1
    probs = reference_probs(logits[0], SamplingParams(**params))
    kept = {token for token, prob in enumerate(probs) if prob > 0}
    found = draw(logits, params, 5_000)
    assert set(found) <= kept
    assert len(found) > 0.9 * len(kept)
    assert len(kept) > 300


def test_a_seed_gives_the_same_tokens_in_any_batch() -> None:
    logits = random_logits(6, seed=4)
    mixed: list[dict[str, Any]] = [
        {"temperature": 0.8, "seed": 5}, {"top_k": 3, "seed": 6}, {"top_p": 0.9, "seed": 7}, {},
        {"min_p": 0.2, "seed": 8}, {"top_k": 40, "top_p": 0.5, "seed": 9},
    ]  # fmt: skip
    together = [
        [choice.token_id for choice in choose(logits, both)] for both in [[sequence(**one) for one in mixed]] * 5
    ]
    for row, params in enumerate(mixed):
        one = sequence(**params)
        alone = [choose(logits[row : row + 1], [one])[0].token_id for _ in range(5)]
        assert alone == [tokens[row] for tokens in together]


def test_different_seeds_give_different_tokens() -> None:
    logits = torch.zeros(1, V)
    assert len({choose(logits, [sequence(temperature=1.0, seed=seed)])[0].token_id for seed in range(40)}) > 10


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"temperature": 1e-6}], ids=str
)
def test_greedy_takes_the_likeliest(params: dict[str, Any]) -> None:
    logits = random_logits(8)
    chosen = [choice.token_id for choice in choose(logits, [sequence(**params) for _ in range(8)])]
    assert chosen == logits.argmax(dim=-1).tolist()


def reference_penalties(logits: list[float], made: Sequence) -> list[float]:
    """The penalties by their definitions, token by token."""
    params, result = made.params, list(logits)
    prompt, output = made.token_ids[: made.prompt_len], made.token_ids[made.prompt_len :]
    for token in range(len(result)):
        if token in prompt or token in output:
            result[token] *= params.repetition_penalty if result[token] < 0 else 1 / params.repetition_penalty
        if token in output:
            result[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    return result


def test_penalties_equal_the_definitions() -> None:
    """Seen through the log-probabilities that greedy choices over thousands of random cases imply."""
    numbers = random.Random(0)
    for case in range(300):
        logits = random_logits(1, seed=case).double()
        made = sequence(
            [numbers.randrange(V) for _ in range(8)], [numbers.randrange(V) for _ in range(12)],
            repetition_penalty=numbers.choice([1.0, 1.3, 2.0, 0.7]), presence_penalty=numbers.choice([0.0, 0.6, -0.5]),
            frequency_penalty=numbers.choice([0.0, 0.9, -0.3]),
        )  # fmt: skip
        expected = reference_penalties(logits[0].tolist(), made)
        assert choose(logits, [made])[0].token_id == max(range(V), key=expected.__getitem__)


def test_each_penalty_changes_the_choice() -> None:
    logits = torch.zeros(1, V)
    logits[0, 7], logits[0, 8] = 3.0, 2.0
    assert choose(logits, [sequence([7])])[0].token_id == 7
    assert choose(logits, [sequence([7], repetition_penalty=2.0)])[0].token_id == 8
    # Presence and frequency count the output only.
    assert choose(logits, [sequence([7], presence_penalty=1.5)])[0].token_id == 7
    assert choose(logits, [sequence([1], [7], presence_penalty=1.5)])[0].token_id == 8
    assert choose(logits, [sequence([1], [7], frequency_penalty=0.6)])[0].token_id == 7
    assert choose(logits, [sequence([1], [7, 7], frequency_penalty=0.6)])[0].token_id == 8


def test_bad_words() -> None:
    logits = torch.zeros(1, V)
    logits[0, 7], logits[0, 8] = 3.0, 2.0
    assert choose(logits, [sequence(bad_words=[[7]])])[0].token_id == 8
    assert choose(logits, [sequence([3], bad_words=[[3, 7]])])[0].token_id == 8
    assert choose(logits, [sequence([4], bad_words=[[3, 7]])])[0].token_id == 7
    assert choose(logits, [sequence([5], [4], bad_words=[[5, 4, 7]])])[0].token_id == 8


def test_min_tokens_forbids_every_end() -> None:
    logits = torch.zeros(1, V)
    logits[0, 2], logits[0, 9], logits[0, 8] = 9.0, 8.0, 1.0
    params = {"min_tokens": 2, "stop_token_ids": (9,)}
    assert choose(logits, [sequence(output=[5], **params)])[0].token_id == 8
    assert choose(logits, [sequence(output=[5, 5], **params)])[0].token_id == 2


def test_no_allowed_token_and_broken_logits_are_errors_of_one_request() -> None:
    logits = random_logits(3)
    logits[1] = float("nan")
    everything = [[token] for token in range(V)]
    choices = choose(logits, [sequence(bad_words=everything), sequence(), sequence()])
    assert isinstance(choices[0].error, RequestError)
    assert str(choices[0].error) == (
        "bad_words and min_tokens forbid every token of the vocabulary; allow at least one token to come next"
    )
    assert isinstance(choices[1].error, ToolError)
    assert choices[2].error is None


def test_logprobs_are_those_of_the_model_before_penalties_and_temperature() -> None:
    logits = random_logits(2, seed=9)
    sequences = [sequence([7], temperature=0.3, repetition_penalty=3.0, logprobs=4), sequence(logprobs=0)]
    choices = choose(logits, sequences)
    expected = torch.log_softmax(logits.double(), dim=-1)
    for row, choice in enumerate(choices):
        assert choice.logprob is not None
        assert choice.logprob.token_id == choice.token_id
        assert choice.logprob.logprob == pytest.approx(float(expected[row, choice.token_id]), abs=1e-12)
        assert choice.logprob.rank == 1 + int((expected[row] > expected[row, choice.token_id]).sum())
    top = choices[0].logprob.top
    best = expected[0].topk(4)
    assert [token for token, _ in top] == best.indices.tolist()
    assert [value for _, value in top] == pytest.approx(best.values.tolist(), abs=1e-12)
    assert choices[1].logprob.top == ()


def test_token_logprobs_of_many_rows() -> None:
    logits = random_logits(5, seed=2)
    found = token_logprobs(logits, [1, 2, 3, 4, 5], 1)
    expected = torch.log_softmax(logits.double(), dim=-1)
    assert [one.logprob for one in found] == pytest.approx([float(expected[i, i + 1]) for i in range(5)], abs=1e-12)


def test_the_ends_of_the_range_of_draws_never_reach_a_token_without_weight() -> None:
    weights = torch.tensor([[0.0, 1.0, 1.0, 0.0]], dtype=torch.float64).expand(4, -1)
    draws = torch.tensor([[0.0], [0.4999], [0.5], [1.0]], dtype=torch.float64)
    assert _invert(weights, draws, None) == [1, 1, 2, 2]
    assert _invert(weights, draws, torch.tensor([[9, 8, 7, 6]]).expand(4, -1)) == [8, 8, 7, 7]
