"""The compress step: from a source checkpoint to a checked, compressed one in the same format."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trtbuild.compress.auto import choose
from trtbuild.compress.checks import Checked, check_export
from trtbuild.compress.compressed_checks import check_compressed
from trtbuild.compress.copying import copy_checkpoint
from trtbuild.compress.effective_bits import bits_per_weight
from trtbuild.compress.folding import smoothing_notes
from trtbuild.compress.request import Meter, Request, parse_request
from trtbuild.compress.selection import Selection, select
from trtbuild.compress.source import check_source, pick_device, read_tensors
from trtbuild.compress.whole import compress_whole
from trtbuild.compress_memory import Demand, show_bytes
from trtbuild.errors import ArtifactError, CompatibilityError, HostError, Problem, RecipeError
from trtbuild.model import ModelFacts
from trtbuild.safetensors_header import TensorInfo
from trtbuild.weight_formats import file_bits, is_searched
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
    _refuse_cpu(request)
    facts = check_source(request)
    source = read_tensors(request.source)
    request.output.mkdir(parents=True, exist_ok=True)
    needed = _expected_bytes(request, facts)
    with _disk_errors(request, needed):
        _refuse_full_disk(request, needed)
        return _compress(request, facts, source, progress)


def _refuse_cpu(request: Request) -> None:
    """ModelOpt 0.47 computes with NVFP4 on CUDA alone, and AWQ's search computes with what it searches."""
    searched = [("format", name, "nvfp4") for name in request.formats if is_searched(name)]
    if pick_device(request.device).type != "cpu" or not searched:
        return
    kv_cache = "none" if request.mixed else request.kv_cache  # mixed formats are searched without it
    for field, value, other in (*searched, ("kv_cache", kv_cache, "fp8")):
        if value.startswith("nvfp4"):
            raise HostError(
                f"compress.{field}: {value}: AWQ's search computes with NVFP4, which ModelOpt does on CUDA alone, and "
                "this host's device is the CPU",
                f"compress on an NVIDIA GPU, or use {other}",
            )


def _compress(
    request: Request, facts: ModelFacts, source: Mapping[str, TensorInfo], progress: Progress
) -> dict[str, Any]:
    clock = _Clock()
    samples, choice = _load_samples(request), None
    if request.auto is not None:
        with clock.phase("choose formats"):
            choice = choose(request, facts, source, samples.input_ids, Meter(progress, 1))
        request = choice.apply(request)
    if not (request.quantized or request.sparse):
        if request.exclude:
            raise RecipeError([Problem("compress.exclude", "has no meaning while nothing is compressed", "remove it")])
        meter = Meter(progress, len({info.shard for info in source.values()}))
        with clock.phase("copy"):
            notes = _copy(request, source, meter)
        selection = Selection({}, {})
        errors: dict[str, float] = {}
    else:
        selection, notes, errors = _change(request, facts, source, samples, progress, clock)
    _make_readable(request.output)
    with clock.phase("check"):
        check = check_compressed if request.checkpoint == "compressed-tensors" else check_export
        checked = check(request, selection, source)
    progress(1, 1, "done")
    result = _result(request, checked, samples, clock, notes, errors)
    bits = bits_per_weight(selection.compressed.values(), read_tensors(request.output), source)
    return result | {"bits_per_weight": bits} | ({} if choice is None else {"choice": choice.table})


def _copy(request: Request, source: Mapping[str, TensorInfo], meter: Meter) -> list[str]:
    """Copy what is not compressed; a killed run goes on behind its last file."""
    from trtbuild.compress.identity import resume_key

    work = _work(request)
    try:
        resumed = copy_checkpoint(
            request, source, meter, work=work, key=resume_key(request, source, (), pick_device("cpu"), 1)
        )
    except ArtifactError:
        shutil.rmtree(work)
        raise
    if request.work is None:
        shutil.rmtree(work)
    return [f"files that an earlier run had copied: {resumed}"] if resumed else []


def _work(request: Request) -> Path:
    """Where unfinished files lie."""
    return request.work or request.output.with_name(f"{request.output.name}.unfinished")


def _make_readable(output: Path) -> None:
    """Safetensors writes files for their owner only, but containers run as another user."""
    for path in output.glob("*"):
        if path.is_file():
            path.chmod(0o644)


def _change(
    request: Request,
    facts: ModelFacts,
    source: Mapping[str, TensorInfo],
    samples: Any,
    progress: Progress,
    clock: _Clock,
) -> tuple[Selection, list[str], dict[str, float]]:
    """Prune and quantize, one layer at a time where the model allows it.

    Return the selection, notes, and the output errors of layers that were solved.
    """
    import transformers

    from trtbuild.compress.skeleton import NotStreamableError

    transformers.utils.logging.disable_progress_bar()
    ids = samples.input_ids if samples is not None else ()
    meter = Meter(progress, _total_work(request, facts, len(ids)))
    try:
        selection, notes, errors = _change_by_layer(request, facts, source, ids, meter, clock)
    except NotStreamableError as reason:
        if request.checkpoint != "modelopt":
            raise CompatibilityError(
                f"compress.checkpoint: compressed-tensors is written layer by layer, which fails here: {reason}",
                "use checkpoint: modelopt",
            ) from reason
        if request.max_memory is not None:
            raise CompatibilityError(
                f"compress.max_memory: this model cannot be compressed layer by layer: {reason}",
                "remove the limit; the whole model is then held in memory",
            ) from reason
        selection, idle, errors = compress_whole(request, source, ids, meter, clock.phase)
        notes = [f"the whole model was held in memory: {reason}", *_idle_notes(idle)]
    return selection, notes, errors


