"""Medusa heads alone, which the engine step converts with the model: what the engine is built for, what is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from trtbuild.errors import Problem
from trtbuild.medusa_draft import MedusaHeads, medusa_misfits, one_path, tree_problems
from trtbuild.model import ModelFacts
from trtbuild.setting_values import Settings

# NVIDIA/TensorRT-LLM tensorrt_llm/models/medusa/model.py @02499765: a thin class over Llama's or Qwen's.
MEDUSA_CLASS = "MedusaForCausalLM"
_CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_CHOICES = "speculative.choices"


def medusa_heads(settings: Settings) -> MedusaHeads | None:
    """The heads that the engine step puts beside the model: a directory of them, or those that are to be trained."""
    return settings.draft.medusa if settings.draft else None


def take_medusa(settings: Settings, heads: MedusaHeads) -> None:
    """The tree of drafts; without one in the recipe every head's likeliest token."""
    choices = settings.take(_CHOICES, one_path(heads.num_heads), f"default: one path of the {heads.num_heads} heads")
    settings.put("speculative.max_draft_len", len(choices), "follows from speculative.choices")


def medusa_parameters(settings: Settings) -> dict[str, Any]:
    """What the engine step converts besides the model; nothing without heads."""
    heads = medusa_heads(settings)
    if heads is None:
        return {}
    return {
        "medusa": {
            "num_heads": heads.num_heads,
            "num_layers": heads.num_layers,
            "max_draft_len": settings["speculative.max_draft_len"],
        }
    }


def medusa_unfit(facts: ModelFacts) -> str | None:
    """Why TensorRT-LLM has no Medusa for a model, or None."""
    if facts.architecture in _CLASSES:
        return None
    return f"TensorRT-LLM has Medusa for {', '.join(_CLASSES)} only, and the model is {facts.architecture}"


def medusa_refusals(settings: Settings, facts: ModelFacts) -> Iterable[Problem]:
    """Heads for another model, and trees that are none."""
    heads = medusa_heads(settings)
    if heads is None:
        return
    reason = medusa_unfit(facts)
    if reason is not None:
        yield Problem("speculative.method", f"medusa: {reason}", "use another method or another model")
    for message in medusa_misfits(heads, facts):
        yield Problem("speculative.draft", message, "use heads that were trained for this model")
    for message in tree_problems(settings[_CHOICES], heads.num_heads):
        yield Problem(_CHOICES, message, "write each path after its beginnings, such as [[0], [1], [0, 0]]")
