"""Medusa heads beside a converted model: their tensors on every rank, and what the config says of them.

Names, shapes and division: NVIDIA/TensorRT-LLM tensorrt_llm/models/medusa/model.py @02499765 (`MedusaHead`:
column-parallel layers, the vocabulary padded as the head's own), keys of the config:
tensorrt_llm/models/medusa/config.py @084a8843, which takes a Qwen config where `model_type` says so and else a Llama
config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.checkpoint_files import open_directory
from trtbuild.convert.model import Model
from trtbuild.convert.plan import Output, Piece, Span
from trtbuild.convert.shape import share
from trtbuild.convert.source import Stored, stored_in
from trtbuild.convert.values import caster
from trtbuild.errors import CompatibilityError
from trtbuild.medusa_draft import MedusaHeads, medusa_misfits, read_medusa
from trtbuild.model import read_tensors
from trtbuild.trtllm_medusa import MEDUSA_CLASS, medusa_unfit

_PREFIX = "medusa_heads."  # among the stored tensors, to tell them from the model's


@dataclass(frozen=True, slots=True)
class Heads:
    """Heads as they lie on the disk; `longest` is how many tokens a tree of drafts has."""

    facts: MedusaHeads
    tensors: Mapping[str, Stored]
    longest: int


def open_heads(directory: Path, longest: int, model: Model) -> Heads:
    """The heads in `directory`, for `model`.

    Raises:
        ArtifactError: a file is missing or damaged.
        CompatibilityError: they are for another model, or TensorRT-LLM has no Medusa for its class.
    """
    files = open_directory(directory, at="speculative.draft")
    facts = read_medusa(files)
    wrong = medusa_misfits(facts, model.source.facts)
    reason = medusa_unfit(model.source.facts)
    if reason is not None:
        wrong.append(reason)
    if wrong:
        raise CompatibilityError(f"{directory}: {'; '.join(wrong)}", "use heads that were trained for this model")
    shards = sorted({tensor.shard for tensor in read_tensors(files)})
    tensors = {name: stored for shard in shards for name, stored in stored_in(directory / shard).items()}
    return Heads(facts, {f"{_PREFIX}{name}": stored for name, stored in tensors.items()}, longest)


def head_outputs(model: Model, heads: Heads, tp_rank: int) -> list[Output]:
    """The heads' tensors of one rank; pipeline stages do not go with speculation."""
    shape, made = model.shape, []
    rows = share(shape.hidden, shape.tp, tp_rank)
    vocabulary = (shape.vocab_rows(tp_rank), shape.padded_vocab // shape.tp)
    for head in range(heads.facts.num_heads):
        for layer in range(heads.facts.num_layers):
            name, stored = f"medusa_heads.{head}.medusa_layers.{layer}.linear", f"{_PREFIX}{head}.{layer}.linear"
            made.append(_rows(model, heads, f"{stored}.weight", f"{name}.weight", rows))
            made.append(_rows(model, heads, f"{stored}.bias", f"{name}.bias", rows))
        stored = f"{_PREFIX}{head}.{heads.facts.num_layers}.weight"
        made.append(_rows(model, heads, stored, f"medusa_heads.{head}.lm_head.weight", *vocabulary))
    return made


def _rows(model: Model, heads: Heads, stored: str, name: str, rows: Span, count: int | None = None) -> Output:
    """These rows of a stored tensor; `count` where the output has more, of zeros."""
    found = heads.tensors[stored]
    cast = caster(found.dtype, model.file_dtype)
    piece = Piece(source=stored, rows=rows, columns=(0, found.width), at=0, transform=cast)
    size = rows[1] - rows[0] if count is None else count
    return Output(name=name, dtype=model.file_dtype, shape=(size, *found.shape[1:]), pieces=(piece,))


def with_heads(config: Mapping[str, Any], model: Model, heads: Heads) -> dict[str, Any]:
    """The model's config as that of Medusa's class; heads are never quantized."""
    quantization = dict(config["quantization"])
    if quantization.get("quant_algo"):
        quantization["exclude_modules"] = [*(quantization.get("exclude_modules") or ()), "*medusa_heads*"]
    return {
        **config,
        "architecture": MEDUSA_CLASS,
        "model_type": model.row.model_type,
        "max_draft_len": heads.longest,
        "num_medusa_heads": heads.facts.num_heads,
        "num_medusa_layers": heads.facts.num_layers,
        "quantization": quantization,
    }
