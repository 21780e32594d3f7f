"""What an exported draft of EAGLE-3 proposes, computed as the runtimes compute it, from its tensors alone.

Every place of a sequence at once, which no runtime needs. The first step reads the captured layers through `fc`, each
later one the draft's own hidden state before its last norm; embeddings and hidden states are normalized apart and stand
side by side (`Eagle3DecoderLayer`, see `eagle3_draft`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Seen:
    """What the target computed over one sequence.

    `hidden` is [tokens, hidden] after the last norm, `captured` the outputs of the captured layers side by side.
    """

    hidden: Tensor
    captured: Tensor | None


def look(model: Any, ids: Tensor, captured: tuple[int, ...] | None) -> Seen:
    """Run the target over `ids`, [tokens]."""
    outputs: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            outputs[layer] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = [model.model.layers[layer].register_forward_hook(keep(layer)) for layer in captured or ()]
    try:
        hidden = model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    finally:
        for handle in handles:
            handle.remove()
    joined = torch.cat([outputs[layer][0] for layer in captured], dim=-1) if captured else None
    return Seen(hidden, joined)


@dataclass(frozen=True, slots=True, kw_only=True)
class EagleDraft:
    """A draft's tensors under its exporter's names, and the numbers that they do not say.

    `embedding` and `head` are the target's; a draft of a reduced vocabulary has a head of its own. `rotary` gives
    cosines and sines for positions [1, tokens].
    """

    tensors: _Tensors
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    embedding: Tensor
    head: Tensor
    rotary: Any

    def norm(self, name: str, state: Tensor) -> Tensor:
        """RMS norm in float32."""
        wide = state.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.tensors[f"{name}.weight"] * scaled.to(state.dtype)

    def linear(self, name: str, state: Tensor) -> Tensor:
        """A product without bias."""
        return functional.linear(state, self.tensors[f"{name}.weight"])


def eagle_logits(draft: EagleDraft, captured: Tensor, ids: Tensor, steps: int) -> list[Tensor]:
    """The logits of each step, [roots, draft vocabulary] each, for every root position of a sequence at once.

    Step k of root t reads the token t + 1 + k at position t + k: what it would read if all drafts before were right. It
    attends to the first steps of all roots up to t, and to the earlier steps of its own root.

    Args:
        draft: the draft.
        captured: [tokens, layers x hidden].
        ids: the tokens, [tokens]; there are tokens - steps roots.
        steps: how many tokens ahead.
    """
    roots = len(ids) - steps
    state = draft.linear("fc", captured[:roots])
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(draft.num_layers)]
    found = []
    for step in range(steps):
        embeds = functional.embedding(ids[1 + step : 1 + step + roots], draft.embedding)
        positions = torch.arange(step, step + roots, device=ids.device)[None]
        for layer in range(draft.num_layers):
            state = _layer(draft, layer, state, embeds, positions, kept[layer])
        head = draft.tensors.get("lm_head.weight", draft.head)
        found.append(functional.linear(draft.norm("norm", state), head))
    return found


def _layer(
    draft: EagleDraft, layer: int, state: Tensor, embeds: Tensor, positions: Tensor, kept: list[tuple[Tensor, Tensor]]
) -> Tensor:
    name = f"layers.{layer}."
    if layer == 0:
        read = torch.cat(
            (draft.norm(f"{name}input_layernorm", embeds), draft.norm(f"{name}hidden_norm", state)), dim=-1
        )
    else:
        read = draft.norm(f"{name}hidden_norm", state)
    state = state + draft.linear(f"{name}self_attn.o_proj", _attend(draft, name, read, positions, kept))
    read = draft.norm(f"{name}post_attention_layernorm", state)
    gated = functional.silu(draft.linear(f"{name}mlp.gate_proj", read)) * draft.linear(f"{name}mlp.up_proj", read)
    return state + draft.linear(f"{name}mlp.down_proj", gated)


def _attend(draft: EagleDraft, name: str, read: Tensor, positions: Tensor, kept: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention of one step; its keys and values join `kept`, [heads, roots, head size] each."""
    cos, sin = (part[0].to(read.dtype) for part in draft.rotary(read[None], positions))
    shaped = {
        letter: draft.linear(f"{name}self_attn.{letter}_proj", read)
        .view(len(read), heads, draft.head_dim)
        .transpose(0, 1)
        for letter, heads in (("q", draft.num_heads), ("k", draft.num_kv_heads), ("v", draft.num_kv_heads))
    }
    query, key = (shaped[letter] * cos + _half_turned(shaped[letter]) * sin for letter in ("q", "k"))
    repeat = draft.num_heads // draft.num_kv_heads
    kept.append((key.repeat_interleave(repeat, 0), shaped["v"].repeat_interleave(repeat, 0)))
    (first_keys, first_values), later = kept[0], kept[1:]
    roots = len(read)
    hidden = torch.ones(roots, roots, dtype=torch.bool, device=read.device).triu(1)
    scores = [(query @ first_keys.transpose(1, 2)).masked_fill(hidden, float("-inf"))]
    scores += [(query * keys).sum(-1, keepdim=True) for keys, _ in later]
    shares = torch.softmax(torch.cat(scores, dim=-1).float() * draft.head_dim**-0.5, dim=-1).to(read.dtype)
    mixed = shares[..., :roots] @ first_values
    for place, (_, values) in enumerate(later):
        mixed = mixed + shares[..., roots + place, None] * values
    return mixed.transpose(0, 1).reshape(roots, -1)


def _half_turned(state: Tensor) -> Tensor:
    """The second half of the last dimension, negated, before the first."""
    first, second = state.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
