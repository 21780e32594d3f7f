"""Speculation changes no answer: greedy, seeded, stopped, reported, under pressure, in many architectures."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from runtime.fp8 import fp8_checkpoint
from runtime.int4 import int4_checkpoint
from runtime.oracle import Oracle, with_oracle
from trtbuild.runtime import Completion, Engine, Output, SamplingParams, SpeculativeConfig

Load = Callable[..., Engine]
BLOCK = 8
FREE = SamplingParams(max_tokens=24, ignore_eos=True)
# A cache too small for all, and steps too small for a prompt.
TIGHT = {"tokens_per_block": BLOCK, "max_tokens": 16 * BLOCK, "max_num_tokens": 24, "max_batch_size": 4,
         "capacity_scheduler_policy": "MAX_UTILIZATION"}  # fmt: skip


def make_prompts(seed: int) -> list[list[int]]:
    """Five prompts of different lengths; the last begins like the first."""
    numbers = random.Random(seed)
    first = [numbers.randrange(3, tiny.VOCAB_SIZE) for _ in range(2 * BLOCK + 3)]
    others = [[numbers.randrange(3, tiny.VOCAB_SIZE) for _ in range(length)] for length in (1, 7, 41)]
    return [first, *others, first[: 2 * BLOCK] + others[2][:5]]


def run(engine: Engine, prompts: list[list[int]], params: Any = FREE) -> list[Completion]:
    return engine.generate(prompts, params)


def texts(prompts: list[list[int]], found: list[Completion]) -> list[list[int]]:
    return [prompt + list(one.token_ids) for prompt, one in zip(prompts, found, strict=True)]


def same(one: Completion, other: Completion) -> None:
    """Equal in all that a caller sees, log-probabilities up to rounding."""
    assert one.token_ids == other.token_ids
    assert (one.finish_reason, one.stop_reason) == (other.finish_reason, other.stop_reason)
    for mine, theirs in ((one.logprobs, other.logprobs), (one.prompt_logprobs, other.prompt_logprobs)):
        assert (mine is None) == (theirs is None)
        for entry, expected in zip(mine or (), theirs or (), strict=True):
            assert (entry is None) == (expected is None)
            if entry is not None and expected is not None:
                assert (entry.token_id, entry.rank) == (expected.token_id, expected.rank)
                assert entry.logprob == pytest.approx(expected.logprob, abs=1e-9)
                assert [token for token, _ in entry.top] == [token for token, _ in expected.top]


ARCHITECTURES = ["llama", "mistral", "gemma2", "gemma3", "qwen3", "phi3", "mixtral", "gpt_oss"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_answers_are_the_same_in_every_architecture(engine: Load, name: str) -> None:
    prompts = make_prompts(0) * 2
    expected = run(engine(name), prompts)
    pressed = engine(name, **TIGHT)
    with_oracle(pressed, texts(prompts, expected))
    for _ in range(2):
        assert [one.token_ids for one in run(pressed, prompts)] == [one.token_ids for one in expected]
    stats = pressed.stats()
    assert stats.preemptions > 0
    assert stats.reused_blocks > 0
    assert 0.2 * stats.draft_tokens < stats.accepted_draft_tokens < 0.9 * stats.draft_tokens
    assert stats.free_blocks == stats.total_blocks


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_quantized_models(engine: Load, checkpoint: Callable[..., Path], tmp_path: Path, form: str) -> None:
    source, target = checkpoint("llama"), tmp_path / form
    path = fp8_checkpoint(source, target, kv=True) if form == "fp8" else int4_checkpoint(source, target)
    cache = {"dtype": "fp8"} if form == "fp8" else {}
    prompts = make_prompts(1)
    expected = run(engine(path=path, **cache), prompts)
    pressed = engine(path=path, **TIGHT, **cache)
    with_oracle(pressed, texts(prompts, expected))
    assert [one.token_ids for one in run(pressed, prompts)] == [one.token_ids for one in expected]
    assert pressed.stats().accepted_draft_tokens > 20


def every_kind(free: list[Completion]) -> list[SamplingParams]:
    """Every way to choose, stop and report, one for each of five prompts."""
    third = free[0].token_ids[6]
    return [
        SamplingParams(max_tokens=24, ignore_eos=True, stop_token_ids=(third,), min_tokens=3),
        SamplingParams(max_tokens=24, ignore_eos=True, stop_words=[list(free[1].token_ids[8:10])], logprobs=2),
        SamplingParams(max_tokens=24, ignore_eos=True, repetition_penalty=1.4, frequency_penalty=0.3, logprobs=0),
        SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.9, top_p=0.9, seed=5, logprobs=1),
        SamplingParams(max_tokens=24, min_tokens=20, bad_words=[[free[4].token_ids[2]]], prompt_logprobs=1),
    ]


@pytest.mark.parametrize("accuracy", [0.0, 0.6, 1.0])
def test_every_way_to_choose_stop_and_report(engine: Load, accuracy: float) -> None:
    prompts = make_prompts(2)
    plain = engine()
    kinds = every_kind(run(plain, prompts))
    expected = run(plain, prompts, kinds)
    assert {one.finish_reason for one in expected} == {"stop", "length"}
    for limits in ({}, TIGHT):
        drafting = engine(**limits)
        with_oracle(drafting, texts(prompts, expected), accuracy)
        for one, other in zip(run(drafting, prompts, kinds), expected, strict=True):
            same(one, other)
        assert drafting.stats().free_blocks == drafting.stats().total_blocks
        assert drafting.stats().generated_tokens == sum(len(one.token_ids) for one in expected)


def test_many_answers_to_one_prompt_are_those_of_their_seeds(engine: Load) -> None:
    prompts = [make_prompts(3)[0]] * 6
    seeds = [SamplingParams(max_tokens=16, ignore_eos=True, temperature=1.1, top_k=40, seed=seed) for seed in range(6)]
    expected = run(engine(), prompts, seeds)
    drafting = engine(speculative=SpeculativeConfig("ngram", max_draft_len=3))
    assert [one.token_ids for one in run(drafting, prompts, seeds)] == [one.token_ids for one in expected]
    assert len({one.token_ids for one in expected}) == 6


def test_right_drafts_take_few_steps_and_are_counted(engine: Load) -> None:
    prompt = make_prompts(4)[0]
    one = engine()
    expected = run(one, [prompt])
    oracle = with_oracle(one, texts([prompt], expected), 1.0)
    before = one.stats().steps
    found = run(one, [prompt])[0]
    # The prompt's step brings the first token, then 23 come by five drafted ones and the model's own.
    assert one.stats().steps - before == 1 + 4
    assert oracle.lengths == [5, 5, 5, 4]
    assert found.metrics.total_draft_tokens == found.metrics.total_accepted_draft_tokens == 19
    assert found.metrics.acceptance_rate == 1.0
    assert (one.stats().draft_tokens, one.stats().accepted_draft_tokens) == (19, 19)
    outputs = [output for output in one.submit(prompt, FREE) if output.token_ids]
    assert [len(output.token_ids) for output in outputs] == [1, 6, 6, 6, 5]


def test_wrong_drafts_cost_no_token_and_are_counted(engine: Load) -> None:
    prompt = make_prompts(4)[1]
    one = engine()
    expected = run(one, [prompt])
    with_oracle(one, [], 0.0)
    found = run(one, [prompt])[0]
    assert found.token_ids == expected[0].token_ids
    assert found.metrics.total_draft_tokens > 80
    assert found.metrics.acceptance_rate < 0.05
    assert expected[0].metrics.acceptance_rate is None
    assert expected[0].metrics.total_draft_tokens is None


def test_keys_of_refused_tokens_are_never_reused(engine: Load) -> None:
    """Longer prompts begin with earlier answers: their blocks were full of refused tokens for a while."""
    prompts = make_prompts(5)
    plain, drafting = engine(tokens_per_block=4), engine(tokens_per_block=4)
    longer = [[*text, 7, 8, 9] for text in texts(prompts, run(plain, prompts))]
    expected = run(plain, longer)
    with_oracle(drafting, texts(prompts, run(plain, prompts)) + texts(longer, expected), 0.5)
    run(drafting, prompts)
    for prompt, other in zip(longer, expected, strict=True):
        found = run(drafting, [prompt])[0]
        assert found.token_ids == other.token_ids
        # The last token of an answer is never computed; all full blocks before it are there.
        assert found.metrics.kv_cache_reused_block == (len(prompt) - 4) // 4


def test_drafts_pre_empt_nobody_and_leave_room_for_prompts(engine: Load) -> None:
    prompts = make_prompts(6)
    limits = {"tokens_per_block": BLOCK, "max_tokens": 20 * BLOCK, "max_num_tokens": 24,
              "capacity_scheduler_policy": "GUARANTEED_NO_EVICT"}  # fmt: skip
    plain, drafting = engine(**limits), engine(**limits)
    expected = run(plain, prompts)
    oracle = with_oracle(drafting, texts(prompts, expected), 1.0, max_draft_len=20)
    steps: list[int] = []
    execute = drafting._runner.execute
    drafting._runner.execute = lambda chunks: (  # type: ignore[method-assign]
        steps.append(sum(chunk.end - chunk.start for chunk in chunks)), execute(chunks),
    )[1]  # fmt: skip
    assert [one.token_ids for one in run(drafting, prompts)] == [one.token_ids for one in expected]
    assert drafting.stats().preemptions == 0
    assert max(steps) <= 24
    assert max(oracle.lengths) <= 20
    assert drafting.stats().steps < plain.stats().steps


def test_a_draft_takes_no_block_that_another_request_needs(engine: Load) -> None:
    """Two answers end when they and a third, longer one have filled the cache to the last block; all of them draft."""
    prompts = [[3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13, 14]]
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (33, 9, 9)]
    limits = {"tokens_per_block": 4, "max_tokens": 36, "capacity_scheduler_policy": "MAX_UTILIZATION"}
    plain, drafting = engine(**limits), engine(**limits)
    expected = run(plain, prompts, params)
    with_oracle(drafting, [], 0.0, max_draft_len=20)
    assert [one.token_ids for one in run(drafting, prompts, params)] == [one.token_ids for one in expected]
    assert plain.stats().preemptions == drafting.stats().preemptions == 0


def test_a_prompt_that_needs_a_whole_step_does_not_wait_for_drafts(engine: Load) -> None:
    """Without chunked prefill: two answers run and draft, and the third request needs all but two tokens of a step."""
    prompts = [[3, 4], [5, 6], list(range(20, 42))]
    lengths = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (40, 40, 2)]
    limits = {"max_num_tokens": 24, "max_seq_len": 64, "max_batch_size": 3, "enable_chunked_prefill": False}
    plain, drafting = engine(**limits), engine(**limits)
    expected = run(plain, prompts, lengths)
    oracle = with_oracle(drafting, [], 0.0)
    found = run(drafting, prompts, lengths)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert found[2].metrics.last_token_time_ns < found[0].metrics.last_token_time_ns
    assert max(oracle.lengths) == 5


def test_cancelling_frees_the_blocks_and_tells_the_drafter(engine: Load) -> None:
    one = engine(tokens_per_block=BLOCK)
    oracle = with_oracle(one, [], 0.0)
    seen: list[int] = []

    def stop(output: Output) -> None:
        seen.extend(output.token_ids)
        if len(seen) > 9:
            request.cancel()

    request = one.submit([5, 6, 7], SamplingParams(max_tokens=900, ignore_eos=True), on_output=stop)
    result = request.result(timeout=30)
    assert result.finish_reason == "cancelled"
    assert list(result.token_ids) == seen
    assert result.metrics.total_draft_tokens
    assert one.stats().free_blocks == one.stats().total_blocks
    assert oracle.forgotten == [1]


def test_lengths_go_by_the_number_of_running_requests(engine: Load) -> None:
    prompts = [[number, number + 1] for number in range(3, 11)]
    one = engine()
    expected = run(one, prompts)
    oracle = with_oracle(one, [], 0.0, draft_len_schedule=((1, 4), (4, 2), (8, 0)))
    assert [found.token_ids for found in run(one, prompts)] == [found.token_ids for found in expected]
    assert oracle.lengths == []
    run(one, prompts[:4])
    assert set(oracle.lengths) == {1, 2}
    oracle.lengths.clear()
    run(one, prompts[:2])
    assert max(oracle.lengths) == 4
    oracle = with_oracle(one, [], 0.0, max_concurrency=1)
    run(one, prompts[:2])
    assert oracle.lengths == []
    run(one, prompts[:1])
    assert max(oracle.lengths) == 5


def test_a_drafter_that_fails_ends_nothing_but_drafting(
    engine: Load, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = make_prompts(7)
    one = engine()
    expected = run(one, prompts)
    oracle = with_oracle(one, texts(prompts, expected))
    monkeypatch.setattr(Oracle, "_any", lambda self: 1 // 0)
    assert [found.token_ids for found in run(one, prompts)] == [found.token_ids for found in expected]
    assert "drafting failed; nothing more is drafted" in caplog.text
    asked = len(oracle.batches)
    run(one, prompts)
    assert len(oracle.batches) == asked
