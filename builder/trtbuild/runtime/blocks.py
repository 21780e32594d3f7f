"""Which blocks of the KV cache are free, in use or reusable; knows nothing of tensors.

A block in use is held by one or more sequences. A freed block whose tokens were all computed keeps its contents and
can be taken again by a sequence with the same prefix until somebody needs the room: least recently used goes first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice

_USED, _EMPTY, _CACHED = 0, 1, 2


def block_hashes(token_ids: Sequence[int], block_size: int, known: list[bytes], count: int) -> list[bytes]:
    """Extend `known` in place to the content hashes of the first `count` full blocks, and return it.

    Each hash is a SHA-256 over the parent's hash and the block's own tokens, so equal hashes mean equal prefixes.
    """
    for index in range(len(known), count):
        parent = known[index - 1] if index else b""
        tokens = array("q", token_ids[index * block_size : (index + 1) * block_size])
        known.append(hashlib.sha256(parent + tokens.tobytes()).digest())
    return known


class BlockManager:
    """Hands out blocks by number and remembers what the free ones still hold."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.evicted = 0
        self._holders = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # One byte a block, so that `bytes.find` looks for a run of free ones.
        self._state = bytearray([_EMPTY]) * num_blocks
        # Free blocks in the order in which they are to be taken: empty ones, then cached ones, oldest first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that can be taken, cached ones included."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Free blocks whose contents can still be reused."""
        return self._state.count(_CACHED)

    def holders(self, block: int) -> int:
        """How many sequences hold `block`."""
        return self._holders[block]

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks that hold the longest known prefix of `hashes`; they are not taken yet."""
        found = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def num_held(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` some sequence holds already: sharing these takes nothing from the free ones."""
        return sum(self._holders[block] > 0 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Hold known blocks once more."""
        for block in blocks:
            if not self._holders[block]:
                del self._free[block]
                self._state[block] = _USED
            self._holders[block] += 1

    def take(self, count: int, *, after: int | None = None) -> list[int]:
        """`count` fresh blocks (the caller checked `num_free`), in one run where that is possible, following `after`.

        A sequence in one run is read as a view of the pool. To get a run, eviction may pick any block of the older half
        of the free ones; without such a run the least recently used ones are taken.
        """
        if count == 0:
            return []
        blocks = _find_run(self._state, count, after)
        if blocks is None:
            older = list(islice(self._free, max(count, len(self._free) // 2)))
            blocks = self._run_among(older, count, after) or sorted(older[:count])
        for block in blocks:
            self._forget(block)
            del self._free[block]
            self._state[block] = _USED
            self._holders[block] = 1
        return blocks

    def publish(self, block: int, digest: bytes) -> None:
        """Say that a held block now has the contents of `digest`; the first block of a digest keeps it."""
        if digest not in self._block_of and self._hash_of[block] is None:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def release(self, blocks: Sequence[int]) -> None:
        """Give a sequence's blocks back. The last ones are evicted first: a prefix is worth more than what follows."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            cached = self._hash_of[block] is not None
            self._state[block] = _CACHED if cached else _EMPTY
            self._free[block] = None
            if not cached:
                self._free.move_to_end(block, last=False)

    def _forget(self, block: int) -> None:
        digest = self._hash_of[block]
        if digest is not None:
            del self._block_of[digest]
            self._hash_of[block] = None
            self.evicted += 1

    def _run_among(self, candidates: list[int], count: int, after: int | None) -> list[int] | None:
        if count == 1:  # nothing is gained by passing over the oldest, except by following on
            return [after + 1] if after is not None and after + 1 in candidates else None
        marks = bytearray(self.num_blocks)
        for block in candidates:
            marks[block] = _EMPTY
        return _find_run(marks, count, after)


def _find_run(marks: bytearray, count: int, after: int | None) -> list[int] | None:
    """`count` blocks in a row that are marked as empty: those that follow `after`, else the first such run."""
    run = bytes([_EMPTY]) * count
    follows = after is not None and marks.startswith(run, after + 1)
    start = after + 1 if after is not None and follows else marks.find(run)
    return None if start < 0 else list(range(start, start + count))
