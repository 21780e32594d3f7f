"""Perplexity, KL divergence and agreement of two models on the same windows of text, with standard errors.

The unit of sampling is the window: tokens of one window depend on each other, windows hardly do. All windows have the
same number of predictions, so the mean over all tokens is the mean of the window means, and its standard error is
their standard deviation over the square root of their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of logits that are turned into probabilities at once: bounds the extra memory to a few [rows, vocabulary].
_ROWS = 64


@dataclass(frozen=True, slots=True)
class WindowScore:
    """Means over the predictions of one window; negative log-likelihoods and KL divergence are in nats."""

    reference_nll: float
    engine_nll: float
    kl_divergence: float
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured number and the standard error of its sampling of text; NaN with fewer than two windows."""

    value: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class Quality:
    """How far the engine is from the reference."""

    reference_perplexity: float
    engine_perplexity: float
    perplexity_ratio: Estimate
    kl_divergence: Estimate
    top1_agreement: Estimate


def score_window(reference: Tensor, engine: Tensor, targets: Tensor) -> WindowScore:
    """Compare two models on one window.

    Args:
        reference: logits of the original model, [tokens, vocabulary].
        engine: logits of the compressed model, of the same shape, on the same device.
        targets: the ids that follow, [tokens].
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, targets.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        p = torch.log_softmax(reference[rows].float(), dim=-1)
        q = torch.log_softmax(engine[rows].float(), dim=-1)
        ids = targets[rows, None]
        agree = p.argmax(dim=-1) == q.argmax(dim=-1)
        # A probability of zero contributes nothing: 0 * log 0 is 0, where plain arithmetic says NaN for -inf - -inf.
        divergence = torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(dim=-1)
        parts = (-p.gather(-1, ids), -q.gather(-1, ids), divergence, agree)
        sums += torch.stack([part.sum(dtype=torch.float64).cpu() for part in parts])
    means = (sums / targets.shape[0]).tolist()
    return WindowScore(*means)


def summarize(scores: Sequence[WindowScore]) -> Quality:
    """The numbers over all windows.

    The logarithm of the perplexity ratio is the mean d of the differences of log-likelihood between the two models on
    the same tokens. Its error is far smaller than that of either perplexity, because the text is the same for both.
    By the delta method the ratio exp(d) has the standard error exp(d) times that of d.
    """
    difference = estimate([score.engine_nll - score.reference_nll for score in scores])
    ratio = _exp(difference.value)
    return Quality(
        reference_perplexity=_exp(_mean([score.reference_nll for score in scores])),
        engine_perplexity=_exp(_mean([score.engine_nll for score in scores])),
        perplexity_ratio=Estimate(ratio, ratio * difference.standard_error),
        kl_divergence=estimate([score.kl_divergence for score in scores]),
        top1_agreement=estimate([score.top1_agreement for score in scores]),
    )


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values and its standard error."""
    mean = _mean(values)
    if len(values) < 2:
        return Estimate(mean, math.nan)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Estimate(mean, math.sqrt(variance / len(values)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
