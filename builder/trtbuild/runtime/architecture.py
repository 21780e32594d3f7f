"""Which models the engine runs, found out before and after the weights are loaded; all others are refused by name."""

from __future__ import annotations

from typing import Any

import torch

from trtbuild.errors import CompatibilityError
from trtbuild.runtime.attention import LAYER_ATTRIBUTE, LayerCall, PagedLayer, Step

_HINT = "serve it with runtime.kind: trtllm, or choose a decoder with ordinary attention"
_KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})
_STATE_SPACE = (
    "ssm_cfg",
    "ssm_state_size",
    "state_size",
    "mamba_d_state",
    "mamba_num_heads",
    "mamba_expand",
    "ssm_cfg",
)
_LINEAR = ("linear_num_value_heads", "linear_attn_config", "rwkv_version", "attention_hidden_size", "lru_width")


def check_config(config: Any) -> None:
    """Refuse what the model's configuration already shows to be out of reach.

    Raises:
        CompatibilityError: naming the architecture and the reason.
    """
    for found, what in (
        (_any(config, "is_encoder_decoder", "add_cross_attention", "cross_attention_layers"), "cross-attention"),
        (_any(config, "kv_lora_rank"), "multi-head latent attention (MLA)"),
        (_any(config, "num_kv_shared_layers"), "layers that share their keys and values"),
        (_any(config, *_STATE_SPACE), "state-space layers"),
        (_any(config, *_LINEAR), "linear-attention or recurrent layers"),
        (_any(config, "vision_config", "audio_config"), "inputs other than text"),
        (_any(config, "alibi", "alibi_config"), "position biases (ALiBi)"),
        (_any(config, "use_bidirectional_attention"), "attention that looks ahead"),
    ):
        if found:
            raise _refusal(config, f"has {what}, which the embedded engine does not run")
    strange = sorted(set(layer_types(config)) - _KNOWN_LAYERS)
    if strange:
        raise _refusal(config, f"has layers of type {strange[0]!r}, which the embedded engine does not run")


def check_rope(config: Any, max_seq_len: int) -> None:
    """Refuse lengths at which the rotary factors would depend on the longest sequence of a batch.

    Raises:
        CompatibilityError: naming the limit and the remedy.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    groups = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    for group in groups:
        kind = group.get("rope_type", "default")
        if kind not in ("dynamic", "longrope"):
            continue
        original = group.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        limit = int(original or config.max_position_embeddings)
        if max_seq_len > limit:
            raise _refusal(
                config,
                f"has {kind} rotary positions, whose factors change beyond {limit} tokens, and max_seq_len is "
                f"{max_seq_len}",
                f"set runtime.max_seq_len to at most {limit}",
            )


def layer_types(config: Any) -> list[str]:
    """The kind of each layer as the configuration names them; empty where it does not."""
    named = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    return ["full_attention" if name == "attention" else str(name) for name in named]


def prepare(model: torch.nn.Module, context: list[Step]) -> list[PagedLayer]:
    """Give every module that carries a layer number a place for its cache, and return the places by number."""
    layers: dict[int, PagedLayer] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int):
            layer = layers.setdefault(index, PagedLayer(index, context))
            setattr(module, LAYER_ATTRIBUTE, layer)
    return [layers[index] for index in sorted(layers)]


def check_calls(config: Any, layers: list[PagedLayer]) -> list[tuple[PagedLayer, LayerCall]]:
    """The one call that each layer made while the model was examined.

    Raises:
        CompatibilityError: a layer did not call, called more than once, or asked for what the engine cannot do.
    """
    expected = config.num_hidden_layers
    called = [layer for layer in layers if layer.calls]
    if len(called) != expected or any(len(layer.calls) > 1 for layer in called):
        calls = sum(len(layer.calls) for layer in called)
        raise _refusal(
            config,
            f"called Transformers' attention interface {calls} times in {expected} layers; the embedded engine needs "
            "one call in each",
        )
    kinds = layer_types(config)
    result = []
    for layer in called:
        call = layer.calls[0]
        if call.strange:
            raise _refusal(config, f"passes {call.strange[0]} to its attention, which the embedded engine does not run")
        if call.query_heads % call.key_shape[0] or call.key_shape[0] != call.value_shape[0]:
            raise _refusal(
                config,
                f"has {call.query_heads} query, {call.key_shape[0]} key and {call.value_shape[0]} value heads in layer "
                f"{layer.index}; the embedded engine needs as many keys as values, and a multiple of them as queries",
            )
        if kinds and kinds[layer.index] == "sliding_attention" and call.window is None:
            raise _refusal(config, f"does not tell its attention the sliding window of layer {layer.index}")
        layer.calls = []
        result.append((layer, call))
    return result


def _any(config: Any, *names: str) -> bool:
    return any(getattr(config, name, None) for name in names)


def _refusal(config: Any, what: str, hint: str = _HINT) -> CompatibilityError:
    names = getattr(config, "architectures", None) or [config.model_type]
    return CompatibilityError(f"{names[0]} {what}", hint)
