"""What a choice of formats by measurement needs of the host's memory: the whole model, and gradients through it."""

from __future__ import annotations

from trtbuild.compress_memory import show_bytes
from trtbuild.errors import Problem
from trtbuild.model import ModelFacts

_IMPORTED = 900_000_000  # Python with torch, transformers and ModelOpt, its solver and autograd
_FLOAT = 4
_SCRATCH = 24  # bytes for each element of the largest matrix, as AWQ's search takes them
_STATES = 24  # hidden states of a decoder layer that are held for the backward pass, and formats beside each other
_LOGITS = 5  # copies of the logits of one sample: theirs, in float32, their gradient, and the softmax


def smallest_for_choice(facts: ModelFacts, length: int) -> int:
    """The peak in bytes on a CPU for calibration samples of `length` tokens; an upper bound fitted to SmolLM2-135M."""
    embeddings = facts.vocab_size * facts.hidden_size
    weights = _FLOAT * (facts.parameters + embeddings)  # the gradient of the embeddings starts the others
    states = _FLOAT * length * facts.hidden_size * (facts.num_layers + _STATES)
    return (
        _IMPORTED
        + weights
        + states
        + _FLOAT * _LOGITS * length * facts.vocab_size
        + _SCRATCH * facts.largest_layer.matrix
    )


def too_small_for_choice(limit: int, least: int) -> Problem:
    """The sentence for a limit under what the whole model takes."""
    message = f"{show_bytes(limit)}: format: auto holds the whole model in memory, which takes {show_bytes(least)}"
    return Problem("compress.max_memory", message, f"use at least {show_bytes(least)}, or name compress.overrides")
