"""``config.json`` of the TensorRT-LLM checkpoint.

Keys: NVIDIA/TensorRT-LLM, PretrainedConfig of tensorrt_llm/models/modeling_utils.py @34a267279384 and the config class
of each family (`Architecture.source`). Keys that a class does not declare become attributes of it, with a warning.
"""

from __future__ import annotations

from typing import Any

from trtbuild.convert.formats import Coding
from trtbuild.convert.model import Model, codings, modules, unquantized
from trtbuild.convert.rotary import rope
from trtbuild.errors import CompatibilityError

LAYERS = "quant_cfg.json"
_RENORMALIZE, _PLAIN_SOFTMAX = 1, 0  # MoeConfig.ExpertScaleNormalizationMode
_LONG_CONTEXT = 128_000  # Phi3Config reads the factors of long contexts from this length on


def checkpoint_config(model: Model) -> dict[str, Any]:
    """The whole config.

    Raises:
        CompatibilityError: the model has a kind of rotary embedding, layer pattern or excluded modules that this
            format cannot express.
    """
    shape, facts, config = model.shape, model.source.facts, model.source.config
    base, scaling = rope(model)
    common: dict[str, Any] = {
        "producer": {"name": "trtbuild"},
        "architecture": model.row.name,
        "dtype": model.dtype,
        "logits_dtype": "float32",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_size": shape.head_dim,
        "intermediate_size": facts.intermediate_size,
        "hidden_act": _activation(model),
        "norm_epsilon": config["rms_norm_eps"],
        "max_position_embeddings": facts.context_length,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": base,
        "rotary_scaling": scaling,
        "qk_layernorm": model.row.qk_norm,
        # The table is divided over ranks along the vocabulary, as the head is.
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "share_embedding_table": model.tied and shape.pp == 1,
        "mapping": {
            "world_size": shape.tp * shape.pp, "tp_size": shape.tp, "pp_size": shape.pp, "cp_size": 1,
            "moe_tp_size": shape.tp, "moe_ep_size": 1,
        },
        "quantization": model.quantized.section(_excluded(model)),
    }  # fmt: skip
    family = {"llama": _llama, "qwen": _qwen, "gemma": _gemma, "phi3": _phi3}[model.row.family]
    return common | family(model)


def _activation(model: Model) -> str:
    """Gate and up as one matrix need the gated name; as two, the name of the function alone."""
    config = model.source.config
    name = str(config.get("hidden_activation") or config.get("hidden_act"))
    if model.row.experts is None and not model.row.fused:
        return name
    if name != "silu":
        raise CompatibilityError(f"{model.row.name} with the activation {name}: TensorRT-LLM has only silu for it")
    return "swiglu"


def _excluded(model: Model) -> list[str]:
    """Names and patterns of modules without codes; giving any replaces quantize.py's own list, so it is repeated."""
    if model.quantized.coding.format is None:
        return []
    stages = range(model.shape.pp)
    excluded = set().union(*(unquantized(model, stage) for stage in stages))
    if any(excluded & modules(model, stage) != unquantized(model, stage) for stage in stages):
        raise CompatibilityError(
            f"{model.source.directory}: pipeline stages exclude different layers from quantization, but TensorRT-LLM "
            "names layers by their place in the stage",
            "use pp_size 1, or exclude the same projections in every layer",
        )
    head = model.source.tensors.get("lm_head.weight")
    coded_head = head is not None and head.dtype in {"F8_E4M3", "U8", "I8"}
    fixed = [] if coded_head else ["lm_head"]
    return [*fixed, "*vocab_embedding", "*router", "*shared_expert_gate", *sorted(excluded)]


def layer_config(model: Model) -> dict[str, Any] | None:
    """``quant_cfg.json``: how each layer is quantized, where they differ; else None.

    Layout: NVIDIA/TensorRT-LLM, LayerQuantConfig of tensorrt_llm/models/modeling_utils.py @34a267279384, and ModelOpt
    0.47, modelopt/torch/export/model_config_export.py.

    Raises:
        CompatibilityError: pipeline stages are quantized differently.
    """
    if model.quantized.layers is None:
        return None
    layers: dict[str, Coding] = {}
    for stage in range(model.shape.pp):
        found = codings(model, stage)
        for name in modules(model, stage) | set(found):
            if layers.setdefault(name, found.get(name, Coding())) != found.get(name, Coding()):
                raise CompatibilityError(
                    f"{model.source.directory}: {name} is quantized differently in different pipeline stages, but "
                    "TensorRT-LLM names layers by their place in the stage",
                    "use pp_size 1, or quantize the same places of every stage alike",
                )
    named = {name: coding.section() for name, coding in sorted(layers.items()) if coding.format is not None}
    return model.quantized.section([]) | {"quantized_layers": named}