def _change_by_layer(
    request: Request,
    facts: ModelFacts,
    source: Mapping[str, TensorInfo],
    ids: Sequence[Sequence[int]],
    meter: Meter,
    clock: _Clock,
) -> tuple[Selection, list[str], dict[str, float]]:
    from trtbuild.compress.identity import resume_key
    from trtbuild.compress.skeleton import open_skeleton
    from trtbuild.compress.states_between import StatesBetween, batch_size
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
        batch = batch_size(device, len(ids[0])) if ids else 1
        key = resume_key(request, source, ids, device, batch)
        states = StatesBetween(request, len(ids), device, work, keep=demand.kept_bytes(request.max_memory) > 0)
        stream = Stream(request, skeleton, selection, ids, work, key, meter, states, batch)
        stream.ahead = device.type != "cpu" or demand.reads_ahead(request.max_memory)
        stream.prepare()
    with clock.phase("layers"):
        stream.run()
    if request.work is None:
        shutil.rmtree(work)
    notes = [*_idle_notes(stream.idle), *smoothing_notes(stream.unsmoothed, selection)]
    if request.max_memory is not None and peak_memory_bytes() > request.max_memory:
        seen, limit = show_bytes(peak_memory_bytes()), show_bytes(request.max_memory)
        notes.append(f"the peak of memory was {seen}, above compress.max_memory ({limit})")
    if stream.resumed:
        notes.append(f"an earlier run had finished {stream.resumed} of {skeleton.depth} layers")
    return selection, notes, stream.errors


def _demand(request: Request, facts: ModelFacts, ids: Sequence[Sequence[int]]) -> Demand:
    return Demand(
        layer=facts.largest_layer,
        hidden_size=facts.hidden_size,
        format=request.format,
        kv_cache=request.kv_cache,
        sparsity_method=request.sparsity_method if request.sparse else None,
        samples=len(ids),
        length=len(ids[0]) if ids else 0,
        more_formats=tuple(name for name in request.formats if name != request.format),
        experts=facts.num_experts is not None,
    )


def _idle_notes(idle: Sequence[str]) -> list[str]:
    names = sorted(set(idle))
    return [f"{len(names)} experts saw no calibration token: {', '.join(names[:5])}"] if names else []


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
    if request.by_hessians and not request.joint:
        from trtbuild.compress.sparsify import PASSES

        passes = PASSES
    if request.quantized:
        from trtbuild.compress.mixed import passes as of_formats

        passes = (*passes, *of_formats(request))
    return sum(cost for _, cost in passes) * samples * facts.num_layers + max(len(facts.files), facts.num_layers + 1)


def _expected_bytes(request: Request, facts: ModelFacts) -> int:
    """A little more than the output will take."""
    bits = max((file_bits(name, request.group_size) for name in request.formats), default=16.0)
    if request.overrides:
        bits = 16.0  # nobody knows yet what the patterns match
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
    done = "layer" if request.quantized or request.sparse else "file"
    goes_on = f"; the next run goes on behind the last finished {done}"
    return HostError(
        f"{request.output}: the compressed checkpoint needs about {needed:,} bytes, {state}",
        f"free space there or move the store{goes_on}",
    )


def _result(
    request: Request,
    checked: Checked,
    samples: Any,
    clock: _Clock,
    notes: list[str],
    errors: Mapping[str, float],
) -> dict[str, Any]:
    share = checked.conforming / checked.groups if checked.groups else 0.0
    sparsity = {"groups": checked.groups, "conforming": checked.conforming, "share": share}
    return {
        "format": request.format,
        "quantized_projections": checked.quantized_projections,
        "excluded_modules": list(checked.excluded_modules),
        "sparsity": sparsity if request.sparse else None,
        "output_error": _output_error(errors),
        "calibration": None if samples is None else _calibration(samples),
        "tensors": checked.tensors,
        "bytes": checked.bytes,
        "seconds": clock.seconds,
        "device": _device(),
        "notes": notes,
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


def _output_error(errors: Mapping[str, float]) -> dict[str, Any] | None:
    """What SparseGPT or GPTQ did to the outputs of linear layers: squared error relative to the squared output."""
    if not errors:
        return None
    worst = max(errors, key=lambda name: errors[name])
    return {"mean": sum(errors.values()) / len(errors), "worst": errors[worst], "worst_layer": worst}


def _calibration(samples: Any) -> dict[str, Any]:
    return {
        "tokens": samples.tokens,
        "samples": len(samples.input_ids),
        "digest": samples.digest,
        "source": samples.source,
    }
