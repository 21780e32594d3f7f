"""The embedded engine and vLLM on the same GPU, the same weights and the same prompts, one format a command.

    python benchmarks/gpu/side_by_side.py run --format bf16|fp8|int4 [--engines ours,vllm] [--results FILE] [--work DIR]
    python benchmarks/gpu/side_by_side.py table [--results FILE]

Each engine runs in a process of its own; what FILE has already is not run again. Prompts of 128 random tokens, 256
generated, greedy, no prefix reuse. A step is (time of 256 tokens - time of one token) / 255 of `generate`, the median
of the runs; prefill is 8 prompts of 1920 tokens with one token each. DIR needs 16 GB; memory (/dev/shm) will do.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCHES = (1, 8, 64, 256)
PROMPT, NEW, RUNS = 128, 256, 2
PREFILL = (8, 1920)
GOALS = {"bf16": (1.10, 1.10, 1.12, 1.15, 1.05), "fp8": (1.25, 1.20, 1.20, 1.20, 1.10),
         "int4": (1.50, 1.35, 1.15, 1.10, 1.0)}  # fmt: skip
Generate = Callable[[list[list[int]], int], list[list[int]]]


def prompts(count: int, length: int) -> list[list[int]]:
    """Random prompts, the same in every process."""
    draw = random.Random(count)
    return [[draw.randrange(100, 120_000) for _ in range(length)] for _ in range(count)]


def ours(path: Path) -> tuple[Generate, str]:
    """`generate` of the embedded engine over the checkpoint at `path`."""
    import torch

    import trtbuild
    from trtbuild.runtime import Engine, EngineConfig, KvCacheConfig, SamplingParams

    config = EngineConfig(
        max_batch_size=256, max_num_tokens=16384, max_seq_len=2048, device="cuda",
        kv_cache=KvCacheConfig(max_tokens=256 * 512, enable_block_reuse=False),
    )  # fmt: skip
    engine = Engine.load(path, config=config)
    assert engine.facts.path == "fast", engine.facts.path

    def generate(asked: list[list[int]], count: int) -> list[list[int]]:
        done = engine.generate(asked, SamplingParams(max_tokens=count, ignore_eos=True))
        return [list(one.token_ids) for one in done]

    return generate, f"trtbuild {trtbuild.__version__}, torch {torch.__version__}"


def vllm(path: Path) -> tuple[Generate, str]:
    """`generate` of vLLM over the checkpoint at `path`."""
    import vllm as package
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(path), skip_tokenizer_init=True, max_model_len=2048, max_num_seqs=256, max_num_batched_tokens=16384,
        gpu_memory_utilization=0.85, enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": list(BATCHES)},
    )  # fmt: skip

    def generate(asked: list[list[int]], count: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=count, ignore_eos=True, temperature=0.0, detokenize=False)
        done = engine.generate([{"prompt_token_ids": one} for one in asked], params, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in done]

    return generate, f"vLLM {package.__version__}"


def measure(generate: Generate) -> dict[str, Any]:
    """Milliseconds a step by batch, prefill tokens a second, and the first tokens of 64 prompts."""

    def seconds(asked: list[list[int]], count: int) -> float:
        started = time.perf_counter()
        assert all(len(one) == count for one in generate(asked, count))
        return time.perf_counter() - started

    found: dict[str, Any] = {"step": {}}
    for batch in BATCHES:
        asked = prompts(batch, PROMPT)
        seconds(asked, 1)
        seconds(asked, NEW)
        steps = [(seconds(asked, NEW) - seconds(asked, 1)) / (NEW - 1) * 1000 for _ in range(RUNS)]
        found["step"][str(batch)] = statistics.median(steps)
    asked = prompts(*PREFILL)
    seconds(asked, 1)
    found["prefill"] = PREFILL[0] * PREFILL[1] / statistics.median(seconds(asked, 1) for _ in range(RUNS + 1))
    found["first"] = [one[0] for one in generate(prompts(64, PROMPT), 1)]
    return found


def child(engine: str, form: str, work: Path, results: Path) -> None:
    """One engine's part."""
    path = work / files(engine, form)
    started = time.perf_counter()
    generate, version = {"ours": ours, "vllm": vllm}[engine](path)
    ready = time.perf_counter() - started
    import torch

    found = measure(generate) | {"ready": ready, "version": version, "device": torch.cuda.get_device_name(),
                                 "date": time.strftime("%Y-%m-%d")}  # fmt: skip
    known = read(results)
    known[f"{form} {engine}"] = found
    results.write_text(json.dumps(known, indent=1))
    print({key: value for key, value in found.items() if key != "first"}, flush=True)


def files(engine: str, form: str) -> str:
    """The checkpoint that `engine` reads of `form`."""
    return "int4-ct" if (engine, form) == ("vllm", "int4") else form


def read(results: Path) -> dict[str, Any]:
    """What is known already."""
    return json.loads(results.read_text()) if results.is_file() else {}


def table(known: dict[str, Any]) -> None:
    """Print the results as Markdown."""
    print("| format | case | ours | vLLM | ratio | goal |\n|---|---|---|---|---|---|")
    for form, goals in GOALS.items():
        mine, theirs = known.get(f"{form} ours"), known.get(f"{form} vllm")
        if not mine or not theirs:
            continue
        for batch, goal in zip(BATCHES, goals, strict=False):
            a, b = mine["step"][str(batch)], theirs["step"][str(batch)]
            rates = " | ".join(f"{batch / step * 1000:,.0f} tok/s ({step:.2f} ms)" for step in (a, b))
            print(f"| {form} | batch {batch} | {rates} | {b / a:.2f} | {goal:.2f}{', missed' * (b / a < goal)} |")
        ratio = mine["prefill"] / theirs["prefill"]
        print(
            f"| {form} | prefill {PREFILL[0]}x{PREFILL[1]} | {mine['prefill']:,.0f} tok/s "
            f"| {theirs['prefill']:,.0f} tok/s | {ratio:.2f} | {goals[-1]:.2f}{', missed' * (ratio < goals[-1])} |"
        )
        same = sum(a == b for a, b in zip(mine["first"], theirs["first"], strict=True))
        print(f"| {form} | same first token | {same} of {len(mine['first'])} | | | |")
        print(f"| {form} | ready after | {mine['ready']:.0f} s | {theirs['ready']:.0f} s | | |")


def main() -> None:
    """Run both engines in processes of their own, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table", "write", "child"))
    parser.add_argument("--format", default="bf16")
    parser.add_argument("--engines", default="ours,vllm")
    parser.add_argument("--results", type=Path, default=Path("side_by_side.json"))
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/trtbuild-benchmark"))
    arguments = parser.parse_args()
    if arguments.command == "table":
        table(read(arguments.results))
        return
    if arguments.command == "write":
        from checkpoints import write

        write(arguments.format, arguments.work / arguments.format)
        return
    for engine in arguments.engines.split(","):
        if arguments.command == "child":
            child(engine, arguments.format, arguments.work, arguments.results)
        elif f"{arguments.format} {engine}" not in read(arguments.results):
            places = ["--work", str(arguments.work), "--results", str(arguments.results)]
            this = [sys.executable, __file__]
            # Files are written by a process of their own: an engine must find the GPU empty.
            subprocess.run([*this, "write", "--format", files(engine, arguments.format), *places], check=True)
            subprocess.run([*this, "child", "--format", arguments.format, "--engines", engine, *places], check=False)


if __name__ == "__main__":
    main()
