"""Tiny random checkpoints of many architectures, made on the spot: no downloads, a second each."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 320
_TEXT = [
    "The quick brown fox jumps over the lazy dog. A model answers a question as a stream of tokens.",
    "One recipe takes a checkpoint to a deployment that is proven to work, and says how it was measured.",
]


@dataclass(frozen=True)
class Architecture:
    """One family: the Transformers model type and what its config needs beyond `_COMMON`."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)


_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama"),
    "llama-tied": Architecture("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mistral": Architecture("mistral", {"sliding_window": 48}),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", {"head_dim": 32}),
    "gemma": Architecture("gemma", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": Architecture("gemma2", {"head_dim": 16, "sliding_window": 32, "tie_word_embeddings": True,
                                      "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
    "gemma3": Architecture("gemma3_text", {"head_dim": 16, "sliding_window": 32, "tie_word_embeddings": True,
                                           "layer_types": ["sliding_attention", "full_attention"] * 2,
                                           "num_hidden_layers": 4}),
    "phi3": Architecture("phi3", {"original_max_position_embeddings": 512}),
    "phi": Architecture("phi", {"num_key_value_heads": 4}),
    "mixtral": Architecture("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": Architecture("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                                            "decoder_sparse_step": 1, "head_dim": 16, "mlp_only_layers": []}),
}  # fmt: skip


def save_checkpoint(
    path: Path,
    name: str = "llama",
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    overrides: dict[str, Any] | None = None,
    tokenizer: bool = True,
    max_shard_size: str = "50GB",
) -> Path:
    """Write a random checkpoint of architecture `name` (a key of `ARCHITECTURES`) to `path` and return it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = ARCHITECTURES[name]
    settings = _COMMON | architecture.config | (overrides or {})
    config = AutoConfig.for_model(architecture.model_type, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Wider than the usual 0.02, so that greedy outputs of a random model do not collapse to one token.
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.12)
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=max_shard_size)
    (path / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}) + "\n", encoding="utf-8"
    )
    if tokenizer:
        save_tokenizer(path)
    return path


def save_tokenizer(path: Path) -> None:
    """Write a byte-level BPE tokenizer of 320 tokens with a chat template: emoji split into several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(path)
