"""Compress a model one decoder layer at a time: what is put together for it, and what is said of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from trtbuild.compress.batches import batch_tokens, batches
from trtbuild.compress.coverage import expert_notes
from trtbuild.compress.folding import smoothing_notes
from trtbuild.compress.identity import resume_key
from trtbuild.compress.outcome import Changed
from trtbuild.compress.request import Meter, Request
from trtbuild.compress.selection import select
from trtbuild.compress.skeleton import open_skeleton
from trtbuild.compress.source import pick_device
from trtbuild.compress.states_between import StatesBetween
from trtbuild.compress.stream import Stream
from trtbuild.compress_memory import Demand, show_bytes
from trtbuild.errors import Problem, RecipeError
from trtbuild.model import ModelFacts
from trtbuild.recipe_fields import SELF
from trtbuild.safetensors_header import TensorInfo
from trtbuild.worker import peak_memory_bytes


def compress_by_layer(
    request: Request,
    facts: ModelFacts,
    source: Mapping[str, TensorInfo],
    ids: Sequence[Sequence[int]],
    meter: Meter,
    phase: Callable[[str], AbstractContextManager[None]],
) -> Changed:
    """Prune and quantize the model and write it; arguments as of `whole.compress_whole`.

    Raises:
        NotStreamableError: This model cannot be compressed layer by layer; nothing was written to the output.
        RecipeError: A limit on memory that one decoder layer does not fit in.
    """
    device = pick_device(request.device)
    demand = _demand(request, facts, ids)
    if device.type == "cpu" and request.max_memory is not None and request.max_memory < demand.smallest:
        smallest = show_bytes(demand.smallest)
        message = f"{show_bytes(request.max_memory)}: one decoder layer of this model takes {smallest}"
        raise RecipeError([Problem("compress.max_memory", message, f"use at least {smallest}")])
    with phase("load"):
        meter.advance(0, "load the model")
        skeleton = open_skeleton(request, source, device)
        selection = select(skeleton.model, source, request)
        work = request.unfinished
        if request.calibration.get("data") == SELF:
            work /= "layers"  # beside the text that the model has written
        lengths = [len(sample) for sample in ids]
        together = batches(lengths, batch_tokens(device))
        key = resume_key(request, source, ids, device)
        states = StatesBetween(request, lengths, device, work, keep=demand.kept_bytes(request.max_memory) > 0)
        stream = Stream(request, skeleton, selection, ids, work, key, meter, states, together)
        stream.ahead = device.type != "cpu" or demand.reads_ahead(request.max_memory)
        stream.prepare()
    with phase("layers"):
        stream.run()
    if request.work is None:
        shutil.rmtree(work)
    notes = [*expert_notes(stream.experts), *smoothing_notes(stream.unsmoothed, selection)]
    if request.max_memory is not None and peak_memory_bytes() > request.max_memory:
        seen, limit = show_bytes(peak_memory_bytes()), show_bytes(request.max_memory)
        notes.append(f"the peak of memory was {seen}, above compress.max_memory ({limit})")
    if stream.resumed:
        notes.append(f"an earlier run had finished {stream.resumed} of {skeleton.depth} layers")
    return Changed(selection, notes, stream.errors, stream.experts)


def _demand(request: Request, facts: ModelFacts, ids: Sequence[Sequence[int]]) -> Demand:
    return Demand(
        layer=facts.largest_layer,
        hidden_size=facts.hidden_size,
        format=request.format,
        kv_cache=request.kv_cache,
        sparsity_method=request.sparsity_method if request.sparse else None,
        samples=len(ids),
        length=max(map(len, ids), default=0),
        more_formats=tuple(name for name in request.formats if name != request.format),
        experts=facts.num_experts is not None,
    )
