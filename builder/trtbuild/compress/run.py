"""The compress step: from a source checkpoint to a checked, compressed one in the same format."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trtbuild.compress import textdata
from trtbuild.compress.checks import Checked, check_export
from trtbuild.compress.copying import copy_checkpoint
from trtbuild.compress.coverage import expert_notes
from trtbuild.compress.request import Meter, Request, parse_request
from trtbuild.compress.selection import Selection, select
from trtbuild.compress.source import check_source, pick_device, read_tensors
from trtbuild.compress.textdata import CalibrationSpec, Samples
from trtbuild.compress.whole import SPARSEGPT_PASSES, compress_whole
from trtbuild.compress_memory import Demand, show_bytes
from trtbuild.errors import CompatibilityError, HostError, Problem, RecipeError
from trtbuild.model import ModelFacts
from trtbuild.recipe_fields import SELF
from trtbuild.safetensors_header import TensorInfo
from trtbuild.weight_formats import WEIGHT_FORMATS
from trtbuild.worker import Progress, peak_memory_bytes

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
    if not (request.quantized or request.sparse):
        if request.exclude:
            raise RecipeError([Problem("compress.exclude", "has no meaning while nothing is compressed", "remove it")])
        meter = Meter(progress, len({info.shard for info in source.values()}))
        with clock.phase("copy"):
            copy_checkpoint(request, source, meter)
        selection = Selection({}, {})
        notes: list[str] = []
        calibration = None
    else:
        calibration, selection, notes = _change(request, facts, source, progress, clock)
    _make_readable(request.output)
    with clock.phase("check"):
        checked = check_export(request, selection, source)
    progress(1, 1, "done")
    return _result(request, checked, calibration, clock, notes)


def _make_readable(output: Path) -> None:
    """Safetensors writes files for their owner only, but containers run as another user."""
    for path in output.glob("*"):
        if path.is_file():
            path.chmod(0o644)


def _change(
    request: Request,
    facts: ModelFacts,
    source: Mapping[str, TensorInfo],
    progress: Progress,
    clock: _Clock,
) -> tuple[dict[str, Any] | None, Selection, list[str]]:
    """Prune and quantize, one layer at a time where the model allows it.

    Return what the evidence says of the calibration, the selection, and notes.
    """
    import transformers

    from trtbuild.compress.skeleton import NotStreamableError

    transformers.utils.logging.disable_progress_bar()
    samples = _load_samples(request, facts, source, progress)
    experts: dict[str, list[int]] = {}
    ids = samples.input_ids if samples is not None else ()
    meter = Meter(progress, _total_work(request, facts, len(ids)))
    try:
        selection, notes = _change_by_layer(request, facts, source, ids, meter, clock, experts)
    except NotStreamableError as reason:
        if request.max_memory is not None:
            raise CompatibilityError(
                f"compress.max_memory: this model cannot be compressed layer by layer: {reason}",
                "remove the limit; the whole model is then held in memory",
            ) from reason
        selection, idle = compress_whole(request, source, ids, meter, clock.phase)
        notes = [f"the whole model was held in memory: {reason}", *_idle_notes(idle)]
    if request.work is None:
        shutil.rmtree(_work(request), ignore_errors=True)
    return None if samples is None else _calibration(samples, experts), selection, notes


def _change_by_layer(
    request: Request,
    facts: ModelFacts,
    source: Mapping[str, TensorInfo],
    ids: Sequence[Sequence[int]],
    meter: Meter,
    clock: _Clock,
    experts: dict[str, list[int]],
) -> tuple[Selection, list[str]]:
    """Compress layer by layer; put into `experts` what each of them saw, by the name of their module."""
    from trtbuild.compress.identity import resume_key
    from trtbuild.compress.skeleton import open_skeleton
    from trtbuild.compress.stream import Stream

    device = pick_device(request.device)
    demand = _demand(request, facts, ids)
    if device.type == "cpu" and request.max_memory is not None and request.max_memory < demand.smallest:
        smallest = show_bytes(demand.smallest)
        message = f"{show_bytes(request.max_memory)}: one decoder layer of this model takes {smallest}"
        raise RecipeError([Problem("compress.max_memory", message, f"use at least {smallest}")])
    with clock.phase("load"):
        meter.advance(0, "load the model")
        skeleton = open_skeleton(request, source, device)
        selection = select(skeleton.model, source, request)
        work = _work(request)
        if request.calibration.get("data") == SELF:
            work /= "layers"  # beside the text that the model has written
        stream = Stream(request, skeleton, selection, ids, work, resume_key(request, source, ids, device), meter)
        stream.keep_states = demand.kept_bytes(request.max_memory) > 0
        stream.prepare()
    with clock.phase("layers"):
        stream.run()
    experts |= stream.experts
    notes = expert_notes(experts)
    if request.max_memory is not None and peak_memory_bytes() > request.max_memory:
        seen, limit = show_bytes(peak_memory_bytes()), show_bytes(request.max_memory)
        notes.append(f"the peak of memory was {seen}, above compress.max_memory ({limit})")
    if stream.resumed:
        notes.append(f"an earlier run had finished {stream.resumed} of {skeleton.depth} layers")
    return selection, notes


def _demand(request: Request, facts: ModelFacts, ids: Sequence[Sequence[int]]) -> Demand:
    return Demand(
        layer=facts.largest_layer,
        hidden_size=facts.hidden_size,
        format=request.format,
        kv_cache=request.kv_cache,
        sparsity_method=request.sparsity_method if request.sparse else None,
        samples=len(ids),
        length=max(map(len, ids), default=0),
    )


def _idle_notes(idle: Sequence[str]) -> list[str]:
    names = sorted(set(idle))
    return [f"{len(names)} experts saw no calibration token: {', '.join(names[:5])}"] if names else []


def _work(request: Request) -> Path:
    """Where unfinished files lie."""
    return request.work or request.output.with_name(f"{request.output.name}.unfinished")


def _load_samples(
    request: Request, facts: ModelFacts, source: Mapping[str, TensorInfo], progress: Progress
) -> Samples | None:
    if not request.calibrated:
        return None
    settings = dict(request.calibration)
    data = settings.pop("data", None)
    spec = CalibrationSpec(data=None if data in {None, SELF} else Path(data), **settings)
    if data == SELF:
        from trtbuild.compress.identity import resume_key
        from trtbuild.compress.selftext import self_samples

        told = [[spec.seed, spec.count, spec.length, int(spec.packing == "padded")]]
        key = resume_key(request, source, told, pick_device(request.device))
        return self_samples(request, facts, spec, _work(request) / "samples", key, progress)
    return textdata.load_samples(spec, request.tokenizer, trust_remote_code=request.trust_remote_code)


def _total_work(request: Request, facts: ModelFacts, samples: int) -> int:
    passes: Sequence[tuple[str, int]] = ()
    if request.sparse and request.sparsity_method == "sparsegpt":
        passes = SPARSEGPT_PASSES
    if request.quantized:
        from trtbuild.compress.quantize import passes as of_format

        passes = (*passes, *of_format(request))
    return sum(cost for _, cost in passes) * samples * facts.num_layers + max(len(facts.files), facts.num_layers + 1)


def _expected_bytes(request: Request, facts: ModelFacts) -> int:
    """A little more than the output will take."""
    bits = 16.0
    if request.format != "none":
        weight_format = WEIGHT_FORMATS[request.format]
        bits = weight_format.bits + (32 / request.group_size if request.group_size else weight_format.scale_bits)
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
    goes_on = "; the next run goes on behind the last finished layer" if request.quantized or request.sparse else ""
    return HostError(
        f"{request.output}: the compressed checkpoint needs about {needed:,} bytes, {state}",
        f"free space there or move the store{goes_on}",
    )


def _result(
    request: Request, checked: Checked, calibration: dict[str, Any] | None, clock: _Clock, notes: list[str]
) -> dict[str, Any]:
    share = checked.conforming / checked.groups if checked.groups else 0.0
    sparsity = {"groups": checked.groups, "conforming": checked.conforming, "share": share}
    return {
        "format": request.format,
        "quantized_projections": checked.quantized_projections,
        "excluded_modules": list(checked.excluded_modules),
        "sparsity": sparsity if request.sparse else None,
        "calibration": calibration,
        "tensors": checked.tensors,
        "bytes": checked.bytes,
        "seconds": clock.seconds,
        "notes": notes,
    }


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