def _moe(model: Model, *, renormalize: bool) -> dict[str, Any]:
    config, shape = model.source.config, model.shape
    return {
        "num_experts": shape.experts,
        "top_k": config.get("num_experts_per_tok", 0) if shape.experts else 0,
        "normalization_mode": _RENORMALIZE if renormalize else _PLAIN_SOFTMAX,
    }


def _llama(model: Model) -> dict[str, Any]:
    made: dict[str, Any] = {"attn_bias": model.bias("attention"), "mlp_bias": model.bias("mlp"), "residual_mlp": False}
    if model.row.experts is not None:
        made["moe"] = _moe(model, renormalize=True)
    return made


def _qwen(model: Model) -> dict[str, Any]:
    config = model.source.config
    if not model.row.qkv_bias and model.bias("attention"):
        raise CompatibilityError(f"{model.row.name} with attention_bias: TensorRT-LLM builds it without biases")
    made: dict[str, Any] = {
        "attn_bias": model.row.qkv_bias,
        "mlp_bias": False,
        "qwen_type": model.row.model_type,
        "seq_length": config.get("seq_length", 8192),
        "use_logn_attn": False,
    }
    if model.row.experts is not None:
        _require_experts_everywhere(model)
        made |= {
            "moe_intermediate_size": model.shape.mlp,
            "moe_shared_expert_intermediate_size": model.shape.shared_mlp,
            "moe": _moe(model, renormalize=bool(config.get("norm_topk_prob", False))),
        }
    return made


def _require_experts_everywhere(model: Model) -> None:
    config = model.source.config
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise CompatibilityError(
            f"{model.row.name} with layers without experts: TensorRT-LLM makes every layer a mixture of experts",
            "choose the runtime trtllm or embedded for this model",
        )


def _gemma(model: Model) -> dict[str, Any]:
    config = model.source.config
    made: dict[str, Any] = {
        "attn_bias": model.bias("attention"),
        "mlp_bias": False,
        "inter_layernorms": True,
        "query_pre_attn_scalar": config["query_pre_attn_scalar"],
        "final_logit_softcapping": config.get("final_logit_softcapping"),
    }
    if model.row.model_type == "gemma2":
        return made | {"attn_logit_softcapping": config.get("attn_logit_softcapping")}
    local = (config.get("rope_parameters") or {}).get("sliding_attention", {})
    pattern = _window_pattern(model)
    return made | {
        "rope_local_base_freq": local.get("rope_theta", config.get("rope_local_base_freq", 10000.0)),
        "sliding_window": config.get("sliding_window"),
        # The key's name changed on the way to 1.2; each release reads its own.
        "sliding_window_pattern": pattern,
        "_sliding_window_pattern": pattern,
    }


def _window_pattern(model: Model) -> int:
    """Every how many layers one attends to everything."""
    config, layers = model.source.config, model.shape.layers
    types = config.get("layer_types")
    if types is None:
        return int(config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6)))
    for pattern in range(1, layers + 2):
        if types == ["sliding_attention" if (index + 1) % pattern else "full_attention" for index in range(layers)]:
            return pattern
    raise CompatibilityError(
        f"{model.row.name}: its layers with and without a sliding window follow no regular pattern",
        "TensorRT-LLM wants one full-attention layer after a fixed number of sliding ones",
    )


def _phi3(model: Model) -> dict[str, Any]:
    config, facts = model.source.config, model.source.facts
    if model.bias("attention"):
        raise CompatibilityError(f"{model.row.name} with attention_bias: TensorRT-LLM builds it without biases")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    made: dict[str, Any] = {"rotary_pct": partial}
    if "short_factor" not in rope:
        return made
    if facts.context_length < _LONG_CONTEXT:
        raise CompatibilityError(
            f"{model.row.name} with rotary factors for a context of {facts.context_length}: TensorRT-LLM uses them "
            f"from {_LONG_CONTEXT} tokens on"
        )
    original = config.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    return made | {
        "position_embedding_type": "long_rope",
        "original_max_position_embeddings": original,
        "longrope_scaling_short_factors": rope["short_factor"],
        "longrope_scaling_long_factors": rope["long_factor"],
    }
