"""What the files of ``speculative.draft`` say: a draft model, or TensorRT-LLM's own checkpoint of a model with heads.

Heads (Medusa, EAGLE, ReDrafter) come with the model that they belong to, as upstream's converters write both together.
Keys of their ``config.json``: NVIDIA/TensorRT-LLM tensorrt_llm/models/medusa/config.py @084a8843, eagle/config.py
@0382a8ac, and tensorrt_llm/builder.py @14e801da, which reads `redrafter_num_beams` and `redrafter_draft_len_per_beam`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.checkpoint_files import open_directory
from trtbuild.eagle3_draft import Eagle3, read_eagle3
from trtbuild.errors import ArtifactError, Problem, RecipeError
from trtbuild.manifest import read_json
from trtbuild.medusa_draft import MedusaHeads, is_medusa, read_medusa
from trtbuild.model import ModelFacts, read_facts
from trtbuild.tokenizer_file import TOKENIZER_FILE, vocabulary

CONFIG = "config.json"
# Roles in the engine step; no adapter can have such a name.
DRAFT_ROLE, HEADS_ROLE, MEDUSA_ROLE = "speculative/draft", "speculative/heads", "speculative/medusa"
DRAFT_ROLES = (DRAFT_ROLE, HEADS_ROLE, MEDUSA_ROLE)
AT = "speculative.draft"
# The classes of MODEL_MAP (tensorrt_llm/models/__init__.py) that decode with heads.
HEADS: Mapping[str, tuple[str, ...]] = {
    "medusa": ("MedusaForCausalLM", "MedusaLlamaForCausalLM"),
    "eagle": ("EagleForCausalLM",),
    "redrafter": ("ReDrafterForCausalLM", "ReDrafterForLLaMALM", "ReDrafterForQWenLM"),
}


@dataclass(frozen=True, slots=True)
class Heads:
    """A converted checkpoint with heads; `more_len` is what EAGLE's layers add to the longest sequence, in tokens."""

    architecture: str
    dtype: str
    tp_size: int
    pp_size: int
    format: str | None
    kv_cache: str | None
    max_draft_len: int
    more_len: int
    hidden_size: int
    num_layers: int


@dataclass(frozen=True, slots=True)
class Draft:
    """One of the four: `facts` of a draft model, `heads` with their model, the draft of EAGLE-3, Medusa heads alone."""

    facts: ModelFacts | None = None
    heads: Heads | None = None
    eagle3: Eagle3 | None = None
    medusa: MedusaHeads | None = None


def read_draft(directory: Path, method: str) -> Draft:
    """What lies in `directory`, for a speculative method of TensorRT engines or of the LLM API.

    Raises:
        RecipeError: there is nothing of the kind that the method takes, with what to do.
        ArtifactError: a file is damaged.
    """
    files = open_directory(directory, at=AT)
    if method == "eagle3":
        return Draft(eagle3=read_eagle3(files))
    if method not in HEADS:
        return Draft(facts=read_facts(files))
    config = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    if method == "medusa" and isinstance(config, dict) and is_medusa(config):
        return Draft(medusa=read_medusa(files))
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if architecture not in HEADS[method]:
        raise RecipeError([_not_converted(directory, method, architecture)])
    try:
        heads = _heads(config, method)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"{directory / CONFIG}: lacks what a checkpoint with heads says ({type(error).__name__}: {error})"
        raise ArtifactError(message, "convert it again with TensorRT-LLM's own script") from None
    world = heads.tp_size * heads.pp_size
    missing = [name for name in rank_files(world) if not (directory / name).is_file()]
    if missing:
        raise ArtifactError(
            f"{directory}: {missing[0]} is missing, and {CONFIG} says {world} ranks", "convert it again"
        )
    return Draft(heads=heads)


def other_tokens(model: Path, draft: Path) -> Problem | None:
    """What is wrong where two checkpoint directories do not call the same tokens by the same numbers.

    Tokenizers in other files than ``tokenizer.json`` are not compared.
    """
    ours, theirs = (_tokens(directory / TOKENIZER_FILE) for directory in (model, draft))
    if ours is None or theirs is None or ours == theirs:
        return None
    differing = sum(theirs.get(token) != number for token, number in ours.items()) or len(theirs) - len(ours)
    message = f"{draft} has another tokenizer than the model: {differing} of {len(ours)} tokens differ"
    return Problem(AT, message, "use a draft model of the same family: its token ids go to the model as they are")


def _tokens(path: Path) -> dict[str, int] | None:
    """Every token's number, or None where the file does not say it."""
    try:
        return vocabulary(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def rank_files(world_size: int) -> list[str]:
    """The names of a TensorRT-LLM checkpoint's weights."""
    return [f"rank{rank}.safetensors" for rank in range(world_size)]


def _not_converted(directory: Path, method: str, architecture: object) -> Problem:
    found = f"is a checkpoint of {architecture}" if architecture else "is no checkpoint in TensorRT-LLM's format"
    message = f"{directory} {found}: this version of trtbuild converts no heads of {method}"
    hint = (
        f"convert model and heads together with examples/{method}/convert_checkpoint.py of that TensorRT-LLM release "
        "and name its output directory"
    )
    return Problem(AT, message, hint)


def _heads(config: Mapping[str, Any], method: str) -> Heads:
    mapping, quantization = config.get("mapping") or {}, config.get("quantization") or {}
    if method == "redrafter":
        longest = int(config["redrafter_num_beams"]) * int(config["redrafter_draft_len_per_beam"])
    else:
        longest = int(config["max_draft_len"])
    return Heads(
        architecture=config["architecture"],
        dtype=config["dtype"],
        tp_size=int(mapping.get("tp_size", 1)),
        pp_size=int(mapping.get("pp_size", 1)),
        format=quantization.get("quant_algo"),
        kv_cache=quantization.get("kv_cache_quant_algo"),
        max_draft_len=longest,
        more_len=int(config["num_eagle_layers"]) if method == "eagle" else 0,
        hidden_size=int(config["hidden_size"]),
        num_layers=int(config["num_hidden_layers"]),
    )
