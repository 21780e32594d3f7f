"""Drawn drafts leave the distribution as it is; rules that do not are found out by the same test."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.conftest import engine_config
from trtbuild.runtime import Engine, SamplingParams, SpeculativeConfig
from trtbuild.runtime.drafts import verify
from trtbuild.runtime.drafts.acceptance import pick, settle

Rule = Callable[[torch.Tensor, torch.Tensor, int, Callable[[], float]], int]
SIGNIFICANCE = 1e-3
VOCABULARY = 6
PROMPT = [3, 4, 5, 3]


def p_value(counts: dict[Any, int], expected: dict[Any, float]) -> float:
    """How likely counts this far from the expected ones are: Pearson's chi-square, small cells put together."""
    total = sum(counts.values())
    cells, rest = [], [0.0, 0.0]
    for outcome, share in expected.items():
        if share * total < 5:
            rest[0] += counts.get(outcome, 0)
            rest[1] += share * total
        else:
            cells.append((counts.get(outcome, 0), share * total))
    if any(outcome not in expected for outcome in counts):
        return 0.0
    if rest[1] >= 5:
        cells.append((rest[0], rest[1]))
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def always(target: torch.Tensor, draft: torch.Tensor, token: int, draw: Callable[[], float]) -> int:
    """Every draft is right."""
    return token


def by_target(target: torch.Tensor, draft: torch.Tensor, token: int, draw: Callable[[], float]) -> int:
    """Refused tokens are drawn anew from the model's own distribution, not from the residual."""
    return token if draw() * float(draft[token]) < float(target[token]) else pick(target, draw())


def without_ratio(target: torch.Tensor, draft: torch.Tensor, token: int, draw: Callable[[], float]) -> int:
    """Taken with probability p, as if the draft were sure of its token."""
    return token if draw() < float(target[token]) else pick((target - draft).clamp(min=0), draw())


def one_number(target: torch.Tensor, draft: torch.Tensor, token: int, draw: Callable[[], float]) -> int:
    """The number that refused a token chooses the one in its place too."""
    number = draw()
    if number * float(draft[token]) < float(target[token]):
        return token
    return pick((target - draft).clamp(min=0), number)


WRONG: list[Rule] = [always, by_target, without_ratio, one_number]


def by_rule(rule: Rule, seed: int, runs: int = 6000) -> float:
    """The p-value of tokens settled by `rule`, for one pair of distributions."""
    generator = torch.Generator().manual_seed(seed)
    target, draft = torch.softmax(torch.randn(2, VOCABULARY, generator=generator, dtype=torch.float64) * 1.2, dim=-1)
    draw = random.Random(seed).random
    counts: dict[int, int] = {}
    for _ in range(runs):
        token = rule(target, draft, pick(draft, draw()), draw)
        counts[token] = counts.get(token, 0) + 1
    return p_value(counts, dict(enumerate(target.tolist())))


@pytest.mark.parametrize("seed", range(5))
def test_the_rule_keeps_the_distribution(seed: int) -> None:
    assert by_rule(settle, seed) > SIGNIFICANCE


@pytest.mark.parametrize("rule", WRONG, ids=lambda rule: rule.__name__)
def test_a_wrong_rule_is_found_out(rule: Rule) -> None:
    assert by_rule(rule, 1) < SIGNIFICANCE


def test_a_token_of_probability_zero_never_comes_and_equal_distributions_refuse_nothing() -> None:
    target, draft = torch.tensor([0.0, 0.3, 0.7]), torch.tensor([0.9, 0.1, 0.0])
    draw = random.Random(0).random
    assert {settle(target, draft, 0, draw) for _ in range(300)} == {1, 2}
    assert {settle(target, target.clone(), 2, draw) for _ in range(300)} == {2}
    assert settle(target, target, 1, lambda: 1.0) in (1, 2)  # refused by rounding alone: nothing is left over
    assert pick(target, 0.0) == 1
    assert pick(target, 1.0) == 2


@pytest.fixture(scope="module")
def drafting(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A model of six tokens with a draft of other weights."""
    small = {"vocab_size": VOCABULARY, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32,
             "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    root = tmp_path_factory.mktemp("drawn")
    for path, seed in ((root, 0), (root / "draft", 1)):
        path.mkdir(exist_ok=True)
        for file in checkpoint("llama", seed, **small).iterdir():
            (path / file.name).symlink_to(file)
    section = SpeculativeConfig("draft_target", max_draft_len=2, draft="draft")
    limits = engine_config(max_batch_size=64, max_num_tokens=512, max_tokens=4096, speculative=section)
    with Engine.load(root, config=limits) as engine:
        yield engine


def shares(engine: Engine, params: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """How likely each three tokens behind the first one are, by the model's own logits."""
    found: dict[tuple[int, ...], float] = {}
    below: dict[tuple[int, ...], torch.Tensor] = {}
    for length in range(4):
        for context in itertools.product(range(VOCABULARY), repeat=length):
            logits = engine.logits([*PROMPT, *context])[-1] / params["temperature"]
            probs = torch.softmax(logits, dim=-1)
            kept = probs.topk(params.get("top_k") or VOCABULARY).indices
            below[context] = torch.zeros_like(probs).index_copy_(0, kept, probs[kept] / probs[kept].sum())
    for four in itertools.product(range(VOCABULARY), repeat=4):
        share = 1.0
        for place, token in enumerate(four):
            share *= float(below[four[:place]][token])
        if share:
            found[four[1:]] = found.get(four[1:], 0.0) + share
    return found


def counted(engine: Engine, monkeypatch: pytest.MonkeyPatch, runs: int, **params: Any) -> dict[tuple[int, ...], int]:
    """How often each three tokens came behind the first one; requests without a seed get fixed ones here."""
    seeds = itertools.count()
    fixed = SimpleNamespace(Random=lambda seed: random.Random(next(seeds) if seed is None else seed))
    monkeypatch.setattr("trtbuild.runtime.intake.random", fixed)
    answers = engine.generate([PROMPT] * runs, SamplingParams(max_tokens=4, ignore_eos=True, **params))
    counts: dict[tuple[int, ...], int] = {}
    for answer in answers:
        counts[answer.token_ids[1:]] = counts.get(answer.token_ids[1:], 0) + 1
    return counts


@pytest.mark.parametrize("params", [{"temperature": 1.0}, {"temperature": 1.5, "top_k": 4}], ids=str)
def test_the_engine_keeps_the_distribution(
    drafting: Engine, monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]
) -> None:
    before = drafting.stats()
    counts = counted(drafting, monkeypatch, 2000, **params)
    accepted = drafting.stats().accepted_draft_tokens - before.accepted_draft_tokens
    drafted = drafting.stats().draft_tokens - before.draft_tokens
    assert 0.2 < accepted / drafted < 0.9
    assert p_value(counts, shares(drafting, params)) > SIGNIFICANCE


@pytest.mark.parametrize("rule", WRONG[:3], ids=lambda rule: rule.__name__)
def test_the_engine_with_a_wrong_rule_is_found_out(
    drafting: Engine, monkeypatch: pytest.MonkeyPatch, rule: Rule
) -> None:
    monkeypatch.setattr(verify, "settle", rule)
    counts = counted(drafting, monkeypatch, 2000, temperature=1.0)
    assert p_value(counts, shares(drafting, {"temperature": 1.0})) < SIGNIFICANCE
