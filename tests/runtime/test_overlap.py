"""Steps that are launched before the tokens of the one before are known: the same outputs, whatever ends when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from runtime.test_greedy import BLOCK, make_prompts
from trtbuild.errors import ToolError
from trtbuild.runtime import Engine, SamplingParams
from trtbuild.runtime.step_logits import StepLogits

Load = Callable[..., Engine]
FREE = SamplingParams(max_tokens=24, ignore_eos=True)


class Device:
    """The CPU as a device that works behind the host's back: it keeps its choices to itself until it is asked.

    A step reads what the host knows at its launch, and of other tokens only the row that chose them.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.execute = engine, engine._runner.execute
        self.chosen: list[int] = []
        self.launched = self.asked = self.ahead = self.fed = 0
        engine._runner.execute = self.launch  # type: ignore[method-assign]

    def launch(self, chunks: list[Any]) -> StepLogits:
        for chunk in chunks:
            assert chunk.end <= chunk.sequence.final_length
            if not chunk.is_known:
                sequence = chunk.sequence
                assert (chunk.start, sequence.token_ids[chunk.start]) == (len(sequence.token_ids) - 1, 0)
                sequence.token_ids[chunk.start] = self.chosen[sequence.row]
                self.fed += 1
        step = self.execute(chunks)
        for chunk in chunks:
            if not chunk.is_known:
                chunk.sequence.token_ids[chunk.start] = 0
        self.chosen = step.logits.argmax(-1).tolist()
        self.launched += 1
        self.ahead += self.launched - self.asked > 1
        return StepLogits(step.logits, step.rows, self._answer(list(self.chosen)))

    def _answer(self, tokens: list[int]) -> Callable[[], list[int]]:
        def wait() -> list[int]:
            self.asked += 1
            return tokens

        return wait


def tokens(engine: Engine, prompts: list[list[int]], params: Any = FREE) -> list[tuple[int, ...]]:
    return [one.token_ids for one in engine.generate(prompts, params)]


@pytest.mark.parametrize("policy", ["MAX_UTILIZATION", "GUARANTEED_NO_EVICT"])
@pytest.mark.parametrize("seed", range(4))
def test_the_same_tokens_under_pressure(engine: Load, policy: str, seed: int) -> None:
    prompts = make_prompts(seed) * 2
    limits = {"tokens_per_block": BLOCK, "max_tokens": 16 * BLOCK, "max_num_tokens": 24,
              "capacity_scheduler_policy": policy}  # fmt: skip
    expected = tokens(engine(max_num_tokens=512), prompts)
    pressed = engine(**limits)
    device = Device(pressed)
    assert tokens(pressed, prompts) == expected
    assert tokens(pressed, prompts) == expected
    stats = pressed.stats()
    assert stats.free_blocks == stats.total_blocks
    assert stats.reused_blocks > 0
    assert (stats.preemptions > 0) == (policy == "MAX_UTILIZATION")
    assert device.ahead > 0.9 * device.launched
    assert device.fed > 100


def test_every_end_of_a_sequence_throws_the_surplus_away(engine: Load) -> None:
    prompts = make_prompts(1)
    plain, late = engine(), engine()
    device = Device(late)
    free = tokens(plain, prompts)
    ends = [
        FREE,
        SamplingParams(max_tokens=24, ignore_eos=True, stop_token_ids=[free[1][5]]),
        SamplingParams(max_tokens=24, ignore_eos=True, stop_words=[list(free[2][6:8])]),
        SamplingParams(max_tokens=1, ignore_eos=True),
        SamplingParams(max_tokens=2, ignore_eos=True),
    ]
    expected, found = plain.generate(prompts, ends), late.generate(prompts, ends)
    for one, other in zip(expected, found, strict=True):
        assert (one.token_ids, one.finish_reason, one.stop_reason) == (
            other.token_ids, other.finish_reason, other.stop_reason,
        )  # fmt: skip
    assert [len(one.token_ids) for one in found][3:] == [1, 2]
    assert {one.finish_reason for one in found} == {"stop", "length"}
    # The tokens of a stopped sequence that were computed in vain are in no block that others reuse.
    assert tokens(late, prompts) == free
    assert device.asked == device.launched
    assert late.stats().generated_tokens == sum(len(one.token_ids) for one in found) + 24 * len(prompts)


def test_requests_that_choose_on_the_host_run_beside_others(engine: Load) -> None:
    prompts = make_prompts(2)
    hot = SamplingParams(max_tokens=9, ignore_eos=True, temperature=1.3, seed=7, logprobs=1)
    mixed = [FREE, hot, FREE, SamplingParams(max_tokens=12, ignore_eos=True, repetition_penalty=1.3), FREE]
    plain, late = engine(), engine()
    device = Device(late)
    expected = plain.generate(prompts, mixed)
    found = late.generate(prompts, mixed)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert found[1].logprobs == expected[1].logprobs
    assert late.logits(prompts[0]).equal(plain.logits(prompts[0]))
    assert device.fed > 0


def test_cancelling_while_a_step_is_on_its_way(engine: Load) -> None:
    one = engine(tokens_per_block=BLOCK)
    Device(one)
    expected = tokens(engine(), [[9, 8, 7]])
    seen: list[int] = []
    request = one.submit(
        [5, 6, 7], SamplingParams(max_tokens=900, ignore_eos=True),
        on_output=lambda output: (seen.extend(output.token_ids), len(seen) > 9 and request.cancel()),
    )  # fmt: skip
    result = request.result(timeout=30)
    assert result.finish_reason == "cancelled"
    assert list(result.token_ids) == seen
    assert one.stats().free_blocks == one.stats().total_blocks
    assert tokens(one, [[9, 8, 7]]) == expected


def test_a_step_that_fails_late_fails_its_requests_alone(engine: Load) -> None:
    one = engine()
    device = Device(one)
    answer, left = device._answer, [5]

    def broken(chosen: list[int]) -> Callable[[], list[int]]:
        left[0] -= 1
        return answer(chosen) if left[0] else lambda: 1 // 0  # type: ignore[return-value]

    device._answer = broken  # type: ignore[method-assign]
    with pytest.raises(ToolError, match="ZeroDivisionError"):
        one.generate([[5, 6, 7]], FREE)
    assert len(tokens(one, [[5, 6, 7]])[0]) == 24
    device._answer = lambda chosen: answer([-1] * len(chosen))  # type: ignore[method-assign]
    with pytest.raises(ToolError, match="the model's logits are not finite"):
        one.generate([[5, 6, 7]], FREE)
    assert one.stats().free_blocks == one.stats().total_blocks
