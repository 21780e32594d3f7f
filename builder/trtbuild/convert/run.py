"""The conversion: from a checked unified checkpoint to ``config.json`` and one file for each rank."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from trtbuild.convert.architectures import find_architecture
from trtbuild.convert.checks import check_source
from trtbuild.convert.config import LAYERS, checkpoint_config, layer_config
from trtbuild.convert.formats import read_quantization
from trtbuild.convert.medusa import head_outputs, open_heads, with_heads
from trtbuild.convert.model import Model, plan_rank
from trtbuild.convert.request import Request, parse_request
from trtbuild.convert.shape import check_division, read_shape
from trtbuild.convert.source import file_bytes, open_source
from trtbuild.convert.stream import write_ranks
from trtbuild.errors import Problem, RecipeError
from trtbuild.worker import Progress

_AUTO_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "bfloat16"}
_CONFIG = "config.json"


def run(raw: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Convert as `raw` says and return what was written; on any error nothing of it remains.

    Raises:
        RecipeError, CompatibilityError, ArtifactError, HostError: one sentence each, see the modules.
    """
    started = time.monotonic()
    request = parse_request(raw)
    model = _read(request)
    notes = check_source(model) + _notes(model)
    config, layers = checkpoint_config(model), layer_config(model)
    plans = [plan_rank(model, rank) for rank in range(request.world_size)]
    tensors = dict(model.source.tensors)
    if request.medusa is not None:
        heads = open_heads(request.medusa, request.max_draft_len, model)
        config, tensors = with_heads(config, model, heads), tensors | dict(heads.tensors)
        for plan in plans:
            plan.outputs += head_outputs(model, heads, plan.rank)
    checked = time.monotonic()
    _prepare(request.output)
    sizes = write_ranks(plans, tensors, request.output, progress)
    if layers is not None:
        _write(request.output / LAYERS, layers)
    _write(request.output / _CONFIG, config)
    progress(1, 1, "done")
    return {
        "architecture": config["architecture"],
        "format": model.quantized.algo,
        "kv_cache": model.quantized.kv_cache,
        "dtype": model.dtype,
        "tp_size": request.tp_size,
        "pp_size": request.pp_size,
        "tensors": sum(len(plan.outputs) for plan in plans),
        "bytes": sum(sizes.values()),
        "source_bytes": file_bytes(model.source),
        "files": sizes,
        "seconds": {"check": round(checked - started, 3), "write": round(time.monotonic() - checked, 3)},
        "notes": notes,
    }


def refuse_source(source: Path, *, tp_size: int, pp_size: int) -> dict[str, Any]:
    """Refuse an original checkpoint whose conversion would be refused for its sizes or its config, without tensor data.

    Returns the config that the conversion would write, but for its quantization.

    Raises:
        CompatibilityError, ArtifactError: as `run`.
    """
    return checkpoint_config(
        _read(Request(source=source, output=source, tp_size=tp_size, pp_size=pp_size, dtype="auto"))
    )


def _read(request: Request) -> Model:
    """Everything that decides the conversion, read from small files and headers; sizes are checked to divide."""
    source = open_source(request.source)
    facts = source.facts
    row = find_architecture(facts.architecture, facts.model_type)
    quantized = read_quantization(source.quantization, str(request.source))
    shape = read_shape(source, row, request)
    check_division(shape, quantized, row)
    dtype = request.dtype
    if dtype == "auto":
        norm = source.tensors.get("model.norm.weight")
        dtype = _AUTO_DTYPES.get(norm.dtype if norm else facts.dtype, "bfloat16")
    return Model(source=source, row=row, shape=shape, quantized=quantized, dtype=dtype)


def _prepare(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise RecipeError([Problem("convert.output", f"{output} is a file", "name a directory")])
    output.mkdir(parents=True, exist_ok=True)
    present = sorted(
        path.name for path in output.iterdir() if path.name in (_CONFIG, LAYERS) or path.name.startswith("rank")
    )
    if present:
        raise RecipeError(
            [Problem("convert.output", f"{output} holds {present[0]} already", "name an empty directory")]
        )


def _write(path: Path, content: dict[str, Any]) -> None:
    """Put a JSON file in place; the config comes last of all: a directory without it is no checkpoint."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.rename(path)


def _notes(model: Model) -> list[str]:
    """What the user must know or do at run time."""
    notes, facts = [], model.source.facts
    window = facts.sliding_window
    if window is not None and window < facts.context_length and model.source.config.get("use_sliding_window", True):
        notes.append(f"the attention window of {window} tokens is set at run time: max_attention_window")
    if model.tied:
        notes.append("the head is the embedding: written twice, TensorRT keeps one where both are on one rank")
    if model.shape.padded_vocab != model.shape.vocab:
        notes.append(f"the vocabulary of {model.shape.vocab} is padded to {model.shape.padded_vocab} rows")
    if model.shape.tp > model.shape.kv_heads:
        notes.append(f"{model.shape.kv_heads} key and value heads are repeated over {model.shape.tp} ranks")
    return notes
