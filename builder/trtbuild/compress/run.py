"""The compress step: from a source checkpoint to a checked, compressed one in the same format."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trtbuild.compress import textdata
from trtbuild.compress.checks import check_export
from trtbuild.compress.compressed_checks import check_compressed
from trtbuild.compress.copying import copy_checkpoint
from trtbuild.compress.effective_bits import bits_per_weight
from trtbuild.compress.outcome import Changed, result
from trtbuild.compress.request import Meter, Request, parse_request
from trtbuild.compress.room import disk_errors, expected_bytes, refuse_full_disk
from trtbuild.compress.selection import Selection
from trtbuild.compress.source import check_source, pick_device, read_tensors
from trtbuild.compress.textdata import CalibrationSpec, Samples
from trtbuild.compress.whole import compress_whole
from trtbuild.errors import ArtifactError, CompatibilityError, HostError, Problem, RecipeError
from trtbuild.model import ModelFacts
from trtbuild.recipe_fields import SELF
from trtbuild.safetensors_header import TensorInfo
from trtbuild.weight_formats import is_searched
from trtbuild.worker import Clock, Progress


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
    needed = expected_bytes(request, facts)
    with disk_errors(request, needed):
        refuse_full_disk(request, needed)
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
    clock = Clock()
    samples, choice = _load_samples(request, facts, source, progress), None
    ids = samples.input_ids if samples is not None else ()
    if request.auto is not None:
        from trtbuild.compress.auto import choose

        with clock.phase("choose formats"):
            choice = choose(request, facts, source, ids, Meter(progress, 1))
        request = choice.apply(request)
    if request.quantized or request.sparse:
        changed = _change(request, facts, source, ids, progress, clock)
    else:
        changed = _copy(request, source, progress, clock)
    _make_readable(request.output)
    with clock.phase("check"):
        check = check_compressed if request.checkpoint == "compressed-tensors" else check_export
        checked = check(request, changed.selection, source)
    bits = bits_per_weight(changed.selection.compressed.values(), read_tensors(request.output), source)
    progress(1, 1, "done")
    found = result(request, checked, changed, samples, clock.seconds) | {"bits_per_weight": bits}
    return found if choice is None else found | {"choice": choice.table}


def _copy(request: Request, source: Mapping[str, TensorInfo], progress: Progress, clock: Clock) -> Changed:
    """Copy what is not compressed; a killed run goes on behind its last file."""
    if request.exclude:
        raise RecipeError([Problem("compress.exclude", "has no meaning while nothing is compressed", "remove it")])
    from trtbuild.compress.identity import resume_key

    work = request.unfinished
    key = resume_key(request, source, (), pick_device("cpu"))
    meter = Meter(progress, len({info.shard for info in source.values()}))
    try:
        with clock.phase("copy"):
            resumed = copy_checkpoint(request, source, meter, work=work, key=key)
    except ArtifactError:
        shutil.rmtree(work)
        raise
    if request.work is None:
        shutil.rmtree(work)
    notes = [f"files that an earlier run had copied: {resumed}"] if resumed else []
    return Changed(Selection({}, {}), notes)


def _make_readable(output: Path) -> None:
    """Safetensors writes files for their owner only, but containers run as another user."""
    for path in output.glob("*"):
        if path.is_file():
            path.chmod(0o644)


def _change(
    request: Request,
    facts: ModelFacts,
    source: Mapping[str, TensorInfo],
    ids: Sequence[Sequence[int]],
    progress: Progress,
    clock: Clock,
) -> Changed:
    """Prune and quantize, one layer at a time where the model allows it."""
    import transformers

    from trtbuild.compress.by_layer import compress_by_layer
    from trtbuild.compress.skeleton import NotStreamableError

    transformers.utils.logging.disable_progress_bar()
    meter = Meter(progress, _total_work(request, facts, len(ids)))
    try:
        changed = compress_by_layer(request, facts, source, ids, meter, clock.phase)
    except NotStreamableError as reason:
        changed = _change_whole(request, source, ids, meter, clock, reason)
    if request.work is None:
        shutil.rmtree(request.unfinished, ignore_errors=True)
    return changed


def _change_whole(
    request: Request,
    source: Mapping[str, TensorInfo],
    ids: Sequence[Sequence[int]],
    meter: Meter,
    clock: Clock,
    reason: Exception,
) -> Changed:
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
    return Changed(selection, notes, errors)


def _idle_notes(idle: Sequence[str]) -> list[str]:
    names = sorted(set(idle))
    return [f"{len(names)} experts saw no calibration token: {', '.join(names[:5])}"] if names else []


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
        return self_samples(request, facts, spec, request.unfinished / "samples", key, progress)
    return textdata.load_samples(spec, request.tokenizer, trust_remote_code=request.trust_remote_code)


def _total_work(request: Request, facts: ModelFacts, samples: int) -> int:
    passes: Sequence[tuple[str, int]] = ()
    if request.by_hessians and not request.joint:
        from trtbuild.compress.sparsify import PASSES

        passes = PASSES
    if request.quantized:
        from trtbuild.compress.mixed import passes as of_formats

        passes = (*passes, *of_formats(request))
    return sum(cost for _, cost in passes) * samples * facts.num_layers + max(len(facts.files), facts.num_layers + 1)
