"""Write what was trained in the formats that are loaded: TensorRT-LLM's of Medusa heads and of EAGLE-3 drafts.

Sources: `medusa_draft` and `eagle3_draft`. Decoder layers are called `layers.N`, as ModelOpt and vLLM do. The norm
before a later layer's attention is `hidden_norm` to TensorRT-LLM and `input_layernorm` to others: it is written twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trtbuild.errors import ToolError
from trtbuild.manifest import canonical_json, write_atomic
from trtbuild.medusa_draft import HEADS_KEY, LAYERS_KEY, MEDUSA_FILE
from trtbuild.planned_draft import EAGLE_CONFIG
from trtbuild.trained_for import RECORD, TrainedFor, record_json, tokenizer_digest
from trtbuild.training.request import Request

EAGLE_FILE = "model.safetensors"
_LATER_NORM = re.compile(r"^(layers\.[1-9]\d*\.)input_layernorm")
_READABLE = 0o644


def served_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What learned, under the names that are loaded."""
    later = {_LATER_NORM.sub(r"\1hidden_norm", name): one for name, one in tensors.items() if _LATER_NORM.match(name)}
    return {**tensors, **later}


def exported(learning: nn.Module) -> dict[str, Tensor]:
    """The tensors as they are written: bf16, and the numbers of tokens as they are.

    Raises:
        ToolError: a weight is no longer a number.
    """
    tensors = {
        name: tensor.detach().to(torch.bfloat16) if tensor.is_floating_point() else tensor.detach()
        for name, tensor in served_names(learning.state_dict()).items()
    }
    damaged = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if damaged:
        raise ToolError(f"{damaged[0]} holds NaN or infinite values", "lower speculative.train.learning_rate")
    return tensors


def write(tensors: dict[str, Tensor], model: Any, request: Request) -> None:
    """Write the draft's directory: weights, config and the record of its target."""
    output = request.output
    output.mkdir(parents=True, exist_ok=True)
    medusa = request.method == "medusa"
    kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(kept, output / (MEDUSA_FILE if medusa else EAGLE_FILE), metadata={"format": "pt"})
    config = _medusa_config(model, request) if medusa else _eagle_config(model, request, tensors)
    write_atomic(output / "config.json", canonical_json(config))
    write_atomic(output / RECORD, canonical_json(record_json(trained_for(model, request))))
    for path in output.iterdir():
        path.chmod(_READABLE)  # safetensors writes files for their owner only


def trained_for(model: Any, request: Request) -> TrainedFor:
    """The record of the target."""
    return TrainedFor(
        method=request.method,
        weights=request.weights,
        tokenizer=tokenizer_digest(Path(request.checkpoint)),
        hidden_size=model.config.hidden_size,
        vocab_size=model.config.vocab_size,
        num_layers=model.config.num_hidden_layers,
        captured=request.captured,
        format=request.format,
    )


def _medusa_config(model: Any, request: Request) -> dict[str, Any]:
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        HEADS_KEY: request.num_heads,
        LAYERS_KEY: request.num_layers,
        "hidden_size": model.config.hidden_size,
        "vocab_size": model.config.vocab_size,
        "torch_dtype": "bfloat16",
    }


def _eagle_config(model: Any, request: Request, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The keys that ModelOpt's exporter writes; rotary parameters as Transformers 4 and TensorRT-LLM read them."""
    draft, target = model.eagle_config, model.config
    rotary = {name: value for name, value in dict(target.rope_parameters).items() if name != "rope_theta"}
    plain = rotary.get("rope_type", "default") == "default"
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    return {name: getattr(draft, name) for name in (*names, "head_dim", "rms_norm_eps", "initializer_range")} | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": target.bos_token_id,
        "eos_token_id": target.eos_token_id,
        "pad_token_id": target.pad_token_id,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": len(tensors["d2t"]) if "d2t" in tensors else target.vocab_size,
        "max_position_embeddings": target.max_position_embeddings,
        "rope_theta": target.rope_parameters["rope_theta"],
        "rope_scaling": None if plain else rotary,
        "eagle_config": EAGLE_CONFIG | {"eagle_aux_hidden_state_layer_ids": list(request.captured or ())},
    }
