"""Quality gates: thresholds on measured numbers, and the sentence that says which one missed by how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Perplexity of the engine over that of the original model. bf16 only re-rounds what the source may hold in more bits;
# the others leave room above what SmolLM2-135M showed (int4_awq at group 64: 1.28).
_MAX_PERPLEXITY_RATIO = {
    ("none", "none"): 1.01,
    ("none", "fp8"): 1.03,
    ("fp8", "none"): 1.05,
    ("fp8", "fp8"): 1.06,
    ("int4_awq", "none"): 1.35,
    ("int4_awq", "fp8"): 1.37,
    ("int4_gptq", "none"): 1.45,
    ("int4_gptq", "fp8"): 1.47,
}


@dataclass(frozen=True, slots=True)
class GateResult:
    """One gate after the measurement; `missed_by` is positive where it failed, else 0."""

    name: str
    value: float
    threshold: float
    passed: bool
    missed_by: float

    def __str__(self) -> str:
        if self.passed:
            return f"quality.{self.name}: {self.value:.4g} is within {self.threshold:.4g}"
        share = f" ({self.missed_by / self.threshold:.0%})" if self.threshold else ""
        verb = "is below" if self.name.startswith("min_") else "exceeds"
        return f"quality.{self.name}: {self.value:.4g} {verb} {self.threshold:.4g} by {self.missed_by:.4g}{share}"


def default_max_perplexity_ratio(weight_format: str, kv_cache: str) -> float:
    """The threshold that a recipe gets when it names none."""
    return _MAX_PERPLEXITY_RATIO[weight_format, kv_cache]


def check_gates(result: Mapping[str, Any], gates: Mapping[str, float | None]) -> list[GateResult]:
    """Every gate that is switched on, applied to one evaluation result."""
    values = {
        "max_perplexity_ratio": result["perplexity"]["ratio"],
        "max_kl_divergence": result["kl_divergence"]["mean"],
        "min_top1_agreement": result["top1_agreement"]["share"],
    }
    return [_check(name, values[name], threshold) for name, threshold in gates.items() if threshold is not None]


def _check(name: str, value: float, threshold: float) -> GateResult:
    miss = threshold - value if name.startswith("min_") else value - threshold
    # A NaN fails every comparison, so it fails the gate too.
    passed = miss <= 0
    return GateResult(name=name, value=value, threshold=threshold, passed=passed, missed_by=0.0 if passed else miss)
