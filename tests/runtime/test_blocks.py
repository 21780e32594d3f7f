"""The block manager and the scheduler, without a model: nothing leaks, nothing shared is written, nothing starves."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtbuild.runtime import EngineConfig, KvCacheConfig, SamplingParams
from trtbuild.runtime.blocks import BlockManager, block_hashes
from trtbuild.runtime.scheduler import Chunk, Scheduler
from trtbuild.runtime.sequence import Sequence

BLOCK = 4


def hashes_of(tokens: list[int], count: int | None = None) -> list[bytes]:
    return block_hashes(tokens, BLOCK, [], len(tokens) // BLOCK if count is None else count)


def publish_all(blocks: BlockManager, table: list[int], tokens: list[int]) -> None:
    for block, digest in zip(table, hashes_of(tokens), strict=False):
        blocks.publish(block, digest)


def test_a_fresh_pool_gives_runs() -> None:
    blocks = BlockManager(10)
    first, second = blocks.take(3), blocks.take(4)
    for run in (first, second):
        assert all(after == before + 1 for before, after in pairwise(run))
    blocks.release(first)
    blocks.release(second)
    assert blocks.num_free == 10
    assert blocks.num_cached == 0


def test_growth_prefers_the_next_block() -> None:
    blocks = BlockManager(10)
    table = blocks.take(2)
    assert blocks.take(1, after=table[-1]) == [table[-1] + 1]


def test_a_prefix_is_found_again_and_shared() -> None:
    blocks = BlockManager(8)
    tokens = list(range(12))
    table = blocks.take(3)
    publish_all(blocks, table, tokens)
    assert blocks.lookup(hashes_of([*tokens[:8], 9, 9, 9, 9])) == table[:2]
    blocks.share(table[:2])
    assert [blocks.holders(block) for block in table] == [2, 2, 1]
    blocks.release(table)
    assert blocks.num_free == 6
    assert blocks.num_cached == 1
    blocks.release(table[:2])
    assert blocks.num_free == 8
    assert blocks.num_cached == 3


def test_hashes_depend_on_all_that_comes_before() -> None:
    same_block = [7, 7, 7, 7]
    assert hashes_of([1, 2, 3, 4, *same_block])[1] != hashes_of([1, 2, 3, 5, *same_block])[1]
    assert hashes_of([1, 2, 3, 4, *same_block])[1] == hashes_of([1, 2, 3, 4, *same_block, 8, 8, 8, 8])[1]
    # Ids whose bytes would run together in a careless encoding.
    assert hashes_of([1, 0, 0, 0]) != hashes_of([256, 0, 0, 0])


def test_the_least_recently_used_block_is_evicted_first_and_a_prefix_last() -> None:
    blocks = BlockManager(4)
    old, new = blocks.take(2), blocks.take(2)
    publish_all(blocks, old, list(range(8)))
    publish_all(blocks, new, list(range(100, 108)))
    blocks.release(old)
    blocks.release(new)
    assert blocks.take(1) == [old[1]]  # the older sequence, from its end
    assert blocks.evicted == 1
    assert blocks.lookup(hashes_of(list(range(8)))) == [old[0]]
    assert blocks.lookup(hashes_of(list(range(100, 108)))) == new


def test_empty_blocks_are_taken_before_cached_ones() -> None:
    blocks = BlockManager(4)
    cached = blocks.take(2)
    publish_all(blocks, cached, list(range(8)))
    blocks.release(cached)
    assert not set(blocks.take(2)) & set(cached)
    assert blocks.evicted == 0


def test_reusing_a_block_makes_it_recent() -> None:
    blocks = BlockManager(2)
    first, second = blocks.take(1), blocks.take(1)
    publish_all(blocks, first, [1, 1, 1, 1])
    publish_all(blocks, second, [2, 2, 2, 2])
    blocks.release(first)
    blocks.release(second)
    blocks.share(first)
    blocks.release(first)
    assert blocks.take(1) == second


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5), st.integers(0, 3)), max_size=60))
def test_no_block_is_lost_or_held_twice(actions: list[tuple[int, int, int]]) -> None:
    blocks = BlockManager(12)
    tables: list[list[int]] = []
    for action, count, flavour in actions:
        tokens = [flavour] * (count * BLOCK)
        if action == 0 and blocks.num_free >= count:
            tables.append(blocks.take(count))
            # A fresh block is nobody else's.
            assert all(blocks.holders(block) == 1 for block in tables[-1])
            if flavour:
                publish_all(blocks, tables[-1], tokens)
        elif action == 1 and tables:
            blocks.release(tables.pop(count % len(tables)))
        elif action == 2:
            shared = blocks.lookup(hashes_of(tokens))
            blocks.share(shared)
            tables.append(shared)
        held = [block for table in tables for block in table]
        assert blocks.num_free + len(set(held)) == 12
        assert all(blocks.holders(block) == held.count(block) for block in range(12))
        assert blocks.num_cached <= blocks.num_free
    for table in tables:
        blocks.release(table)
    assert blocks.num_free == 12


def make_sequence(number: int, prompt: list[int], max_tokens: int) -> Sequence:
    return Sequence(
        request_id=number, prompt_len=len(prompt), token_ids=list(prompt), params=SamplingParams(max_tokens=max_tokens),
        end_ids=frozenset(), stop_ids=frozenset(), rng=random.Random(0),
    )  # fmt: skip


def check_step(scheduler: Scheduler, chunks: list[Chunk], config: EngineConfig) -> None:
    """What must hold of any step: within its budget, in order, and only into blocks that nobody else reads."""
    assert sum(chunk.end - chunk.start for chunk in chunks) <= config.max_num_tokens
    assert len(scheduler.running) <= config.max_batch_size
    assert len({chunk.sequence.request_id for chunk in chunks}) == len(chunks)
    for chunk in chunks:
        sequence = chunk.sequence
        assert chunk.start == sequence.num_computed < chunk.end <= len(sequence.token_ids)
        assert sequence in scheduler.running
        assert len(sequence.block_table) * BLOCK >= chunk.end
        for position in range(chunk.start, chunk.end):
            assert scheduler.blocks.holders(sequence.block_table[position // BLOCK]) == 1
    held = {block for sequence in scheduler.running for block in sequence.block_table}
    assert scheduler.blocks.num_free + len(held) == scheduler.blocks.num_blocks
    assert all(not sequence.block_table for sequence in scheduler.waiting)


@settings(max_examples=120)
@given(
    jobs=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2)), min_size=1, max_size=10),
    policy=st.sampled_from(["GUARANTEED_NO_EVICT", "MAX_UTILIZATION"]),
    num_blocks=st.integers(11, 24),
    budget=st.integers(3, 40),
    chunked=st.booleans(),
    cancel=st.integers(0, 30),
)
def test_every_sequence_ends_and_gives_its_blocks_back(
    jobs: list[tuple[int, int, int]], policy: str, num_blocks: int, budget: int, chunked: bool, cancel: int
) -> None:
    config = EngineConfig(
        max_batch_size=3, max_num_tokens=budget, capacity_scheduler_policy=policy, enable_chunked_prefill=chunked,
        kv_cache=KvCacheConfig(tokens_per_block=BLOCK),
    )  # fmt: skip
    scheduler = Scheduler(config, num_blocks)
    pending = []
    for number, (length, max_tokens, flavour) in enumerate(jobs):
        prompt = [flavour] * (length if chunked else min(length, budget))
        pending.append(make_sequence(number, prompt, max_tokens))
        scheduler.add(pending[-1])
    for step in range(3000):
        if not scheduler.has_work:
            break
        if step == cancel:
            scheduler.remove(pending[0])
        chunks = scheduler.schedule()
        check_step(scheduler, chunks, config)
        scheduler.commit(chunks)
        for chunk in chunks:
            if chunk.is_last:
                chunk.sequence.append(step % 5)
                if chunk.sequence.num_output == chunk.sequence.params.max_tokens:
                    scheduler.remove(chunk.sequence)
    assert not scheduler.has_work
    assert scheduler.blocks.num_free == num_blocks
    if policy == "GUARANTEED_NO_EVICT":
        assert scheduler.preemptions == 0


def test_decoding_goes_on_while_a_long_prompt_comes_in_chunks() -> None:
    config = EngineConfig(max_batch_size=2, max_num_tokens=8, kv_cache=KvCacheConfig(tokens_per_block=BLOCK))
    scheduler = Scheduler(config, 32)
    short, long = make_sequence(0, [1, 2], 20), make_sequence(1, list(range(30)), 2)
    scheduler.add(short)
    scheduler.add(long)
    sizes = []
    for _ in range(5):
        chunks = scheduler.schedule()
        sizes.append({chunk.sequence.request_id: chunk.end - chunk.start for chunk in chunks})
        scheduler.commit(chunks)
        for chunk in chunks:
            if chunk.is_last:
                chunk.sequence.append(0)
    assert sizes == [{0: 2, 1: 6}, {0: 1, 1: 7}, {0: 1, 1: 7}, {0: 1, 1: 7}, {0: 1, 1: 3}]


@pytest.mark.parametrize(("policy", "together"), [("GUARANTEED_NO_EVICT", 1), ("MAX_UTILIZATION", 2)])
def test_the_policies_admit_by_what_may_come_or_by_what_is_there(policy: str, together: int) -> None:
    config = EngineConfig(capacity_scheduler_policy=policy, kv_cache=KvCacheConfig(tokens_per_block=BLOCK))
    scheduler = Scheduler(config, 8)
    for number in range(2):
        scheduler.add(make_sequence(number, [number] * 8, 13))
    assert len(scheduler.schedule()) == together


def test_the_sequence_admitted_last_is_pre_empted_and_comes_back_first() -> None:
    config = EngineConfig(
        max_batch_size=2, capacity_scheduler_policy="MAX_UTILIZATION", kv_cache=KvCacheConfig(tokens_per_block=BLOCK)
    )
    scheduler = Scheduler(config, 5)
    sequences = [make_sequence(number, [number] * 7, 10) for number in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    while not scheduler.preemptions:
        chunks = scheduler.schedule()
        scheduler.commit(chunks)
        for chunk in chunks:
            chunk.sequence.append(9)
    assert [one.request_id for one in scheduler.running] == [0]
    assert [one.request_id for one in scheduler.waiting] == [1, 2]
