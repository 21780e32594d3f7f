"""Which tokens of which sequences run in the next step, and who holds which blocks."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from trtbuild.runtime.config import EngineConfig
from trtbuild.runtime.drafts.draft import Draft
from trtbuild.runtime.drafts.tree import Tree, tree_of
from trtbuild.runtime.sequence import Sequence
from trtbuild.runtime.tables import BlockTables


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions `start`..`end` of one sequence, to be computed in the next step; those of `draft` are the last."""

    sequence: Sequence
    start: int
    end: int
    # Whether the step computes the sequence's last token, so that the next one can be chosen.
    is_last: bool
    draft: Draft | None = None

    @property
    def is_known(self) -> bool:
        """Whether the host knows the last token of the chunk; else it is the newest step's choice."""
        return not self.is_last or self.sequence.unknown == 0

    @property
    def num_drafted(self) -> int:
        """How many of the tokens are drafted."""
        return 0 if self.draft is None else len(self.draft.tokens)

    @property
    def tree(self) -> Tree | None:
        """The shape of a draft that is a tree."""
        return tree_of(tuple(self.draft.parents)) if self.draft is not None and self.draft.parents else None

    @property
    def token_ids(self) -> list[int]:
        """The tokens at these positions."""
        known = self.sequence.token_ids[self.start : self.end]
        return known if self.draft is None else known + self.draft.tokens


