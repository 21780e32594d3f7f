"""The compress step: from a source checkpoint to a checked, compressed one in the same format."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trtbuild.compress.calibrate import calibration_loop
from trtbuild.compress.checks import Checked, check_export
from trtbuild.compress.copying import copy_checkpoint
from trtbuild.compress.request import Meter, Request, parse_request
from trtbuild.compress.selection import Selection, select
from trtbuild.compress.source import check_source, load_source, pick_device, read_tensors
from trtbuild.errors import HostError, Problem, RecipeError
from trtbuild.model import ModelFacts
from trtbuild.safetensors_header import TensorInfo
from trtbuild.worker import Progress

_SPARSEGPT_PASS = (("measure activations for 2:4", 2),)
_MIN_FREE = 16 << 20  # room for config and tokenizer files beside the tensors


class _Clock:
    """Seconds of each phase, by its name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 3)


def run(raw: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Compress as `raw` says and return what was done, counted from the written files.

    Raises:
        RecipeError, CompatibilityError, ArtifactError, ToolError, HostError: one sentence each, see the modules.
    """
    request = parse_request(raw)
    facts = check_source(request)
    source = read_tensors(request.source)
    request.output.mkdir(parents=True, exist_ok=True)
    needed = _expected_bytes(request, facts)
    with _disk_errors(request, needed):
        _refuse_full_disk(request, needed)
        return _compress(request, facts, source, progress)


def _compress(
    request: Request, facts: ModelFacts, source: Mapping[str, TensorInfo], progress: Progress
) -> dict[str, Any]:
    clock = _Clock()
    shards = sorted({info.shard for info in source.values()})
    if not (request.quantized or request.sparse):
        if request.exclude:
            raise RecipeError([Problem("compress.exclude", "has no meaning while nothing is compressed", "remove it")])
        meter = Meter(progress, len(shards))
        with clock.phase("copy"):
            copy_checkpoint(request, shards, meter)
        selection = Selection({}, {})
        notes: list[str] = []
        samples = None
    else:
        samples, selection, notes = _change(request, facts, source, shards, progress, clock)
    _make_readable(request.output)
    with clock.phase("check"):
        checked = check_export(request, selection, source)
    progress(1, 1, "done")
    return _result(request, checked, samples, clock, notes)


def _make_readable(output: Path) -> None:
    """Safetensors writes files for their owner only, but containers run as another user."""
    for path in output.glob("*"):
        if path.is_file():
            path.chmod(0o644)


def _change(
    request: Request,
    facts: ModelFacts,
    source: Mapping[str, TensorInfo],
    shards: list[str],
    progress: Progress,
    clock: _Clock,
) -> tuple[Any, Selection, list[str]]:
    """Prune and quantize the model in memory and write it; return samples, selection and notes."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    samples = _load_samples(request)
    ids = samples.input_ids if samples is not None else []
    meter = Meter(progress, _total_work(request, facts, len(ids)))
    with clock.phase("load"):
        meter.advance(0, "load the model")
        model = load_source(request, pick_device(request.device))
        selection = select(model, source, request)
    notes: list[str] = []
    idle: list[str] = []
    if request.sparse:
        from trtbuild.compress.sparsify import sparsify

        with clock.phase("sparsify"):
            loop = calibration_loop(ids, meter, _SPARSEGPT_PASS) if request.sparsity_method == "sparsegpt" else None
            idle += sparsify(model, selection, request, loop)
    if request.quantized:
        from trtbuild.compress.export import export
        from trtbuild.compress.quantize import passes, quantize

        with clock.phase("quantize"):
            idle += quantize(model, selection, request, calibration_loop(ids, meter, passes(request)))
        with clock.phase("export"):
            meter.advance(1, "write the checkpoint")
            export(model, selection, request)
    else:
        with clock.phase("export"):
            copy_checkpoint(request, shards, meter, _weights(model, selection))
    if idle:
        names = sorted(set(idle))
        notes.append(f"{len(names)} experts saw no calibration token: {', '.join(names[:5])}")
    return samples, selection, notes


def _weights(model: nn.Module, selection: Selection) -> dict[str, torch.Tensor]:
    """The selected layers' weights, by their names in files."""
    return {f"{disk}.weight": model.get_submodule(name).weight.detach() for name, disk in selection.compressed.items()}


def _load_samples(request: Request) -> Any:
    if not request.calibrated:
        return None
    from trtbuild.compress.textdata import CalibrationSpec, load_samples

    settings = dict(request.calibration)
    data = settings.pop("data", None)
    spec = CalibrationSpec(data=None if data is None else Path(data), **settings)
    return load_samples(spec, request.tokenizer, trust_remote_code=request.trust_remote_code)


def _total_work(request: Request, facts: ModelFacts, samples: int) -> int:
    passes: Sequence[tuple[str, int]] = ()
    if request.sparse and request.sparsity_method == "sparsegpt":
        passes = _SPARSEGPT_PASS
    if request.quantized:
        from trtbuild.compress.quantize import passes as of_format

        passes = (*passes, *of_format(request))
    return sum(cost for _, cost in passes) * samples * facts.num_layers + max(len(facts.files), 2)


def _expected_bytes(request: Request, facts: ModelFacts) -> int:
    """A little more than the output will take."""
    bits = {"none": 16, "fp8": 8, "int4_awq": 4 + 32 / (request.group_size or 128)}[request.format]
    rest = facts.parameters - facts.linear_parameters
    return int(facts.linear_parameters * bits / 8) + rest * 2 + _MIN_FREE


def _refuse_full_disk(request: Request, needed: int) -> None:
    free = shutil.disk_usage(request.output).free
    if free < needed:
        raise _disk_full(request, needed, f"{free:,} are free")


@contextmanager
def _disk_errors(request: Request, needed: int) -> Iterator[None]:
    """Turn a disk that fills up into a sentence; safetensors reports it as an error class of its own."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT} or "os error 28" in str(error)
        if not full:
            raise
        raise _disk_full(request, needed, "the disk is full") from error


def _disk_full(request: Request, needed: int, state: str) -> HostError:
    return HostError(
        f"{request.output}: the compressed checkpoint needs about {needed:,} bytes, {state}",
        "free space there or move the store",
    )


def _result(request: Request, checked: Checked, samples: Any, clock: _Clock, notes: list[str]) -> dict[str, Any]:
    share = checked.conforming / checked.groups if checked.groups else 0.0
    sparsity = {"groups": checked.groups, "conforming": checked.conforming, "share": share}
    return {
        "format": request.format,
        "quantized_projections": checked.quantized_projections,
        "excluded_modules": list(checked.excluded_modules),
        "sparsity": sparsity if request.sparse else None,
        "calibration": None if samples is None else _calibration(samples),
        "tensors": checked.tensors,
        "bytes": checked.bytes,
        "seconds": clock.seconds,
        "notes": notes,
    }


def _calibration(samples: Any) -> dict[str, Any]:
    return {
        "tokens": samples.tokens,
        "samples": len(samples.input_ids),
        "digest": samples.digest,
        "source": samples.source,
    }
