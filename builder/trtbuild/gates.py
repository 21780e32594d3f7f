"""Quality gates: thresholds on measured numbers, and the sentence that says which one missed by how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Perplexity of the engine over that of the original model. bf16 only re-rounds what the source may hold in more bits;
# the others leave room above what SmolLM2-135M showed (docs/formats.md), whose smallness makes it a hard case.
_MAX_PERPLEXITY_RATIO = {
    "none": 1.01,
    "fp8": 1.05,
    "fp8_per_channel_per_token": 1.05,
    "fp8_block": 1.05,
    "int8_sq": 1.35,
    "int8_weight_only": 1.03,
    "int4_awq": 1.35,
    "int4_gptq": 1.45,
    "w4a8_awq": 1.4,
    "nvfp4": 1.7,
    "nvfp4_awq": 1.7,
    "w4a16_nvfp4": 1.4,
    "mxfp4": 4.0,
    "mxfp8": 1.05,
}
# What 2:4 multiplies that by; pruning by magnitude, which ruins small models, misses it.
_SPARSITY_TIMES = {"none": 1.0, "2:4": 4.0}
# What a quantized KV cache may add.
_KV_CACHE_MORE = {"none": 0.0, "fp8": 0.02, "nvfp4": 0.2, "int8": 0.05}


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


def default_max_perplexity_ratio(weight_format: str, kv_cache: str, sparsity: str = "none") -> float:
    """The threshold that a recipe gets when it names none."""
    dense = _MAX_PERPLEXITY_RATIO[weight_format] + _KV_CACHE_MORE[kv_cache]
    return round(dense * _SPARSITY_TIMES[sparsity], 3)


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