class Scheduler:
    """In-flight batching: every step takes one token of each decoding sequence and fills up with prompt chunks.

    GUARANTEED_NO_EVICT admits a sequence only with room for all the tokens it may ever have. MAX_UTILIZATION admits it
    with room for what it has; when the room runs out, the sequence admitted last gives its blocks back and is computed
    again later (its published blocks may still be there then).
    """

    def __init__(self, config: EngineConfig, num_blocks: int) -> None:
        self.tables = BlockTables(config.kv_cache, num_blocks)
        self.blocks = self.tables.blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.reused_blocks = 0
        self.missed_blocks = 0
        self._config = config
        self._block_size = config.kv_cache.tokens_per_block
        self._reserves = config.capacity_scheduler_policy == "GUARANTEED_NO_EVICT"

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    @property
    def decoding(self) -> list[Sequence]:
        """The sequences of which only the last token is left to compute, and more than one is still to come."""
        return [
            one
            for one in self.running
            if one.num_output > 0 and len(one.token_ids) == one.num_computed + 1 and one.tokens_left > 1
        ]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; the caller has checked that it can run alone."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or cancelled sequence and give its blocks back."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.tables.release(sequence)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, in no more than `max_num_tokens` tokens together."""
        chunks: dict[Sequence, Chunk] = {}
        budget = self._config.max_num_tokens
        preempted = self.preemptions
        # Decoding sequences first: a long prompt must not hold up those that already answer.
        for sequence in sorted(self.running, key=lambda one: len(one.token_ids) - one.num_computed > 1):
            # Without blocks it was pre-empted just now.
            if sequence.block_table and not sequence.is_spent:
                budget -= self._schedule_one(sequence, budget, chunks)
                if sequence.draft is not None:
                    budget -= self._schedule_draft(sequence, budget, chunks)
        if self.preemptions == preempted:
            while self.waiting and budget > 0 and len(self.running) < self._config.max_batch_size:
                sequence = self.waiting[0]
                if not self._fits_budget(sequence, budget) or not self._admit(sequence):
                    break
                self.running.append(self.waiting.popleft())
                budget -= self._schedule_one(sequence, budget, chunks)
        return list(chunks.values())

    def commit(self, chunks: list[Chunk]) -> None:
        """Note that `chunks` are computed, or launched: whatever is launched later finds them computed.

        Of drafts nothing is, until they are verified.
        """
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.end - chunk.num_drafted

    def publish(self, chunks: list[Chunk]) -> None:
        """Offer the full blocks of `chunks`, whose tokens are all known now, for reuse; take those of drafts back."""
        for chunk in chunks:
            # A draft's chunk may end in tokens that were refused.
            sequence = chunk.sequence
            self.tables.publish(sequence, min(chunk.end, sequence.num_computed))
            if chunk.draft is not None:
                self.tables.trim(sequence, sequence.final_length if self._reserves else len(sequence.token_ids))

    def _schedule_one(self, sequence: Sequence, budget: int, chunks: dict[Sequence, Chunk]) -> int:
        """Schedule what fits of `sequence`; returns the tokens taken, less those of sequences pre-empted for it."""
        length = len(sequence.token_ids)
        if (
            length == sequence.num_computed + 1
            and budget > 0
            and length <= len(sequence.block_table) * self._block_size
        ):
            # The common case, a decoding sequence with room in its last block.
            chunks[sequence] = Chunk(sequence, length - 1, length, is_last=True)
            return 1
        end = self._chunk_end(sequence, budget)
        if end <= sequence.num_computed:
            return 0
        given_back = 0
        missing = self.tables.blocks_for(end) - len(sequence.block_table)
        while missing > self.blocks.num_free:
            victim = self.running[-1]
            dropped = chunks.pop(victim, None)
            given_back += dropped.end - dropped.start if dropped else 0
            self._preempt(victim)
            if victim is sequence:
                return -given_back
        if missing > 0:
            self.tables.extend(sequence, missing)
        chunks[sequence] = Chunk(sequence, sequence.num_computed, end, is_last=end == length)
        return end - sequence.num_computed - given_back

    def _schedule_draft(self, sequence: Sequence, budget: int, chunks: dict[Sequence, Chunk]) -> int:
        """Put a sequence's draft behind its last token; returns the tokens taken. A draft never takes others' room."""
        draft, sequence.draft = sequence.draft, None
        chunk = chunks.get(sequence)
        if draft is None or chunk is None or not chunk.is_last:
            return 0
        free = max(0, self.blocks.num_free - len(self.running))
        room = (len(sequence.block_table) + free) * self._block_size - chunk.end
        count = min(len(draft.tokens), budget, room)
        if count <= 0:
            return 0
        end = chunk.end + count
        missing = self.tables.blocks_for(end) - len(sequence.block_table)
        if missing > 0:
            self.tables.extend(sequence, missing)
        chunks[sequence] = Chunk(sequence, chunk.start, end, is_last=True, draft=draft.cut(count))
        return count

    def _chunk_end(self, sequence: Sequence, budget: int) -> int:
        length = len(sequence.token_ids)
        if not self._fits_budget(sequence, budget):
            return sequence.num_computed
        room = min(budget, sequence.chunk_limit or budget)
        return min(length, sequence.num_computed + room)

    def _fits_budget(self, sequence: Sequence, budget: int) -> bool:
        """Without chunked prefill a prompt runs in one step; what was pre-empted may be longer than any step."""
        if self._config.enable_chunked_prefill:
            return budget > 0
        remaining = len(sequence.token_ids) - sequence.num_computed
        return budget >= min(remaining, self._config.max_num_tokens)

    def _admit(self, sequence: Sequence) -> bool:
        """Hold the blocks that `sequence` starts with, if they are there."""
        shared = self.tables.known_prefix(sequence)
        wanted = self.tables.blocks_for(sequence.final_length if self._reserves else len(sequence.token_ids))
        fresh = wanted - len(shared)
        taken_from_free = fresh + len(shared) - self.blocks.num_held(shared)
        # Without reservations every running sequence may soon want one more block; leave it those.
        spare = 0 if self._reserves else len(self.running)
        if taken_from_free + spare > self.blocks.num_free:
            return False
        # The last token is always computed: its logits choose the next one.
        full = (len(sequence.token_ids) - 1) // self._block_size
        sequence.reused_blocks += len(shared)
        sequence.missed_blocks += full - len(shared)
        self.reused_blocks += len(shared)
        self.missed_blocks += full - len(shared)
        self.tables.start(sequence, shared, fresh)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        self.tables.release(sequence)
        sequence.draft = None
        self.waiting.appendleft(sequence)
