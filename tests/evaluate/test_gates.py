"""Thresholds: what passes, what fails, and the sentence."""

from __future__ import annotations

import math
from typing import Any

import pytest

from trtbuild.gates import check_gates, default_max_perplexity_ratio
from trtbuild.support import QUANT_ALGO


def measured(ratio: float = 1.02, divergence: float = 0.01, agreement: float = 0.95) -> dict[str, Any]:
    return {
        "perplexity": {"ratio": ratio},
        "kl_divergence": {"mean": divergence},
        "top1_agreement": {"share": agreement},
    }


GATES = {"max_perplexity_ratio": 1.05, "max_kl_divergence": 0.02, "min_top1_agreement": 0.9}


def test_every_gate_that_is_on_is_checked() -> None:
    results = check_gates(measured(), GATES)
    assert [(result.name, result.passed, result.missed_by) for result in results] == [
        ("max_perplexity_ratio", True, 0.0),
        ("max_kl_divergence", True, 0.0),
        ("min_top1_agreement", True, 0.0),
    ]
    assert check_gates(measured(), dict.fromkeys(GATES)) == []


def test_threshold_itself_passes() -> None:
    assert all(result.passed for result in check_gates(measured(1.05, 0.02, 0.9), GATES))


@pytest.mark.parametrize(
    ("result", "name", "missed_by", "words"),
    [
        (measured(ratio=1.3125), "max_perplexity_ratio", 0.2625, ("1.312", "exceeds", "1.05", "0.2625", "25%")),
        (measured(divergence=0.05), "max_kl_divergence", 0.03, ("0.05", "exceeds", "0.02", "0.03", "150%")),
        (measured(agreement=0.81), "min_top1_agreement", 0.09, ("0.81", "is below", "0.9", "0.09", "10%")),
    ],
)
def test_miss_says_which_number_and_by_how_much(
    result: dict[str, Any], name: str, missed_by: float, words: tuple[str, ...]
) -> None:
    failed = [gate for gate in check_gates(result, GATES) if not gate.passed]
    assert [gate.name for gate in failed] == [name]
    assert failed[0].missed_by == pytest.approx(missed_by)
    text = str(failed[0])
    assert name in text
    assert all(word in text for word in words)


@pytest.mark.parametrize("name", ["max_perplexity_ratio", "max_kl_divergence", "min_top1_agreement"])
@pytest.mark.parametrize("value", [math.nan])
def test_nan_fails_every_gate(name: str, value: float) -> None:
    (gate,) = check_gates(measured(value, value, value), {name: GATES[name]})
    assert not gate.passed


def test_infinite_ratio_fails() -> None:
    (gate,) = check_gates(measured(ratio=math.inf), {"max_perplexity_ratio": 1.05})
    assert not gate.passed


def test_default_thresholds_of_the_formats() -> None:
    assert default_max_perplexity_ratio("fp8", "none") == 1.05
    assert default_max_perplexity_ratio("fp8", "fp8") == 1.07
    assert default_max_perplexity_ratio("int4_awq", "none") == 1.35
    every = [default_max_perplexity_ratio(weights, kv) for weights in QUANT_ALGO for kv in ("none", "fp8")]
    assert min(every) > 1.0
