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
    """One family: the Transformers model type, what its config needs beyond `_COMMON`, and how wide its weights are.

    Gemma scales its tied embeddings by the root of the hidden size; wide ones would make every token repeat itself.
    """

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    embedding_std: float = 0.12


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
    "gemma": Architecture("gemma", {"head_dim": 16, "tie_word_embeddings": True}, embedding_std=0.03),
    "gemma2": Architecture("gemma2", {"head_dim": 16, "sliding_window": 32, "tie_word_embeddings": True,
                                      "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
                           embedding_std=0.03),
    "gemma3": Architecture("gemma3_text", {"head_dim": 16, "sliding_window": 32, "tie_word_embeddings": True,
                                           "layer_types": ["sliding_attention", "full_attention"] * 2,
                                           "num_hidden_layers": 4}, embedding_std=0.03),
    "phi3": Architecture("phi3", {"original_max_position_embeddings": 512}),
    "phi": Architecture("phi", {"num_key_value_heads": 4}),
    "mixtral": Architecture("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": Architecture("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                                            "decoder_sparse_step": 1, "head_dim": 16, "mlp_only_layers": []}),
}  # fmt: skip

# Run by the embedded engine too, but outside what the compressor knows.
MORE_ARCHITECTURES: dict[str, Architecture] = {
    "gpt_oss": Architecture("gpt_oss", {"head_dim": 16, "sliding_window": 32, "num_local_experts": 4,
                                        "num_experts_per_tok": 2, "num_hidden_layers": 2,
                                        "layer_types": ["sliding_attention", "full_attention"],
                                        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "granite": Architecture("granite", {"attention_multiplier": 0.1, "residual_multiplier": 0.8}),
    "olmo2": Architecture("olmo2"),
    "starcoder2": Architecture("starcoder2", {"sliding_window": 48}),
}  # fmt: skip

# Known to the converter only.
CONVERTED_ARCHITECTURES: dict[str, Architecture] = {"qwen2_moe": Architecture("qwen2_moe")}


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
    """Write a random checkpoint of architecture `name` (a key of the tables above) to `path` and return it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = (ARCHITECTURES | MORE_ARCHITECTURES | CONVERTED_ARCHITECTURES)[name]
    settings = _COMMON | architecture.config | (overrides or {})
    config = AutoConfig.for_model(architecture.model_type, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Wider than the usual 0.02, so that greedy outputs of a random model do not collapse to one token.
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.12)
            else:  # norms and biases: away from their neutral values, so that a forgotten one shows
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.get_input_embeddings().weight.normal_(0.0, architecture.embedding_std)
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
