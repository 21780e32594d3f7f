"""Medusa heads without their model: what their files hold, and which trees of drafts they can propose.

A directory of heads is ``config.json`` (`medusa_num_heads`, `medusa_num_layers`) and ``medusa_lm_head.safetensors``
with ``{head}.{layer}.linear.weight``, ``{head}.{layer}.linear.bias`` and ``{head}.{layers}.weight``, the head's own
matrix of the vocabulary. NVIDIA/TensorRT-LLM reads these names: tensorrt_llm/models/medusa/weight.py @27712aa7
(`load_medusa_hf`), examples/medusa/convert_checkpoint.py @063e02f7 (the keys of the config). A head's layer adds
SiLU(linear(x)) to its input (tensorrt_llm/models/medusa/model.py @02499765).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trtbuild.checkpoint_files import CheckpointFiles
from trtbuild.errors import ArtifactError
from trtbuild.model import ModelFacts, read_tensors

MEDUSA_FILE = "medusa_lm_head.safetensors"
HEADS_KEY, LAYERS_KEY = "medusa_num_heads", "medusa_num_layers"
_TYPES = ("BF16", "F16", "F32")
_AGAIN = "give a directory of Medusa heads in safetensors, or train them (speculative.train)"


@dataclass(frozen=True, slots=True, kw_only=True)
class MedusaHeads:
    """Heads as their files describe them; `dtype` in safetensors spelling."""

    num_heads: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    dtype: str = "BF16"


def read_medusa(files: CheckpointFiles) -> MedusaHeads:
    """The heads in `files`, every tensor of which is there with the shape that the others imply.

    Raises:
        ArtifactError: a file is missing or damaged, a number is none, a tensor is missing or of another shape or type.
        CompatibilityError: the weights are pickles.
    """
    config = json.loads(files.read("config.json"))
    counts = [config.get(name) for name in (HEADS_KEY, LAYERS_KEY)]
    if any(isinstance(count, bool) or not isinstance(count, int) or count < 1 for count in counts):
        raise ArtifactError(f"{files.where}: config.json has no positive {HEADS_KEY} and {LAYERS_KEY}", _AGAIN)
    tensors = {tensor.name: tensor for tensor in read_tensors(files)}
    last = tensors.get(f"0.{counts[1]}.weight")
    if last is None or len(last.shape) != 2:
        raise ArtifactError(f"{files.where}: lacks the matrix 0.{counts[1]}.weight of the first head", _AGAIN)
    vocabulary, hidden = last.shape
    heads = MedusaHeads(
        num_heads=counts[0], num_layers=counts[1], hidden_size=hidden, vocab_size=vocabulary, dtype=last.dtype
    )
    wrong = []
    for name, shape in tensor_shapes(heads).items():
        have = tensors.get(name)
        if have is None:
            wrong.append(f"lacks the tensor {name}")
        elif have.shape != shape or have.dtype not in _TYPES:
            wrong.append(f"{name} is {have.dtype} {list(have.shape)}, not a float of {list(shape)}")
    if wrong:
        raise ArtifactError(f"{files.where}: {'; '.join(wrong[:4])}", _AGAIN)
    return heads


def is_medusa(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes heads without their model."""
    return HEADS_KEY in config and "mapping" not in config


def tensor_shapes(heads: MedusaHeads) -> dict[str, tuple[int, ...]]:
    """Every tensor of the heads' file with its shape."""
    hidden = heads.hidden_size
    made: dict[str, tuple[int, ...]] = {}
    for head in range(heads.num_heads):
        for layer in range(heads.num_layers):
            made[f"{head}.{layer}.linear.weight"] = (hidden, hidden)
            made[f"{head}.{layer}.linear.bias"] = (hidden,)
        made[f"{head}.{heads.num_layers}.weight"] = (heads.vocab_size, hidden)
    return made


def medusa_misfits(heads: MedusaHeads, model: ModelFacts) -> list[str]:
    """Why the heads are not for this model."""
    sizes = (
        ("read hidden states of", "hidden_size", heads.hidden_size, model.hidden_size),
        ("are for a vocabulary of", "vocab_size", heads.vocab_size, model.vocab_size),
    )
    return [
        f"{what} {theirs}, and the model's {name} is {ours}" for what, name, theirs, ours in sizes if theirs != ours
    ]


def one_path(heads: int) -> tuple[tuple[int, ...], ...]:
    """The tree that follows every head's likeliest token alone."""
    return tuple((0,) * depth for depth in range(1, heads + 1))


def tree_problems(choices: Sequence[Sequence[int]], heads: int) -> list[str]:
    """Why these paths are no tree of drafts that so many heads can propose."""
    known = {tuple(path) for path in choices}
    found = []
    if not choices or not all(choices):
        found.append("holds an empty path")
    if len(known) < len(choices):
        found.append("names a path twice")
    for path in sorted(known):
        if len(path) > heads:
            found.append(f"{list(path)} is {len(path)} tokens long, and there are {heads} heads")
        elif len(path) > 1 and path[:-1] not in known:
            found.append(f"{list(path)} goes on from {list(path[:-1])}, which is no path: this is no tree")
    return found[:4]
