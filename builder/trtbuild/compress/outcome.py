"""What a compression did, as the compress step reports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trtbuild.compress.checks import Checked
from trtbuild.compress.request import Request
from trtbuild.compress.selection import Selection
from trtbuild.compress.textdata import Samples


@dataclass(frozen=True, slots=True)
class Changed:
    """What became of the weights.

    Args:
        selection: Which layers were compressed.
        notes: For the user.
        errors: What SparseGPT or GPTQ did to the outputs of linear layers, by their names in files: the squared error
            relative to the squared output.
        experts: The calibration tokens of each expert, by the name of their module.
    """

    selection: Selection
    notes: Sequence[str] = ()
    errors: Mapping[str, float] = field(default_factory=dict)
    experts: Mapping[str, Sequence[int]] = field(default_factory=dict)


def result(
    request: Request, checked: Checked, changed: Changed, samples: Samples | None, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """The step's result, counted from the written files; `seconds` are of each phase."""
    share = checked.conforming / checked.groups if checked.groups else 0.0
    sparsity = {"groups": checked.groups, "conforming": checked.conforming, "share": share}
    return {
        "format": request.format,
        "quantized_projections": checked.quantized_projections,
        "excluded_modules": list(checked.excluded_modules),
        "sparsity": sparsity if request.sparse else None,
        "output_error": _output_error(changed.errors),
        "calibration": None if samples is None else _calibration(samples, changed.experts),
        "tensors": checked.tensors,
        "bytes": checked.bytes,
        "seconds": dict(seconds),
        "device": _device(),
        "notes": list(changed.notes),
    }


def _output_error(errors: Mapping[str, float]) -> dict[str, Any] | None:
    if not errors:
        return None
    worst = max(errors, key=lambda name: errors[name])
    return {"mean": sum(errors.values()) / len(errors), "worst": errors[worst], "worst_layer": worst}


def _calibration(samples: Samples, experts: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    if samples.coverage is None:
        raise RuntimeError("calibration samples have their coverage")
    return {
        "tokens": samples.tokens,
        "samples": len(samples.input_ids),
        "digest": samples.digest,
        "source": samples.source,
        "summary": samples.coverage.sentence(),
        "coverage": samples.coverage.to_json(),
        "tokens_per_expert": {name: list(seen) for name, seen in experts.items()},
    }


def _device() -> dict[str, Any] | None:
    """The GPU that layers ran on, and the most of its memory that tensors took and that was reserved for them."""
    import torch

    if not torch.cuda.is_initialized():
        return None
    return {
        "name": torch.cuda.get_device_name(),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }
