"""The formulas, against plain arithmetic."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from trtbuild.evaluate.metrics import WindowScore, estimate, score_window, summarize


def _random(tokens: int, vocabulary: int, seed: int) -> torch.Tensor:
    return torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def test_score_equals_the_definitions_in_float64() -> None:
    # More rows than are computed at once, and not a multiple of that.
    p_logits, q_logits = _random(150, 11, seed=0), _random(150, 11, seed=1)
    targets = torch.arange(150) % 11
    p, q = (torch.softmax(logits.double(), dim=-1) for logits in (p_logits, q_logits))
    rows = torch.arange(150)
    score = score_window(p_logits, q_logits, targets)
    assert score.reference_nll == pytest.approx(float(-p[rows, targets].log().mean()), rel=1e-6)
    assert score.engine_nll == pytest.approx(float(-q[rows, targets].log().mean()), rel=1e-6)
    assert score.kl_divergence == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert score.top1_agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())


def test_direction_of_the_divergence_is_original_to_engine() -> None:
    certain = torch.tensor([[20.0, 0.0, 0.0]])
    even = torch.tensor([[0.0, 0.0, 0.0]])
    targets = torch.tensor([0])
    assert score_window(certain, even, targets).kl_divergence == pytest.approx(math.log(3), rel=1e-5)
    assert score_window(even, certain, targets).kl_divergence > 10


def test_equal_models_differ_by_nothing() -> None:
    logits = _random(70, 13, seed=2)
    score = score_window(logits, logits.clone(), torch.zeros(70, dtype=torch.long))
    assert score.engine_nll == score.reference_nll
    assert (score.kl_divergence, score.top1_agreement) == (0.0, 1.0)


def test_tokens_that_the_original_excludes_do_not_spoil_the_divergence() -> None:
    p = torch.tensor([[1.0, 2.0, -math.inf]])
    q = torch.tensor([[1.0, 2.0, -math.inf]])
    assert score_window(p, q, torch.tensor([0])).kl_divergence == 0.0
    assert score_window(p, torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([0])).kl_divergence > 0


def test_half_precision_logits_are_widened_first() -> None:
    logits = _random(8, 1000, seed=3)
    half = logits.to(torch.bfloat16)
    targets = torch.arange(8)
    assert score_window(half, half.float(), targets).kl_divergence == 0.0


def test_estimate_is_the_mean_and_its_standard_error() -> None:
    values = [0.1, 0.4, 0.2, 0.7]
    found = estimate(values)
    assert found.value == pytest.approx(statistics.fmean(values))
    assert found.standard_error == pytest.approx(statistics.stdev(values) / 2)
    assert math.isnan(estimate([1.0]).standard_error)


def test_ratio_and_its_error_follow_the_paired_differences() -> None:
    reference, engine = [2.0, 3.0, 4.0], [2.1, 3.3, 4.2]
    scores = [WindowScore(r, e, 0.1, 0.9) for r, e in zip(reference, engine, strict=True)]
    quality = summarize(scores)
    ratio = math.exp(0.2)
    assert quality.reference_perplexity == pytest.approx(math.exp(3.0))
    assert quality.perplexity_ratio.value == pytest.approx(ratio)
    assert quality.perplexity_ratio.value == pytest.approx(quality.engine_perplexity / quality.reference_perplexity)
    assert quality.perplexity_ratio.standard_error == pytest.approx(ratio * 0.1 / math.sqrt(3))


def test_standard_error_covers_the_truth_as_often_as_it_should() -> None:
    # Windows whose mean differences scatter around 0.05: the interval of two errors holds exp(0.05) 19 times in 20.
    generator = torch.Generator().manual_seed(0)
    truth, held, trials = math.exp(0.05), 0, 2000
    for _ in range(trials):
        differences = (0.05 + 0.02 * torch.randn(32, generator=generator)).tolist()
        ratio = summarize([WindowScore(3.0, 3.0 + d, 0.0, 1.0) for d in differences]).perplexity_ratio
        held += abs(ratio.value - truth) < 1.96 * ratio.standard_error
    assert 0.92 < held / trials < 0.97
