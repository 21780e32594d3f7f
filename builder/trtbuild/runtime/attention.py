"""Attention over the paged cache, in the place of Transformers' own attention functions.

Legend: T tokens of a step (all sequences in a row), Hq query heads, H key/value heads, G = Hq / H, D head size,
L tokens that one sequence has in the cache, W sliding window.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from trtbuild.errors import CompatibilityError
from trtbuild.runtime.drafts.tree import Tree
from trtbuild.runtime.kv_cache import LayerCache

ATTENTION_NAME = "trtbuild_paged"
# The attribute by which an attention module finds its `PagedLayer`.
LAYER_ATTRIBUTE = "trtbuild_paged_layer"
# The arguments that are obeyed, and those that Transformers' decoders pass along and that change nothing here.
_KNOWN = frozenset(
    {"scaling", "sliding_window", "softcap", "s_aux", "is_causal",
     "dropout", "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
     "past_key_values", "position_embeddings", "output_router_logits"}
)  # fmt: skip


@dataclass(slots=True)
class Segment:
    """The tokens of one sequence in a step: rows `start`..`end`, positions `first`..`length` of the sequence.

    `base` is the first slot where the blocks lie in one run; otherwise `slots` [L] names them. With a `tree` the places
    in the cache are no positions: each token stands as far behind `first` as it is deep in the tree.
    """

    start: int
    end: int
    first: int
    length: int
    base: int
    slots: torch.Tensor | None
    tree: Tree | None = None
    _masks: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Tokens of this sequence in the step."""
        return self.end - self.start

    def visible(self, window: int | None) -> tuple[int, slice | torch.Tensor]:
        """The first position that any of the tokens sees, and the slots from there on."""
        low = 0 if window is None else max(0, self.first - window + 1)
        if self.slots is None:
            return low, slice(self.base + low, self.base + self.length)
        return low, self.slots[low:] if low else self.slots

    def mask(self, low: int, window: int | None, device: torch.device) -> torch.Tensor | None:
        """Which position (columns, from `low`) each token (rows) sees: [count, length - low]; None: all see all."""
        if self.count == 1:
            return None
        key = (low, window or 0)
        if key not in self._masks:
            own = range(self.first, self.length) if self.tree is None else [self.first + at for at in self.tree.depths]
            rows = torch.tensor(own, device=device)[:, None]
            columns = torch.tensor([*range(low, self.first), *own], device=device)[None, :]
            seen = columns <= rows
            if self.tree is not None:
                seen[:, self.first - low :] = self.tree.sees.to(device)
            if window is not None:
                seen &= columns > rows - window
            self._masks[key] = seen
        return self._masks[key]


@dataclass(slots=True)
class Step:
    """What the attention layers need to know of the running step; `slots` [T] says where each token is stored."""

    segments: list[Segment] = field(default_factory=list)
    slots: torch.Tensor | None = None
    # Set while a model is examined: the layers then note how they are called and attend to nothing.
    probing: bool = False


@dataclass(slots=True)
class LayerCall:
    """How one attention module called: the shapes of its keys and values, and the meaning of its arguments."""

    query_heads: int
    key_shape: tuple[int, int]
    value_shape: tuple[int, int]
    window: int | None
    softcap: float | None
    has_sinks: bool
    strange: tuple[str, ...]


class PagedLayer:
    """One attention module's place in the cache."""

    def __init__(self, index: int, context: list[Step]) -> None:
        self.index = index
        self.cache: LayerCache | None = None
        self.calls: list[LayerCall] = []
        # One cell, shared by all layers of an engine: the runner puts the running step there.
        self._context = context

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options) -> torch.Tensor:
        """The attention output [T, Hq, D] of query [Hq, T, D] and the step's own key and value [H, T, D]."""
        step = self._context[0]
        if step.probing:
            self.calls.append(options.describe(query, key, value))
            return query.new_zeros(query.shape[1], query.shape[0], value.shape[2])
        cache = self.cache
        if cache is None or step.slots is None:
            raise CompatibilityError(f"attention layer {self.index} ran outside a step of the engine")
        cache.write(key, value, step.slots)
        options.scaling *= cache.key_scale
        if query.dtype.itemsize >= 4:  # once for all sequences; narrow types would lose bits
            query, options.scaling = query * options.scaling, 1.0
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
        groups = out.view(out.shape[0], key.shape[0], -1, out.shape[2])
        grouped = query.unflatten(0, (key.shape[0], -1))
        for segment in step.segments:
            low, slots = segment.visible(options.window)
            keys, values = cache.read(slots)
            if segment.count == 1:
                _decode(groups[segment.start], grouped[:, :, segment.start], keys, values, options)
            else:
                mask = segment.mask(low, options.window, query.device)
                result = _prefill(grouped[:, :, segment.start : segment.end], keys, values, mask, options)
                groups[segment.start : segment.end] = result.permute(2, 0, 1, 3)
        if cache.value_scale != 1.0:
            out *= cache.value_scale
        return out


