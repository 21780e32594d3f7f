"""Where the tokens of a sequence lie in the pool of slots, for a step over some of them."""

from __future__ import annotations

import torch

from trtbuild.runtime.attention import Segment
from trtbuild.runtime.drafts.tree import Tree
from trtbuild.runtime.sequence import Sequence


def slots_of(sequence: Sequence, start: int, end: int, block_size: int) -> range | list[int]:
    """The slots of positions `start`..`end`."""
    if sequence.base is not None:
        return range(sequence.base + start, sequence.base + end)
    table = sequence.block_table
    return [table[position // block_size] * block_size + position % block_size for position in range(start, end)]


def segment_of(
    sequence: Sequence,
    start: int,
    end: int,
    row: int,
    *,
    block_size: int,
    device: torch.device,
    tree: Tree | None = None,
) -> Segment:
    """Positions `start`..`end` as the attention sees them; the first one's row in the step is `row`."""
    slots = None
    if sequence.base is None:
        if sequence.slots is None:
            every = slots_of(sequence, 0, len(sequence.block_table) * block_size, block_size)
            sequence.slots = torch.tensor(list(every), dtype=torch.long, device=device)
        slots = sequence.slots[:end]
    return Segment(row, row + end - start, start, end, sequence.base or 0, slots, tree)
