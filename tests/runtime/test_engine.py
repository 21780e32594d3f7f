"""The engine as its callers see it: limits, stops, streams, cancellation, threads, failures, closing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from runtime.conftest import engine_config
from trtbuild.errors import RequestError, ToolError
from trtbuild.runtime import Completion, Engine, Output, SamplingParams

Load = Callable[..., Engine]
PROMPT = [5, 6, 7, 8, 9]


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until `condition` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def run(engine: Engine, prompt: list[int] | None = None, **params: Any) -> Completion:
    return engine.submit(prompt or PROMPT, SamplingParams(**params)).result(timeout=60)


def slow_down(engine: Engine, seconds: float = 0.01) -> None:
    """Let every step take a while, so that a test can act while a request runs."""
    execute = engine._runner.execute

    def slow(chunks: Any) -> Any:
        time.sleep(seconds)
        return execute(chunks)

    engine._runner.execute = slow  # type: ignore[method-assign]


def test_a_stream_carries_every_token_once_and_ends_with_metrics(engine: Load) -> None:
    one = engine()
    outputs = list(one.submit(PROMPT, SamplingParams(max_tokens=20, ignore_eos=True)))
    streamed = [token for output in outputs for token in output.token_ids]
    whole = run(one, max_tokens=20, ignore_eos=True)
    assert streamed == list(whole.token_ids)
    assert [output.finished for output in outputs] == [False] * 19 + [True]
    last = outputs[-1]
    assert last.finish_reason == "length"
    times = last.metrics
    assert times is not None
    assert times.arrival_time_ns < times.first_scheduled_time_ns <= times.first_token_time_ns < times.last_token_time_ns
    assert times.kv_cache_alloc_total_blocks == times.kv_cache_alloc_new_blocks == 1


def test_outputs_go_to_the_callback_in_the_engines_thread(engine: Load) -> None:
    one = engine()
    seen: list[tuple[str, Output]] = []
    request = one.submit(
        PROMPT, SamplingParams(max_tokens=5, ignore_eos=True),
        on_output=lambda output: seen.append((threading.current_thread().name, output)),
    )  # fmt: skip
    whole = request.result(timeout=60)
    assert {name for name, _ in seen} == {"trtbuild-engine"}
    assert tuple(token for _, output in seen for token in output.token_ids) == whole.token_ids
    with pytest.raises(RequestError, match="go to its on_output"):
        next(iter(request))


def test_stops(engine: Load) -> None:
    one = engine()
    free = run(one, max_tokens=40, ignore_eos=True).token_ids
    assert len(free) == 40
    third = next(token for token in free[2:] if free.index(token) >= 2)
    place = free.index(third)
    stopped = run(one, max_tokens=40, ignore_eos=True, stop_token_ids=(third,))
    assert stopped.token_ids == free[: place + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", third)
    by_word = run(one, max_tokens=40, ignore_eos=True, stop_words=[list(free[place - 1 : place + 1])])
    assert by_word.token_ids == free[: place + 1]
    assert (by_word.finish_reason, by_word.stop_reason) == ("stop", third)
    # A word that began in the prompt is no word of the output.
    assert run(one, max_tokens=4, ignore_eos=True, stop_words=[[PROMPT[-1], free[0]]]).finish_reason == "length"
    later = run(one, max_tokens=40, ignore_eos=True, stop_token_ids=(third,), min_tokens=place + 2)
    assert len(later.token_ids) >= place + 2
    without = run(one, max_tokens=40, ignore_eos=True, bad_words=[[third]])
    assert third not in without.token_ids
    assert without.token_ids[:place] == free[:place]


def test_the_end_of_text_token_stops_unless_ignored(
    engine: Load, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    free = run(engine(), max_tokens=40, ignore_eos=True).token_ids
    end = free[10]
    place = free.index(end)
    path = tiny.save_checkpoint(tmp_path, tokenizer=False)
    (path / "generation_config.json").write_text(f'{{"eos_token_id": [2, {end}]}}', encoding="utf-8")
    one = engine(path=path)
    assert one.facts.eos_token_ids == tuple(sorted({2, end}))
    stopped = run(one, max_tokens=40)
    assert stopped.token_ids == free[: place + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", None)
    assert run(one, max_tokens=40, ignore_eos=True).token_ids == free
    (path / "generation_config.json").unlink()
    assert engine(path=path).facts.eos_token_ids == (2,)


@pytest.mark.parametrize("chunk", [4, 512])
def test_logprobs_equal_a_float64_log_softmax(engine: Load, checkpoint: Callable[..., Path], chunk: int) -> None:
    one = engine(max_num_tokens=chunk, max_batch_size=2)
    prompt = list(range(3, 40))
    found = run(one, prompt, max_tokens=12, ignore_eos=True, logprobs=3, prompt_logprobs=2, temperature=0.7, seed=1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float64).eval()
    text = prompt + list(found.token_ids)
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([text]), use_cache=False).logits[0], dim=-1)
    assert found.logprobs is not None
    assert found.prompt_logprobs is not None
    assert found.prompt_logprobs[0] is None
    assert len(found.prompt_logprobs) == len(prompt)
    both = [*found.prompt_logprobs[1:], *found.logprobs]
    assert len(both) == len(text) - 1
    for place, entry in enumerate(both):
        assert entry is not None
        assert entry.token_id == text[place + 1]
        assert entry.logprob == pytest.approx(float(expected[place, entry.token_id]), abs=1e-6)
        width = 2 if place < len(prompt) - 1 else 3
        assert [token for token, _ in entry.top] == expected[place].topk(width).indices.tolist()
    assert found.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in found.logprobs))
    assert run(one, max_tokens=2).logprobs is None


def test_prompt_logprobs_survive_pre_emption_and_never_come_from_the_prefix_cache(engine: Load) -> None:
    roomy = engine()
    prompts = [list(range(start, start + 30)) for start in (3, 40, 80)]
    params = SamplingParams(max_tokens=40, ignore_eos=True, prompt_logprobs=0)
    expected = roomy.generate(prompts, params)
    tight = engine(capacity_scheduler_policy="MAX_UTILIZATION", tokens_per_block=8, max_tokens=136, max_num_tokens=16)
    for _ in range(2):
        found = tight.generate(prompts, params)
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.prompt_logprobs is not None
            assert other.prompt_logprobs is not None
            values = [entry.logprob for entry in one.prompt_logprobs if entry]
            assert values == pytest.approx([entry.logprob for entry in other.prompt_logprobs if entry], abs=1e-6)
    assert tight.stats().preemptions > 0


def test_logits_equal_the_models(engine: Load, checkpoint: Callable[..., Path]) -> None:
    one = engine(max_num_tokens=16)
    tokens = list(range(3, 60))
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float64).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens]), use_cache=False).logits[0]
    for _ in range(2):
        found = one.logits(tokens)
        assert found.shape == (len(tokens), tiny.VOCAB_SIZE)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert one.stats().free_blocks == one.stats().total_blocks


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch_and_after_pre_emption(engine: Load) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.0, top_p=0.95, seed=11)
    alone = engine().generate([PROMPT], params)[0]
    tight = engine(capacity_scheduler_policy="MAX_UTILIZATION", tokens_per_block=4, max_tokens=96, max_num_tokens=9)
    others = [SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.2, seed=seed) for seed in range(3)]
    found = tight.generate([[3], [4, 5], [6, 7, 8], PROMPT], [*others, params])
    assert tight.stats().preemptions > 0
    assert found[-1].token_ids == alone.token_ids
    assert tight.generate([PROMPT], SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.0))[0] != alone


def test_reuse_is_counted_and_can_be_switched_off(engine: Load) -> None:
    prompt = list(range(3, 43))
    one = engine(tokens_per_block=8)
    cold, warm = (run(one, prompt, max_tokens=4, ignore_eos=True) for _ in range(2))
    assert cold.token_ids == warm.token_ids
    assert (cold.metrics.kv_cache_reused_block, cold.metrics.kv_cache_missed_block) == (0, 4)
    # The prompt's fifth block is full too, but its last token must be computed.
    assert (warm.metrics.kv_cache_reused_block, warm.metrics.kv_cache_missed_block) == (4, 0)
    assert warm.metrics.kv_cache_hit_rate == 1.0
    assert warm.metrics.kv_cache_alloc_new_blocks == 2
    off = engine(tokens_per_block=8, enable_block_reuse=False)
    assert [run(off, prompt, max_tokens=4, ignore_eos=True).metrics.kv_cache_reused_block for _ in range(2)] == [0, 0]
    assert off.stats().cached_blocks == 0


def test_eviction_keeps_the_answers_right(engine: Load) -> None:
    prompts = [[number] * 20 for number in range(3, 15)]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    expected = [one.token_ids for one in engine().generate(prompts, params)]
    small = engine(tokens_per_block=4, max_tokens=64)
    for _ in range(2):
        assert [small.generate([prompt], params)[0].token_ids for prompt in prompts] == expected
    assert small.stats().evicted_blocks > 0


REFUSALS: list[tuple[list[int], dict[str, Any], str]] = [
    ([], {}, "the prompt is empty; give at least one token"),
    ([5, 320], {}, "prompt_token_ids[1]: 320 is no token of this model; token ids are whole numbers from 0 to 319"),
    ([5, -1], {}, "prompt_token_ids[1]: -1 is no token of this model; token ids are whole numbers from 0 to 319"),
    ([5] * 64, {}, ("the prompt has 64 tokens and this engine takes at most 63 (max_seq_len 64); "
     "shorten the prompt, or build the engine with a larger runtime.max_seq_len")),
    ([5] * 40, {}, ("max_tokens: 32 after a prompt of 40 tokens exceeds max_seq_len 64; "
     "ask for at most 24 tokens, or build the engine with a larger runtime.max_seq_len")),
    ([5] * 10, {"max_tokens": 45}, ("prompt and output of 55 tokens do not fit into the KV cache, which holds 48; "
     "ask for fewer tokens, or build the engine with a larger runtime.kv_cache.max_tokens")),
    ([5] * 20, {"max_tokens": 4}, ("the prompt has 20 tokens and a step takes at most 16 (max_num_tokens) while "
     "chunked prefill is off; shorten the prompt, or build the engine with enable_chunked_prefill: true")),
    ([5], {"max_tokens": 0}, "max_tokens: 0 is out of range; it is a whole number at least 1"),
    ([5], {"min_tokens": 33}, "min_tokens: 33 is out of range; it is a whole number from 0 to 32 (max_tokens)"),
    ([5], {"temperature": -0.1}, "temperature: -0.1 is out of range; it is a number of at least 0"),
    ([5], {"temperature": float("nan")}, "temperature: nan is out of range; it is a number of at least 0"),
    ([5], {"temperature": "1"}, "temperature: '1' is out of range; it is a number of at least 0"),
    ([5], {"top_k": -1}, "top_k: -1 is out of range; it is a whole number at least 0"),
    ([5], {"top_p": 1.5}, "top_p: 1.5 is out of range; it is a number from 0 to 1"),
    ([5], {"min_p": -1}, "min_p: -1 is out of range; it is a number from 0 to 1"),
    ([5], {"repetition_penalty": 0}, "repetition_penalty: 0 is out of range; it is above 0; 1 means no penalty"),
    ([5], {"presence_penalty": float("inf")}, "presence_penalty: inf is out of range; it is a number that is finite"),
    ([5], {"frequency_penalty": None}, "frequency_penalty: None is out of range; it is a number that is finite"),
    ([5], {"seed": -1}, "seed: -1 is out of range; it is a whole number from 0 to 18446744073709551615"),
    ([5], {"ignore_eos": 1}, "ignore_eos: 1 is neither true nor false"),
    ([5], {"logprobs": 321}, "logprobs: 321 is out of range; it is a whole number from 0 to 320 (the vocabulary)"),
    ([5], {"stop_token_ids": (400,)}, ("stop_token_ids[0]: 400 is no token of this model; "
     "token ids are whole numbers from 0 to 319")),
    ([5], {"stop_words": [[]]}, "stop_words: one of the words is empty; a word has at least one token"),
    ([5], {"bad_words": [[1], [2, 999]]}, ("bad_words[1]: 999 is no token of this model; "
     "token ids are whole numbers from 0 to 319")),
]  # fmt: skip


@pytest.fixture(scope="module")
def narrow(checkpoint: Callable[..., Path]) -> Any:
    config = engine_config(
        max_seq_len=64, max_tokens=48, tokens_per_block=8, max_num_tokens=16, enable_chunked_prefill=False
    )
    with Engine.load(checkpoint("llama"), config=config) as one:
        yield one


@pytest.mark.parametrize(("prompt", "params", "message"), REFUSALS, ids=lambda value: str(value)[:40])
def test_refusals_word_for_word(narrow: Engine, prompt: list[int], params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        narrow.submit(prompt, SamplingParams(**params))
    assert str(caught.value) == message


def test_without_chunked_prefill_prompts_wait_for_a_whole_step(narrow: Engine) -> None:
    found = narrow.generate([[5] * 16, [6] * 12, [7] * 3], SamplingParams(max_tokens=20, ignore_eos=True))
    alone = narrow.generate([[6] * 12], SamplingParams(max_tokens=20, ignore_eos=True))
    assert found[1].token_ids == alone[0].token_ids


def test_cancelling_frees_the_blocks_and_is_idempotent(engine: Load) -> None:
    one = engine(max_batch_size=1)
    slow_down(one)
    running, waiting = (one.submit(PROMPT, SamplingParams(max_tokens=900, ignore_eos=True)) for _ in range(2))
    until(lambda: one.stats().running == 1 and one.stats().waiting == 1)
    assert one.stats().used_blocks > 0
    waiting.cancel()
    running.cancel()
    running.cancel()
    for request in (running, waiting):
        assert request.result(timeout=30).finish_reason == "cancelled"
    assert list(running)[-1].finish_reason == "cancelled"
    until(lambda: one.stats().free_blocks == one.stats().total_blocks)
    running.cancel()
    assert run(one, max_tokens=3, ignore_eos=True).finish_reason == "length"


def test_a_callback_that_fails_cancels_its_own_request_only(engine: Load, caplog: pytest.LogCaptureFixture) -> None:
    one = engine()

    def fail(output: Output) -> None:
        raise ValueError("the caller's own mistake")

    bad = one.submit(PROMPT, SamplingParams(max_tokens=900, ignore_eos=True), on_output=fail)
    good = one.submit(PROMPT, SamplingParams(max_tokens=10, ignore_eos=True))
    assert good.result(timeout=60).finish_reason == "length"
    assert bad.result(timeout=60).finish_reason == "cancelled"
    assert "the caller's own mistake" in caplog.text


def test_many_threads_get_their_own_answers(engine: Load) -> None:
    one = engine(max_batch_size=4, tokens_per_block=8, max_tokens=512, capacity_scheduler_policy="MAX_UTILIZATION")
    prompts = [[3 + number] * (1 + 5 * number) for number in range(8)]
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    expected = [one.generate([prompt], params)[0].token_ids for prompt in prompts]
    wrong: list[int] = []

    def ask(number: int) -> None:
        for _ in range(3):
            if one.submit(prompts[number], params).result(timeout=120).token_ids != expected[number]:
                wrong.append(number)
            one.submit(prompts[number], params).cancel()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not wrong
    until(lambda: one.stats().free_blocks == one.stats().total_blocks)


def test_closing_ends_what_is_in_flight(engine: Load) -> None:
    one = engine(max_batch_size=1)
    slow_down(one)
    requests = [one.submit(PROMPT, SamplingParams(max_tokens=900, ignore_eos=True)) for _ in range(3)]
    until(lambda: one.stats().running == 1)
    one.close()
    one.close()
    assert [request.result(timeout=10).finish_reason for request in requests] == ["cancelled"] * 3
    with pytest.raises(RequestError, match="the engine is closed; load it again"):
        one.submit(PROMPT)


def test_closing_from_a_callback_does_not_hang(engine: Load) -> None:
    one = engine()
    request = one.submit(PROMPT, SamplingParams(max_tokens=900, ignore_eos=True), on_output=lambda _: one.close())
    assert request.result(timeout=30).finish_reason == "cancelled"


def test_a_failing_step_fails_its_requests_and_the_engine_goes_on(engine: Load) -> None:
    one = engine()
    execute, failing = one._runner.execute, [True]

    def sometimes(chunks: Any) -> Any:
        if failing.pop():
            raise RuntimeError("out of memory, say")
        failing.append(False)
        return execute(chunks)

    one._runner.execute = sometimes  # type: ignore[method-assign]
    failing[:] = [False, True]
    with pytest.raises(ToolError, match="RuntimeError: out of memory, say"):
        run(one, max_tokens=3)
    assert one.stats().free_blocks == one.stats().total_blocks
    assert run(one, max_tokens=3, ignore_eos=True).finish_reason == "length"


def test_an_engine_that_only_fails_refuses_with_the_reason(engine: Load) -> None:
    one = engine(max_batch_size=1)
    waiting = []

    def always(chunks: Any) -> Any:
        until(lambda: len(waiting) == 5)
        raise RuntimeError("the device is lost")

    one._runner.execute = always  # type: ignore[method-assign]
    waiting.extend([one.submit(PROMPT) for _ in range(5)])
    for request in waiting:
        with pytest.raises(ToolError, match="the device is lost"):
            request.result(timeout=30)
        assert list(request)[-1].finish_reason == "error"
    with pytest.raises(
        RequestError, match="the engine has stopped: 3 steps in a row failed, the last with RuntimeError"
    ):
        one.submit(PROMPT)


def test_generate_leaves_nothing_running_when_one_prompt_is_refused(engine: Load) -> None:
    one = engine()
    slow_down(one)
    with pytest.raises(RequestError, match="the prompt is empty"):
        one.generate([PROMPT, []], SamplingParams(max_tokens=900, ignore_eos=True))
    until(lambda: one.stats().running == one.stats().waiting == 0)


def test_result_waits_no_longer_than_asked(engine: Load) -> None:
    one = engine()
    slow_down(one, 0.2)
    request = one.submit(PROMPT, SamplingParams(max_tokens=900, ignore_eos=True))
    with pytest.raises(TimeoutError, match="not finished after 0.1 seconds"):
        request.result(timeout=0.1)
    request.cancel()
