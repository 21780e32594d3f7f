"""The block tables of sequences: how they grow, what they share, what of them others may reuse."""

from __future__ import annotations

from trtbuild.runtime.blocks import BlockManager, block_hashes
from trtbuild.runtime.config import KvCacheConfig
from trtbuild.runtime.sequence import Sequence


class BlockTables:
    """Gives sequences blocks of one pool and takes them back; `blocks` knows which are free."""

    def __init__(self, config: KvCacheConfig, num_blocks: int) -> None:
        self.blocks = BlockManager(num_blocks)
        self.block_size = config.tokens_per_block
        self._reuses = config.enable_block_reuse

    def blocks_for(self, tokens: int) -> int:
        """How many blocks `tokens` tokens take."""
        return -(-tokens // self.block_size)

    def known_prefix(self, sequence: Sequence) -> list[int]:
        """The blocks that hold the beginning of a sequence already; its last token is always computed."""
        if not self._reuses or sequence.wants_every_position:
            return []
        full = (len(sequence.token_ids) - 1) // self.block_size
        return self.blocks.lookup(block_hashes(sequence.token_ids, self.block_size, sequence.hashes, full)[:full])

    def start(self, sequence: Sequence, shared: list[int], fresh: int) -> None:
        """Give a sequence without blocks those that hold its beginning, and fresh ones."""
        self.blocks.share(shared)
        sequence.block_table = shared
        sequence.num_computed = len(shared) * self.block_size
        sequence.num_published = len(shared)
        self.extend(sequence, fresh)

    def extend(self, sequence: Sequence, count: int) -> None:
        """Give a sequence `count` more blocks; the caller has checked that they are there."""
        table = sequence.block_table
        table.extend(self.blocks.take(count, after=table[-1] if table else None))
        sequence.new_blocks += count
        run = all(block == table[0] + index for index, block in enumerate(table))
        sequence.base = table[0] * self.block_size if run else None
        sequence.table_version += 1
        sequence.slots = None

    def hold(self, sequence: Sequence, tokens: int) -> bool:
        """Give a sequence the blocks of its first `tokens` tokens, known ones included; whether they are there."""
        shared = [] if sequence.block_table else self.known_prefix(sequence)
        missing = self.blocks_for(tokens) - len(sequence.block_table) - len(shared)
        if missing + len(shared) - self.blocks.num_held(shared) > self.blocks.num_free:
            return False
        if not sequence.block_table:
            self.start(sequence, shared, missing)
        elif missing > 0:
            self.extend(sequence, missing)
        return True

    def trim(self, sequence: Sequence, tokens: int) -> None:
        """Take back the blocks behind those of a sequence's first `tokens` tokens."""
        table, kept = sequence.block_table, self.blocks_for(tokens)
        if len(table) > kept:
            self.blocks.release(table[kept:])
            del table[kept:]
            sequence.table_version += 1
            sequence.slots = None

    def publish(self, sequence: Sequence, tokens: int) -> None:
        """Offer the full blocks of a sequence's first `tokens` tokens, all computed, for reuse."""
        full = tokens // self.block_size
        # Without blocks the sequence was pre-empted or cancelled since.
        if not self._reuses or full <= sequence.num_published or not sequence.block_table:
            return
        hashes = block_hashes(sequence.token_ids, self.block_size, sequence.hashes, full)
        for index in range(sequence.num_published, full):
            self.blocks.publish(sequence.block_table[index], hashes[index])
        sequence.num_published = full

    def release(self, sequence: Sequence) -> None:
        """Take all blocks of a sequence back."""
        self.blocks.release(sequence.block_table)
        sequence.block_table = []
        sequence.table_version += 1
        sequence.num_computed = 0
        sequence.num_published = 0
        sequence.slots = None
