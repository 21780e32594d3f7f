"""The draft of EAGLE-3: a decoder layer that reads the model's captured layers and the token that came after them.

Li et al., "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test",
https://arxiv.org/abs/2503.01840. Files and arithmetic are those of ModelOpt's export (nvidia-modelopt 0.47,
modelopt/torch/speculative/plugins/modeling_eagle.py and modelopt/torch/export/plugins/hf_spec_export.py), which
TensorRT-LLM reads too; a layer is called `layers.N`, or `midlayer` in packages for older releases.

Legend: T tokens of a step, H hidden size of the draft, n captured layers of the model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from trtbuild.errors import ArtifactError, CompatibilityError
from trtbuild.runtime.attention import Options, PagedLayer, Step
from trtbuild.runtime.checkpoint_files import read_json
from trtbuild.runtime.drafts.tensors import Taker, read_tensors
from trtbuild.runtime.kv_cache import LayerCache

_MIDLAYER = re.compile(r"^midlayer\.(\d+\.)?")
_AGAIN = "use a draft that was trained for this model"
# Keys of eagle_config that change the arithmetic, and that ModelOpt's own training never sets.
_OTHER_ARITHMETIC = ("norm_before_fc", "eh_proj_before_attn")


@dataclass(frozen=True, slots=True)
class _Layer:
    """The tensors of one decoder layer; the first one reads embedding and hidden state side by side."""

    place: PagedLayer
    embedding_norm: torch.Tensor
    hidden_norm: torch.Tensor | None
    mlp_norm: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


class Eagle3Model:
    """A loaded draft with its paged cache."""

    def __init__(self, directory: Path, model: nn.Module, slots: int) -> None:
        """The draft in `directory` for `model`, with a cache of `slots` tokens.

        Raises:
            ArtifactError: a file or tensor is missing, damaged or of another shape.
            CompatibilityError: the draft is for another model, or of a kind that is not computed here.
        """
        target: Any = model
        config, tensors = read_json(directory / "config.json"), read_tensors(directory)
        tensors = {
            _MIDLAYER.sub(lambda found: f"layers.{found[1] or '0.'}", name): one for name, one in tensors.items()
        }
        eagle = config.get("eagle_config") or {}
        _refuse(directory, config, eagle, target.config)
        embedding = target.get_input_embeddings()
        take = Taker(directory, tensors, embedding.weight)
        self.hidden_size = int(config["hidden_size"])
        self.captured = tuple(int(layer) for layer in eagle["eagle_aux_hidden_state_layer_ids"])
        self._vocab_size = int(target.config.vocab_size)
        self._eps = float(config.get("rms_norm_eps", 1e-6))
        self._context = [Step()]
        self._heads = int(config["num_attention_heads"])
        self._shared = int(config.get("num_key_value_heads") or self._heads)
        self._head_dim = int(config.get("head_dim") or self.hidden_size // self._heads)
        self._rotary = LlamaRotaryEmbedding(LlamaConfig.from_dict(_rotary_config(config))).to(embedding.weight.device)
        read = int(config.get("target_hidden_size") or target.config.hidden_size)
        self._fc = take("fc.weight", self.hidden_size, read * len(self.captured))
        self._norm = take("norm.weight", self.hidden_size)
        self._embed = _embedding(embedding, tensors, take, self._vocab_size, self.hidden_size)
        self._head, self._ids = self._vocabulary(config, tensors, take, target)
        inner = int(config["intermediate_size"])
        self._layers = [self._layer(index, take, inner, slots) for index in range(int(config["num_hidden_layers"]))]

    def features(self, states: torch.Tensor) -> torch.Tensor:
        """What the first draft of a place reads [T, H], from the model's captured layers [T, n x their size]."""
        return functional.linear(states, self._fc)

    def run(self, token_ids: list[int], features: torch.Tensor, positions: list[int], step: Step) -> torch.Tensor:
        """The draft's hidden states [T, H]: what the next place reads in place of the captured layers.

        Args:
            token_ids: the tokens that came after each place.
            features: [T, H], of each place.
            positions: of the places in their texts.
            step: where the places lie in the cache.
        """
        self._context[0] = step
        device = features.device
        embedded = self._embed(torch.tensor(token_ids, device=device))
        rotary = self._rotary(features[None], torch.tensor(positions, device=device)[None])
        hidden = features
        for layer in self._layers:
            if layer.hidden_norm is None:
                read = self._rms(hidden, layer.embedding_norm)
            else:
                pair = self._rms(embedded, layer.embedding_norm), self._rms(hidden, layer.hidden_norm)
                read = torch.cat(pair, dim=-1)
            hidden = hidden + functional.linear(self._attend(layer, read, rotary), layer.o)
            read = self._rms(hidden, layer.mlp_norm)
            gated = functional.silu(functional.linear(read, layer.gate)) * functional.linear(read, layer.up)
            hidden = hidden + functional.linear(gated, layer.down)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, V] of hidden states [B, H], in the model's vocabulary: tokens that the draft does not know never come."""
        logits = functional.linear(self._rms(hidden, self._norm), self._head)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self._ids is None:
            return logits
        every = logits.new_full((logits.shape[0], self._vocab_size), float("-inf"))
        return every.index_copy_(1, self._ids, logits)

    def release(self) -> None:
        """Give the memory back."""
        self._layers = []

    def _attend(self, layer: _Layer, read: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        query, key, value = (
            functional.linear(read, weight).view(1, read.shape[0], -1, self._head_dim).transpose(1, 2)
            for weight in (layer.q, layer.k, layer.v)
        )
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        return layer.place.attend(query[0], key[0], value[0], Options(scaling=self._head_dim**-0.5)).flatten(1)

    def _rms(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._eps)).to(hidden.dtype)

    def _layer(self, index: int, take: Taker, inner: int, slots: int) -> _Layer:
        name, hidden, first = f"layers.{index}.", self.hidden_size, index == 0
        size, shared, read = self._heads * self._head_dim, self._shared * self._head_dim, hidden * (2 if first else 1)
        attention, mlp = f"{name}self_attn.", f"{name}mlp."
        place = PagedLayer(index, self._context)
        pool = (self._shared, slots, self._head_dim)
        place.cache = LayerCache(pool, pool, dtype=self._fc.dtype, device=self._fc.device)
        return _Layer(
            place=place,
            embedding_norm=take(f"{name}input_layernorm.weight", hidden),
            hidden_norm=take(f"{name}hidden_norm.weight", hidden) if first else None,
            mlp_norm=take(f"{name}post_attention_layernorm.weight", hidden),
            q=take(f"{attention}q_proj.weight", size, read),
            k=take(f"{attention}k_proj.weight", shared, read),
            v=take(f"{attention}v_proj.weight", shared, read),
            o=take(f"{attention}o_proj.weight", hidden, size),
            gate=take(f"{mlp}gate_proj.weight", inner, hidden),
            up=take(f"{mlp}up_proj.weight", inner, hidden),
            down=take(f"{mlp}down_proj.weight", hidden, inner),
        )

    def _vocabulary(
        self, config: dict[str, Any], tensors: dict[str, torch.Tensor], take: Taker, target: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The head's matrix, and the model's number of each of the draft's tokens where it knows fewer."""
        count = int(config.get("draft_vocab_size") or self._vocab_size)
        if "lm_head.weight" not in tensors:
            return target.get_output_embeddings().weight, None
        head = take("lm_head.weight", count, self.hidden_size)
        if count == self._vocab_size:
            return head, None
        ids = take("d2t", count) + torch.arange(count, device=head.device)
        if bool(((ids < 0) | (ids >= self._vocab_size)).any()):
            raise ArtifactError("d2t of the draft names tokens that the model does not have", _AGAIN)
        return head, ids


def _refuse(directory: Path, config: dict[str, Any], eagle: dict[str, Any], target: Any) -> None:
    """Refuse a draft for another model, and one whose arithmetic is another."""
    wrong = [
        f"has {key} in its eagle_config, which is not computed here" for key in _OTHER_ARITHMETIC if eagle.get(key)
    ]
    if config.get("fc_norm"):
        wrong.append("has fc_norm, which is not computed here")
    if (eagle.get("parallel_draft_step") or 1) > 1:
        wrong.append("drafts several tokens at once (parallel_draft_step), which is not computed here")
    if config.get("attention_bias") or config.get("mlp_bias"):
        wrong.append("has biases, which is not computed here")
    if not eagle.get("eagle_aux_hidden_state_layer_ids"):
        wrong.append("does not say which layers of the model it reads (eagle_aux_hidden_state_layer_ids)")
    if config.get("vocab_size") != target.vocab_size:
        wrong.append(f"has a vocabulary of {config.get('vocab_size')}, and the model's has {target.vocab_size}")
    read = config.get("target_hidden_size") or config.get("hidden_size")
    if read != target.hidden_size:
        wrong.append(f"reads hidden states of {read}, and the model's have {target.hidden_size}")
    if wrong:
        raise CompatibilityError(f"{directory}: the draft {wrong[0]}", _AGAIN)


def _rotary_config(config: dict[str, Any]) -> dict[str, Any]:
    """What the rotary positions of the draft depend on, as Transformers reads it."""
    names = ("hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings", "rope_theta", "rope_scaling")
    return {name: config[name] for name in names if config.get(name) is not None}


def _embedding(module: Any, tensors: dict[str, torch.Tensor], take: Taker, vocab_size: int, hidden: int) -> Any:
    """The draft's own embedding where it has one, else the model's."""
    if "embed_tokens.weight" not in tensors:
        return module
    weight = take("embed_tokens.weight", vocab_size, hidden)
    return lambda token_ids: functional.embedding(token_ids, weight)
