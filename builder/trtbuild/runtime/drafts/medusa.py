"""Medusa: heads beside the model's own guess the tokens behind the next one, from its last hidden state.

Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads",
https://arxiv.org/abs/2401.10774. Two forms of files: heads alone (``medusa_lm_head.safetensors`` with
``{head}.{layer}.linear.weight`` and ``.bias``, ``{head}.{layers}.weight``; config keys `medusa_num_heads` and
`medusa_num_layers`: NVIDIA/TensorRT-LLM tensorrt_llm/models/medusa/weight.py @27712aa7), and ModelOpt's export of a
converted model (``medusa_heads.{head}...`` beside the model's own tensors, config key `medusa`: nvidia-modelopt 0.47,
modelopt/torch/speculative/plugins/hf_medusa.py). A head's layer adds SiLU(linear(x)) to its input.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from trtbuild.errors import ArtifactError, CompatibilityError
from trtbuild.runtime.checkpoint_files import read_json
from trtbuild.runtime.drafts.draft import Ask, Draft
from trtbuild.runtime.drafts.growing import Growing, grow
from trtbuild.runtime.drafts.tensors import Taker, read_tensors
from trtbuild.runtime.scheduler import Chunk
from trtbuild.runtime.sequence import Sequence
from trtbuild.runtime.step_logits import StepLogits

_PREFIX = "medusa_heads."


@dataclass(frozen=True, slots=True)
class Head:
    """One head: (weight [H, H], bias [H]) of its layers, and its own matrix of the vocabulary [V, H]."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    vocabulary: torch.Tensor

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, V] of hidden states [B, H]."""
        for weight, bias in self.layers:
            hidden = hidden + functional.silu(functional.linear(hidden, weight, bias))
        return functional.linear(hidden, self.vocabulary)


def read_heads(directory: Path, like: torch.Tensor, vocab_size: int) -> list[Head]:
    """The heads in `directory` for a model whose matrix of the vocabulary is `like` [V, H].

    Raises:
        ArtifactError: a file or tensor is missing, damaged or of another shape.
        CompatibilityError: the heads are for another model.
    """
    config, tensors = read_json(directory / "config.json"), read_tensors(directory, _PREFIX)
    said = config.get("medusa")
    nested = said if isinstance(said, dict) else {}
    heads = config.get("medusa_num_heads", nested.get("num_medusa_heads"))
    layers = config.get("medusa_num_layers", nested.get("num_medusa_layers"))
    if not (isinstance(heads, int) and isinstance(layers, int) and heads > 0 and layers >= 0):
        raise ArtifactError(f"{directory}: config.json does not say how many heads there are", "train them again")
    hidden = like.shape[1]
    last = tensors.get(f"0.{layers}.weight")
    if last is not None and last.shape != (vocab_size, hidden):
        raise CompatibilityError(
            f"{directory}: the heads are for {last.shape[0]} tokens and hidden states of {last.shape[1]}, and the "
            f"model has {vocab_size} and {hidden}",
            "use heads that were trained for this model",
        )
    return heads_of(Taker(directory, tensors, like), heads, layers, (vocab_size, hidden))


def heads_of(take: Taker, heads: int, layers: int, sizes: tuple[int, int]) -> list[Head]:
    """The heads, each of so many layers, whose tensors `take` gives; `sizes` are (V, H).

    Raises:
        ArtifactError: a tensor is missing or of another shape.
    """
    vocab_size, hidden = sizes
    return [
        Head(
            [
                (take(f"{head}.{layer}.linear.weight", hidden, hidden), take(f"{head}.{layer}.linear.bias", hidden))
                for layer in range(layers)
            ],
            take(f"{head}.{layers}.weight", vocab_size, hidden),
        )
        for head in range(heads)
    ]


class MedusaDrafter:
    """Drafts one token with each head, or with `choices` a tree of each head's likeliest ones."""

    def __init__(self, heads: list[Head], vocab_size: int, choices: tuple[tuple[int, ...], ...] | None = None) -> None:
        self._heads, self._vocab_size = heads, vocab_size
        # Short paths first, so that the beginning of the list is a tree too.
        self._paths = None if choices is None else sorted(choices, key=lambda path: (len(path), path))
        # The hidden state [H] that each request's last token was chosen from.
        self._hidden: dict[int, torch.Tensor] = {}

    def propose(self, asks: Many[Ask]) -> list[Draft | None]:
        """Each head's token, as many heads as tokens are asked for."""
        if self._paths is not None:
            return [self._tree(ask, self._paths) for ask in asks]
        made = [Growing(ask) for ask in asks]
        known = [one for one in made if one.ask.sequence.request_id in self._hidden]
        for head in self._heads:
            going = [one for one in known if one.wants_more]
            if not going:
                break
            hidden = torch.stack([self._hidden[one.ask.sequence.request_id] for one in going])
            logits = head.logits(hidden)
            grow(going, logits.to(torch.promote_types(logits.dtype, torch.float32)), self._vocab_size)
        return [one.draft() for one in made]

    def _tree(self, ask: Ask, paths: list[tuple[int, ...]]) -> Draft | None:
        """The paths that are short enough, each token the head's choice of that rank. Ranks are not drawn."""
        hidden = self._hidden.get(ask.sequence.request_id)
        kept = [path for path in paths if len(path) <= ask.count][: ask.room]
        if hidden is None or not kept:
            return None
        widest = max(map(max, kept)) + 1
        ranked = [head.logits(hidden[None])[0].topk(widest).indices.tolist() for head in self._heads[: len(kept[-1])]]
        places = {path: place for place, path in enumerate(kept)}
        parents = [places.get(path[:-1], -1) for path in kept]
        return Draft([ranked[len(path) - 1][path[-1]] for path in kept], parents=parents)

    def observe(self, chunks: Many[Chunk], step: StepLogits) -> None:
        """Keep the hidden state that each sequence's newest token was chosen from."""
        if step.states is None:
            return
        for chunk, rows in zip(chunks, step.rows, strict=True):
            if chunk.is_last and not chunk.sequence.finished:
                last = chunk.draft.path[-1] if chunk.draft is not None and chunk.draft.path else -1
                row = rows.stop - chunk.num_drafted + last
                self._hidden[chunk.sequence.request_id] = step.states.last[row]

    def forget(self, sequence: Sequence) -> None:
        """Let go of a request's hidden state."""
        self._hidden.pop(sequence.request_id, None)

    def release(self) -> None:
        """Give the heads' memory back."""
        self._heads = []
        self._hidden.clear()
