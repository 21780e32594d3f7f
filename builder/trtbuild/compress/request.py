"""What the compress step is asked to do, and how far it has come."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.errors import Problem, RecipeError
from trtbuild.weight_formats import WEIGHT_FORMATS, is_solved, needs_text, takes_group
from trtbuild.worker import Progress

FORMATS = ("none", *WEIGHT_FORMATS)
SPARSITIES = ("none", "2:4")
SPARSITY_METHODS = ("sparsegpt", "magnitude")
KV_CACHES = ("none", "fp8", "nvfp4", "int8")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One compression; `calibration` has the keys data, column, count, length and seed.

    `work` is where unfinished files lie, and `key` names the bytes of all inputs; None where nobody else keeps them.
    `max_memory` is a bound in bytes on the memory of the process.
    """

    source: Path
    tokenizer: Path
    output: Path
    format: str
    group_size: int | None
    sparsity: str
    sparsity_method: str
    kv_cache: str
    exclude: tuple[str, ...]
    calibration: Mapping[str, Any]
    trust_remote_code: bool
    device: str
    work: Path | None = None
    key: str | None = None
    max_memory: int | None = None

    @property
    def sparse(self) -> bool:
        """Whether weights are pruned."""
        return self.sparsity != "none"

    @property
    def quantized(self) -> bool:
        """Whether ModelOpt's quantizers are needed: for weights, for the KV cache, or both."""
        return self.format != "none" or self.kv_cache != "none"

    @property
    def by_hessians(self) -> bool:
        """Whether 2:4 is chosen by SparseGPT."""
        return self.sparse and self.sparsity_method == "sparsegpt"

    @property
    def joint(self) -> bool:
        """Whether SparseGPT and GPTQ prune and round in one sweep."""
        return self.by_hessians and is_solved(self.format)

    @property
    def calibrated(self) -> bool:
        """Whether text goes through the model; pruning by magnitude needs none, nor do formats of the weights alone."""
        return self.by_hessians or needs_text(self.format, self.kv_cache)


def parse_request(raw: Mapping[str, Any]) -> Request:
    """Return `raw` as a `Request`.

    Raises:
        RecipeError: A choice that does not exist.
    """
    choices = {
        "format": FORMATS,
        "sparsity": SPARSITIES,
        "sparsity_method": SPARSITY_METHODS,
        "kv_cache": KV_CACHES,
        "device": DEVICES,
    }
    given = {"sparsity_method": raw.get("sparsity_method") or "sparsegpt", "device": raw.get("device") or "auto"}
    given = {name: given.get(name, raw.get(name)) for name in choices}
    problems = [
        Problem(f"compress.{name}", f"{given[name]!r} is not one of {', '.join(allowed)}")
        for name, allowed in choices.items()
        if given[name] not in allowed
    ]
    if given["format"] in FORMATS and takes_group(given["format"]) and not raw.get("group_size"):
        problems.append(Problem("compress.group_size", f"{given['format']} needs a group size", "use 128, or 64"))
    if problems:
        raise RecipeError(problems)
    return Request(
        source=Path(raw["source"]),
        tokenizer=Path(raw.get("tokenizer") or raw["source"]),
        output=Path(raw["output"]),
        format=given["format"],
        group_size=raw.get("group_size"),
        sparsity=given["sparsity"],
        sparsity_method=given["sparsity_method"],
        kv_cache=given["kv_cache"],
        exclude=tuple(raw.get("exclude") or ()),
        calibration=dict(raw.get("calibration") or {}),
        trust_remote_code=bool(raw.get("trust_remote_code")),
        device=given["device"],
        work=None if raw.get("work") is None else Path(raw["work"]),
        key=raw.get("key"),
        max_memory=raw.get("max_memory"),
    )


class Meter:
    """Adds up work whose parts are estimated in units of one decoder layer over one calibration sample."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = max(total, 1)
        self._done = 0
        self._lock = threading.Lock()

    def advance(self, units: int, what: str) -> None:
        """Report `units` more as done; the last unit is kept for `finish`."""
        with self._lock:  # layers are finished on a thread of their own
            self._done = min(self._done + units, self._total - 1)
            self._progress(self._done, self._total, what)

    def finish(self, what: str) -> None:
        """Report that everything is done."""
        self._progress(self._total, self._total, what)
