"""The target's own greedy answers to the prompts: what a draft must learn to foresee.

Prompts of like length run together in fixed groups; every finished group is in the journal, so that a killed run goes
on behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trtbuild.compress.journal import Journal

_GROUP = {"cpu": 8, "cuda": 32}


@dataclass(frozen=True, slots=True)
class Answered:
    """One prompt with the target's answer, as token ids; the answer has one token at least."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and answer."""
        return self.prompt + self.answer


def answer_all(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    end_ids: Sequence[int],
    most: int,
    journal: Journal,
    advance: Callable[[int], None],
) -> tuple[list[Answered], int]:
    """Every prompt with its answer, in the order of `prompts`, and how many an earlier run had found.

    Args:
        model: a causal language model of Transformers.
        prompts: token ids.
        end_ids: tokens that end an answer; they belong to it.
        most: tokens of an answer.
        journal: of this training.
        advance: told of each number of prompts that are answered.
    """
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), prompts[index]))
    size = _GROUP[model.device.type]
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    known = len(journal.parts)
    found: dict[int, tuple[int, ...]] = {}
    for number, group in enumerate(groups):
        if number >= known:
            answers = _answer_group(model, [prompts[index] for index in group], end_ids, most)
            journal.finish({"answers": answers})
        found.update(zip(group, map(tuple, journal.parts[number]["answers"]), strict=True))
        advance(len(group))
    resumed = sum(len(group) for group in groups[:known])
    return [Answered(prompt, found[index]) for index, prompt in enumerate(prompts)], resumed


def _answer_group(model: Any, prompts: Sequence[tuple[int, ...]], end_ids: Sequence[int], most: int) -> list[list[int]]:
    """Greedy answers to prompts that run together, padded on the left; `generate` keeps no gradients."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    made = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=most,
        eos_token_id=list(end_ids) or None,
        pad_token_id=end_ids[0] if end_ids else 0,
    )
    return [_until_end(row, end_ids) for row in made[:, longest:].tolist()]


def _until_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """An answer without the padding behind its end."""
    ends = (place for place, token in enumerate(ids) if token in end_ids)
    return ids[: next(ends, len(ids) - 1) + 1]
