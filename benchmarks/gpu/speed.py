"""Decode and prefill of the embedded engine on one NVIDIA GPU, against the floor that its memory bandwidth sets.

    python benchmarks/gpu/speed.py [--format bf16|fp8|int4] [--batches 1,8,64,256] [--runs 3] [--profile]

Random weights in the shape of Llama 3.1 8B, prompts of 128 random tokens, 256 generated tokens, greedy, no prefix
reuse; prefill: 8 prompts of 1920 tokens, one token each.

  ms a step   what the caller of the engine sees: the median time between two outputs at the full batch
  device ms   the same step's CUDA graph replayed alone, at 256 tokens a sequence
  floor ms    bytes of the weights and of the cache at 256 tokens a sequence over the measured copy bandwidth
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from random_model import FORMATS, random_engine, weight_bytes

from trtbuild.runtime import Engine, EngineConfig, KvCacheConfig, SamplingParams

PROMPT, NEW, MIDDLE = 128, 256, 256
PREFILL = (8, 1920)
# vLLM 0.22.1 (torch 2.11.0+cu130) on an NVIDIA H100 80GB HBM3 on another day: milliseconds a step, prefill tok/s.
VLLM = {
    "bf16": ({1: 6.50, 8: 6.69, 64: 7.72, 256: 12.3}, 43_200),
    "fp8": ({1: 4.04, 8: 4.18, 64: 5.30, 256: 9.47}, 70_500),
    "int4": ({1: 4.13, 8: 4.21, 64: 6.25, 256: 11.8}, 45_900),
}


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / device_seconds(lambda: target.copy_(source), 10)


def device_seconds(call: Any, times: int) -> float:
    """The median time of `call` on the device."""
    call()
    found = []
    for _ in range(times):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1000)
    return statistics.median(found)


def prompts(count: int, length: int) -> list[list[int]]:
    """Random prompts."""
    draw = random.Random(count)
    return [[draw.randrange(100, 120_000) for _ in range(length)] for _ in range(count)]


def step_seconds(engine: Engine, batch: int) -> float:
    """The median time between two outputs of the request that started last, so that all are running."""
    times: list[list[float]] = [[] for _ in range(batch)]

    def note(row: int) -> Any:
        return lambda _output: times[row].append(time.perf_counter())

    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    requests = [engine.submit(prompt, params, on_output=note(row)) for row, prompt in enumerate(prompts(batch, PROMPT))]
    for request in requests:
        assert len(request.result().token_ids) == NEW
    last = max(times, key=lambda one: one[0])
    return statistics.median(b - a for a, b in pairwise(last))


def graph_seconds(engine: Engine, batch: int) -> float:
    """One replay of the batch's graph with every sequence at MIDDLE tokens."""
    graphs: Any = engine._runner.fast.graphs
    size = next(size for size in graphs.sizes if size >= batch)
    blocks = -(-(MIDDLE + 1) // engine.facts.tokens_per_block)
    with torch.inference_mode():
        _fill(graphs, size, blocks)
    found = device_seconds(graphs._graphs[size].replay, 50)
    # The engine must not take the numbers of this table for its own.
    graphs._owners = [(None, 0)] * graphs.largest
    return found


def _fill(graphs: Any, size: int, blocks: int) -> None:
    table = torch.arange(blocks * size, dtype=torch.int32, device="cuda").view(size, blocks).t()
    graphs._table[:blocks, :size] = table
    graphs._inputs[0, :size] = 1000
    graphs._inputs[1, :size] = MIDDLE


def prefill_seconds(engine: Engine) -> float:
    """From the first submission to the last first token."""
    made = prompts(*PREFILL)
    torch.cuda.synchronize()
    started = time.perf_counter()
    engine.generate(made, SamplingParams(max_tokens=1, ignore_eos=True))
    return time.perf_counter() - started


def profile(what: str, call: Callable[[], object]) -> None:
    """Print where the time of `call` goes, by kernel; kernels of one chain overlap, so their sum is more than it."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)[:12]
    print(f"\n{what}, microseconds by kernel (calls)")
    for row in rows:
        print(f"  {row.self_device_time_total:9.1f}  {row.count:5d}  {row.key[:90]}")


def main() -> None:
    """Measure and print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=FORMATS, default="bf16")
    parser.add_argument("--batches", default="1,8,64,256")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--step-tokens", type=int, default=16384)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    batches = [int(batch) for batch in arguments.batches.split(",")]
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    started = time.perf_counter()
    config = EngineConfig(
        max_batch_size=max(batches), max_num_tokens=arguments.step_tokens, max_seq_len=2048, device="cuda",
        kv_cache=KvCacheConfig(max_tokens=max(8 * 2048, max(batches) * 512), enable_block_reuse=False),
    )  # fmt: skip
    with random_engine(arguments.format, config) as engine:
        name = torch.cuda.get_device_name()
        print(f"{name}, torch {torch.__version__}, copies {bandwidth / 1e12:.2f} TB/s, {arguments.format}")
        print(f"path: {engine.facts.path}; ready after {time.perf_counter() - started:.1f} s\n")
        theirs, their_prefill = VLLM[arguments.format]
        print(
            "| batch | ms a step | tok/s | device ms | floor ms | floor / ours | vLLM 0.22.1 ms (another day) | ratio |"
        )
        print("|---|---|---|---|---|---|---|---|")
        cache = 2 * 8 * 128 * 2 * 32 * MIDDLE
        for batch in batches:
            step_seconds(engine, batch)
            ours = statistics.median(step_seconds(engine, batch) for _ in range(arguments.runs)) * 1000
            device = graph_seconds(engine, batch) * 1000
            floor = (weight_bytes(engine) + cache * batch) / bandwidth * 1000
            peer = theirs.get(batch, float("nan"))
            print(
                f"| {batch} | {ours:.3f} | {batch / ours * 1000:,.0f} | {device:.3f} | {floor:.2f} "
                f"| {floor / ours:.2f} | {peer:.2f} | {peer / ours:.2f} |"
            )
        prefill_seconds(engine)
        seconds = statistics.median(prefill_seconds(engine) for _ in range(arguments.runs))
        rate = PREFILL[0] * PREFILL[1] / seconds
        print(f"\nPrefill {PREFILL[0]}x{PREFILL[1]}: {rate:,.0f} tok/s ({seconds * 1000:.0f} ms), ", end="")
        print(f"vLLM 0.22.1 (another day) {their_prefill:,}: ratio {rate / their_prefill:.2f}")
        if arguments.profile:
            graphs: Any = engine._runner.fast.graphs
            for batch in batches:
                size = next(size for size in graphs.sizes if size >= batch)
                profile(f"A step of {batch}", graphs._graphs[size].replay)
            profile("Prefill", lambda: prefill_seconds(engine))


if __name__ == "__main__":
    main()
