"""What a draft will hold that the plan's own step trains: its sizes follow from the recipe and the model's facts.

So that everything which judges a draft from a directory judges a planned one too, before anything is computed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trtbuild.draft import Draft
from trtbuild.eagle3_draft import Eagle3, loaded_name, required
from trtbuild.medusa_draft import MedusaHeads
from trtbuild.model import ModelFacts
from trtbuild.recipe_speculative import Speculative
from trtbuild.recipe_training import Train

TRAINABLE = ("medusa", "eagle3")
USUAL_HEADS = 3
# nvidia-modelopt 0.47 writes these beside the layers (modelopt/torch/export/plugins/hf_spec_configs.py).
EAGLE_CONFIG: dict[str, Any] = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
}


def planned_draft(section: Speculative, facts: ModelFacts) -> Draft | None:
    """The draft that the recipe wants trained; None where it wants none, or of a method that trains nothing."""
    wanted = section.train
    if wanted is None or section.method not in TRAINABLE:
        return None
    if section.method == "medusa":
        return Draft(medusa=_medusa(wanted, facts))
    return Draft(eagle3=_eagle3(wanted, planned_captured(section, facts), facts))


def _medusa(wanted: Train, facts: ModelFacts) -> MedusaHeads:
    return MedusaHeads(
        num_heads=wanted.num_heads or USUAL_HEADS,
        num_layers=wanted.num_layers,
        hidden_size=facts.hidden_size,
        vocab_size=facts.vocab_size,
    )


def usual_captured(layers: int) -> tuple[int, ...]:
    """One layer near the beginning, the middle and the end: what TensorRT-LLM and ModelOpt capture where nothing says.

    TensorRT-LLM: `Eagle3SpecMetadata`, tensorrt_llm/_torch/speculative/eagle3.py @001e6700; ModelOpt 0.47:
    `default_eagle_aux_layer_ids` of modelopt/torch/speculative/plugins/hf_eagle.py, which also serves short models.
    """
    return tuple(sorted({min(1, layers - 1), max(0, layers // 2 - 1), max(0, layers - 4)}))


def planned_captured(section: Speculative, facts: ModelFacts) -> tuple[int, ...]:
    """The layers of the model that the draft of EAGLE-3 will read, in order."""
    return tuple(sorted(set(section.eagle3_layers_to_capture or usual_captured(facts.num_layers))))


def _eagle3(wanted: Train, captured: tuple[int, ...], facts: ModelFacts) -> Eagle3:
    """A draft with layers like the model's own."""
    draft = Eagle3(
        architecture="LlamaForCausalLMEagle3",
        model_type="llama",
        hidden_size=facts.hidden_size,
        target_hidden_size=facts.hidden_size,
        intermediate_size=facts.intermediate_size or 4 * facts.hidden_size,
        vocab_size=facts.vocab_size,
        draft_vocab_size=wanted.draft_vocab_size or facts.vocab_size,
        num_layers=wanted.num_layers,
        num_attention_heads=facts.num_attention_heads,
        num_key_value_heads=facts.num_key_value_heads,
        head_dim=facts.head_dim,
        context_length=facts.context_length,
        captured=captured,
        eagle_config=EAGLE_CONFIG,
        fc_norm=False,
        quant_algo=None,
        shapes={},
    )
    shapes = required(draft, len(captured))
    return replace(draft, shapes={loaded_name(name, draft.num_layers): shape for name, shape in shapes.items()})
