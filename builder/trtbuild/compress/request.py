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
CHECKPOINTS = ("modelopt", "compressed-tensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoFormat:
    """Formats to choose from for each layer, the bits a weight may take on average, and how layers are measured."""

    formats: tuple[str, ...]
    target_bits: float
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One compression; `calibration` has the keys data, column, split, count, length, packing and seed.

    `work` is where unfinished files lie, and `key` names the bytes of all inputs; None where nobody else keeps them.
    `max_memory` is a bound in bytes on the memory of the process. `overrides` are patterns of module names with the
    format of what they match; the last one that matches a layer counts, `format` where none does. `checkpoint` is the
    form of the files. `auto` asks for formats that are chosen by measurement; `format` is none then.
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
    overrides: tuple[tuple[str, str], ...] = ()
    checkpoint: str = "modelopt"
    auto: AutoFormat | None = None

    @property
    def unfinished(self) -> Path:
        """Where unfinished files lie."""
        return self.work or self.output.with_name(f"{self.output.name}.unfinished")

    @property
    def formats(self) -> tuple[str, ...]:
        """The weight formats that layers may have, bf16 left out."""
        named = (self.format, *(name for _, name in self.overrides))
        return tuple(sorted({name for name in named if name != "none"}))

    @property
    def single(self) -> str:
        """The weight format of a request that names one alone; none where no weight is quantized."""
        return self.formats[0] if self.formats else "none"

    @property
    def mixed(self) -> bool:
        """Whether layers differ in format: a format that no layer has is refused."""
        return len(self.formats) > 1

    @property
    def sparse(self) -> bool:
        """Whether weights are pruned."""
        return self.sparsity != "none"

    @property
    def quantized(self) -> bool:
        """Whether ModelOpt's quantizers are needed: for weights, for the KV cache, or both."""
        return bool(self.formats) or self.auto is not None or self.kv_cache != "none"

    @property
    def by_hessians(self) -> bool:
        """Whether 2:4 is chosen by SparseGPT."""
        return self.sparse and self.sparsity_method == "sparsegpt"

    @property
    def solved(self) -> bool:
        """Whether weights are rounded by GPTQ; it is not mixed with other formats."""
        return is_solved(self.single) and not self.mixed

    @property
    def joint(self) -> bool:
        """Whether SparseGPT and GPTQ prune and round in one sweep."""
        return self.by_hessians and self.solved

    @property
    def calibrated(self) -> bool:
        """Whether text goes through the model; pruning by magnitude needs none, nor do formats of the weights alone."""
        return self.auto is not None or self.by_hessians or self.reads_text

    @property
    def reads_text(self) -> bool:
        """Whether quantization runs the text, whatever pruning does."""
        return any(needs_text(name, self.kv_cache) for name in self.formats or ("none",))


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
        "checkpoint": CHECKPOINTS,
    }
    given = {
        "sparsity_method": raw.get("sparsity_method") or "sparsegpt",
        "device": raw.get("device") or "auto",
        "checkpoint": raw.get("checkpoint") or "modelopt",
    }
    given = {name: given.get(name, raw.get(name)) for name in choices}
    problems = [
        Problem(f"compress.{name}", f"{given[name]!r} is not one of {', '.join(allowed)}")
        for name, allowed in choices.items()
        if given[name] not in allowed
    ]
    overrides = tuple((str(pattern), str(name)) for pattern, name in raw.get("overrides") or ())
    auto = _auto(raw.get("auto"))
    named = [given["format"], *(name for _, name in overrides), *(() if auto is None else auto.formats)]
    problems += [
        Problem("compress.overrides", f"{name!r} is not one of {', '.join(FORMATS)}")
        for name in named[1:]
        if name not in FORMATS
    ]
    grouped = [name for name in named if name in FORMATS and takes_group(name)]
    if grouped and not raw.get("group_size"):
        problems.append(Problem("compress.group_size", f"{grouped[0]} needs a group size", "use 128, or 64"))
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
        overrides=overrides,
        checkpoint=given["checkpoint"],
        auto=auto,
    )


def _auto(raw: Mapping[str, Any] | None) -> AutoFormat | None:
    if raw is None:
        return None
    return AutoFormat(formats=tuple(raw["formats"]), target_bits=float(raw["target_bits"]), method=str(raw["method"]))


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
