"""The shape of a tree of drafted tokens in a step: where each token stands, and which others it sees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True, slots=True)
class Tree:
    """The last known token and those drafted behind it, k + 1 in all.

    `depths` says how far behind the known token each stands; `sees` [k + 1, k + 1] which of them each (rows) sees:
    those on its way and itself.
    """

    depths: tuple[int, ...]
    sees: torch.Tensor


@lru_cache(maxsize=64)
def tree_of(parents: tuple[int, ...]) -> Tree:
    """The tree whose drafted tokens have these parents (see `Draft`)."""
    depths, sees = [0], torch.eye(len(parents) + 1, dtype=torch.bool)
    for row, parent in enumerate(parents, start=1):
        depths.append(depths[parent + 1] + 1)
        sees[row] |= sees[parent + 1]
    return Tree(tuple(depths), sees)
