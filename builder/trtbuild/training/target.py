"""The target with heads or a draft beside it, as ModelOpt converts it; only these learn.

ModelOpt 0.47: `modelopt.torch.speculative.convert` and its plugins for Transformers, hf_medusa.py and hf_eagle.py.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trtbuild.planned_draft import EAGLE_CONFIG
from trtbuild.runtime.checkpoint import load_model
from trtbuild.training.request import Request


def load_target(request: Request, device: torch.device) -> Any:
    """The checkpoint's model: float32 on a CPU, else bf16; quantized layers have their own numerics.

    Raises:
        ArtifactError, CompatibilityError: see `load_model`.
    """
    return load_model(
        request.checkpoint,
        device=device,
        dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
        weights="expanded",
        attn_implementation="sdpa",
        trust_remote_code=request.trust_remote_code,
    ).model


def convert(model: Any, request: Request, draft_tokens: Sequence[int] | None) -> nn.Module:
    """Put heads or a draft beside `model` and return them, in float32, the only ones that learn.

    Args:
        model: the target; becomes ModelOpt's class for the method.
        request: the sizes.
        draft_tokens: the target's token for each of a reduced draft vocabulary, ascending; None for all.
    """
    import modelopt.torch.speculative as mtsp

    torch.manual_seed(request.seed)
    with contextlib.redirect_stdout(io.StringIO()):  # where ModelOpt says which parts it has found
        if request.method == "medusa":
            sizes = {"medusa_num_heads": request.num_heads, "medusa_num_layers": request.num_layers}
            mtsp.convert(model, [("medusa", sizes)])
        else:
            mtsp.convert(model, [("eagle", _eagle_config(model, request, draft_tokens))])
    learning = _medusa(model) if request.method == "medusa" else _eagle(model, draft_tokens)
    model.requires_grad_(requires_grad=False)
    return learning.float().requires_grad_(requires_grad=True)


def _medusa(model: Any) -> nn.Module:
    """Heads that begin as the target's own head: their layers begin with a weight of zero."""
    heads: nn.ModuleList = model.medusa_heads
    with torch.no_grad():
        for head in heads:
            head[-1].weight.copy_(model.lm_head.weight)
    return heads


def _eagle_config(model: Any, request: Request, draft_tokens: Sequence[int] | None) -> dict[str, Any]:
    """A draft whose layers are like the target's, and which is trained without torch.compile, that a CPU may lack."""
    config = model.config
    heads = config.num_attention_heads
    architecture = EAGLE_CONFIG | {
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "position_embedding_type": "rope",
        "rope_scaling": dict(config.rope_parameters),
        "num_hidden_layers": request.num_layers,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "initializer_range": 0.02,
        "rms_norm_eps": config.rms_norm_eps,
        "mlp_bias": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eagle_aux_hidden_state_layer_ids": list(request.captured or ()),
        "has_lm_head": False,
    }
    if draft_tokens is not None:
        architecture["draft_vocab_size"] = len(draft_tokens)
    return {
        "eagle_architecture_config": architecture,
        "eagle_ttt_steps": request.ttt_steps,
        "eagle_use_torch_compile": False,
        "eagle_export_rope_scaling": {},
    }


def _eagle(model: Any, draft_tokens: Sequence[int] | None) -> nn.Module:
    draft: nn.Module = model.eagle_module
    if draft_tokens is not None:
        chosen = torch.tensor(draft_tokens, device=model.device)
        with torch.no_grad():
            draft.d2t.copy_(chosen - torch.arange(len(chosen), device=model.device))
            draft.lm_head.weight.copy_(model.lm_head.weight[chosen])
    _norm_once(draft)
    return draft


def _norm_once(draft: Any) -> None:
    """Let the first layer normalize hidden states with `hidden_norm` alone, as every runtime does.

    ModelOpt 0.47 leaves the decoder layer's own input norm in front of it (a comment in modeling_eagle.py calls that
    norm disabled), so that what it trains is not what is served once that norm's weight is no longer 1. TensorRT-LLM:
    `Eagle3DecoderLayer.forward`, see `eagle3_draft`.
    """
    layer, given = draft.layers[0], {}

    def remember(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        given["hidden"] = args[0]

    def join(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        embeds = layer.input_layernorm(draft._input_embeds)  # noqa: SLF001
        draft._input_embeds = None  # noqa: SLF001
        kwargs["hidden_states"] = torch.cat((embeds, layer.hidden_norm(given.pop("hidden"))), dim=-1)
        return args, kwargs

    layer.register_forward_pre_hook(remember)
    layer.self_attn._forward_pre_hooks.clear()  # noqa: SLF001
    layer.self_attn._forward_pre_hooks_with_kwargs.clear()  # noqa: SLF001
    layer.self_attn.register_forward_pre_hook(join, with_kwargs=True)