@dataclass(slots=True)
class Options:
    """The arguments of one attention call. `sinks` [Hq]: a logit per head that takes probability and gives nothing."""

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    strange: tuple[str, ...] = ()

    def describe(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> LayerCall:
        """How the layer called, with the shapes of its tensors."""
        return LayerCall(
            query_heads=query.shape[0],
            key_shape=(key.shape[0], key.shape[2]),
            value_shape=(value.shape[0], value.shape[2]),
            window=self.window,
            softcap=self.softcap,
            has_sinks=self.sinks is not None,
            strange=self.strange,
        )


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface: query [1, Hq, T, D], key and value [1, H, T, D] to ([1, T, Hq, D], None).

    Raises:
        CompatibilityError: the module was not prepared by the engine.
    """
    layer: PagedLayer | None = getattr(module, LAYER_ATTRIBUTE, None)
    if layer is None:
        raise CompatibilityError(f"{type(module).__name__} is not an attention layer that the embedded engine prepared")
    strange = [name for name, given in kwargs.items() if given is not None and name not in _KNOWN]
    if attention_mask is not None:
        strange.append("attention_mask")
    if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
        strange.append("is_causal=False")
    scaling = kwargs.get("scaling")
    options = Options(
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=kwargs.get("sliding_window") or None,
        softcap=kwargs.get("softcap") or None,
        sinks=kwargs.get("s_aux"),
        strange=tuple(strange),
    )
    return layer.attend(query[0], key[0], value[0], options)[None], None


def register() -> None:
    """Make the engine's attention known to Transformers under `ATTENTION_NAME`.

    No mask function is registered for that name, so Transformers builds no mask
    (transformers:src/transformers/masking_utils.py `_preprocess_mask_arguments` @5.14.1).
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, paged_attention)


def _decode(out: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, options: Options) -> None:
    """One token: the G query heads of a group are the queries of that group's keys; all [H, ., D]."""
    if options.softcap is None and options.sinks is None:
        # With the group as the rows of one head, nothing is expanded and nothing is masked.
        seen = functional.scaled_dot_product_attention(query[None], keys[None], values[None], scale=options.scaling)
        out.copy_(seen[0])
        return
    weights = _weights(torch.bmm(query, keys.transpose(1, 2)), None, options)
    torch.bmm(weights.to(values.dtype), values, out=out)


def _prefill(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, options: Options
) -> torch.Tensor:
    """Several tokens: [H, G, count, D] of query [H, G, count, D] and keys and values [H, L, D]."""
    heads, groups, count, size = query.shape
    if options.softcap is None and options.sinks is None:
        causal = count == keys.shape[1] and (options.window is None or count <= options.window)
        return functional.scaled_dot_product_attention(
            query,
            keys[:, None].expand(-1, groups, -1, -1),
            values[:, None].expand(-1, groups, -1, -1),
            attn_mask=None if causal else mask,
            is_causal=causal,
            scale=options.scaling,
        )
    scores = torch.bmm(query.reshape(heads, groups * count, size), keys.transpose(1, 2))
    weights = _weights(scores.view(heads, groups, count, -1), mask, options)
    return torch.bmm(weights.to(values.dtype).flatten(1, 2), values).view(heads, groups, count, -1)


def _weights(scores: torch.Tensor, mask: torch.Tensor | None, options: Options) -> torch.Tensor:
    """The attention probabilities of raw `scores` [H, G, L] or [H, G, count, L]; changes `scores`."""
    if options.scaling != 1.0:
        scores *= options.scaling
    if options.softcap is not None:
        scores = scores.div_(options.softcap).tanh_().mul_(options.softcap)
    if mask is not None:
        scores = scores.masked_fill_(~mask, float("-inf"))
    wide = torch.promote_types(scores.dtype, torch.float32)
    if options.sinks is None:
        return torch.softmax(scores, dim=-1, dtype=wide)
    sinks = options.sinks.view(scores.shape[0], scores.shape[1], *[1] * (scores.dim() - 2))
    with_sink = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
    return torch.softmax(with_sink, dim=-1, dtype=wide)[..., :-1]
