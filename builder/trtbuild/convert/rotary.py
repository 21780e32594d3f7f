"""The rotary embedding in TensorRT-LLM's config.

What upstream computes from it was read in NVIDIA/TensorRT-LLM, tensorrt_llm/layers/attention.py, Attention
.create_attention_const_params and RopeEmbeddingUtils (fork Ataraksia/TensorRT-LLM @a451bf93888e, which follows the main
branch; fork brb-nv/TensorRT-LLM @77146de62f38 for Gemma 3): tables of cosines and sines, made when the engine is built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trtbuild.convert.model import Model
from trtbuild.errors import CompatibilityError

Parameters = Mapping[str, Any]
# Up to max_position_embeddings, beyond which no plan lets an engine go, "dynamic" is no scaling (Transformers,
# src/transformers/modeling_rope_utils.py, _compute_dynamic_ntk_parameters @5.14.1). TensorRT-LLM's own kind of that
# name has a constant factor `alpha`, Hunyuan's.
_UNSCALED = ("default", "dynamic")
_SCALED = ("linear", "llama3", "yarn")


def rope(model: Model) -> tuple[float, dict[str, Any] | None]:
    """(base, scaling) of the rotary embedding; Gemma 3's are those of its full-attention layers.

    Raises:
        CompatibilityError: TensorRT-LLM's engines have no such embedding.
    """
    config = model.source.config
    stored = config.get("rope_parameters")
    parameters: Parameters = stored if isinstance(stored, dict) else dict(config.get("rope_scaling") or {})
    parameters = parameters.get("full_attention", parameters)
    base = float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    if kind in _UNSCALED or (model.row.family == "phi3" and kind in {"longrope", "su"}):
        return base, None
    if (reason := _refused(model, kind)) is not None:
        raise CompatibilityError(
            f"{model.row.name} with rotary scaling {kind!r} has no form in a TensorRT-LLM checkpoint: {reason}",
            "choose the runtime trtllm or embedded for this model",
        )
    rest = {name: value for name, value in parameters.items() if name != "rope_theta"}
    if kind == "yarn":
        rest |= _yarn(model, parameters)
    return base, rest | {"type": kind, "rope_type": kind}


def _refused(model: Model, kind: str) -> str | None:
    """Why the engine would compute another embedding."""
    if model.row.model_type == "gemma3_text":
        # Gemma 3 of 4B and more: linear by 8 on full-attention layers. create_attention_const_params makes the table of
        # the sliding layers (rope_local_base_freq) with the same rotary_scaling, and GemmaConfig.from_hugging_face
        # (models/gemma/config.py @9df6d722b020) asks for `rotary_scaling`, which no such config has: neither is right.
        return (
            "its tables for full-attention and for sliding layers share one scaling, the model scales the first alone"
        )
    if model.row.family == "phi3":
        return "Phi-3's layers pass no scaling to the attention (models/phi3/model.py @1479eaf5b72c)"
    if kind not in _SCALED:
        return f"it computes {', '.join(_SCALED)}"
    return None


def _yarn(model: Model, parameters: Parameters) -> dict[str, Any]:
    """Every number that the table depends on; upstream has other defaults than Transformers for some.

    Cosines and sines are multiplied by (0.1 mscale ln factor + 1) / (0.1 mscale_all_dim ln factor + 1), which
    Transformers calls the attention factor (src/transformers/modeling_rope_utils.py, _compute_yarn_parameters @5.14.1).

    Raises:
        CompatibilityError: a key that the table does not depend on there.
    """
    if not parameters.get("truncate", True):
        raise CompatibilityError(
            f"{model.row.name} with rotary scaling 'yarn' and truncate: false: TensorRT-LLM rounds the borders always",
            "choose the runtime embedded for this model",
        )
    original = parameters.get("original_max_position_embeddings")
    if original is None:
        original = model.source.config.get("original_max_position_embeddings", model.source.facts.context_length)
    factor = parameters.get("factor") or model.source.facts.context_length / original
    made = {
        "factor": float(factor),
        "original_max_position_embeddings": int(original),
        "beta_fast": float(parameters.get("beta_fast") or 32),
        "beta_slow": float(parameters.get("beta_slow") or 1),
        "mscale": 1.0,
        "mscale_all_dim": 0.0,
    }
    above, below = parameters.get("mscale"), parameters.get("mscale_all_dim")
    attention = parameters.get("attention_factor")
    if attention is not None:
        made["mscale"] = _mscale(model, float(attention), float(factor))
    elif above and below:
        made |= {"mscale": float(above), "mscale_all_dim": float(below)}
    return made


def _mscale(model: Model, attention: float, factor: float) -> float:
    """The mscale that gives an attention factor."""
    if factor > 1:
        return (attention - 1) / (0.1 * math.log(factor))
    if attention != 1:
        raise CompatibilityError(
            f"{model.row.name} with rotary scaling 'yarn', factor {factor} and attention_factor {attention}: "
            "TensorRT-LLM has an attention factor only for factors above 1"
        )
    return 1.0
