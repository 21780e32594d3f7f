"""The embedded engine against Transformers' `generate`: same checkpoint, float32 on both sides, same threads, one run.

    python benchmarks/engine_cpu.py [--runs 5] [--threads 2]

Cases, in the order of RESULTS.md:
  one     one request, prompt 64, 128 new tokens
  eight   eight requests at once (prompts 16, 32, 64, 64, 128, 128, 256, 256; outputs 32 to 128 by a fixed seed) against
          `generate` for one after another, and against `generate` on one left-padded batch that runs to the longest
Both sides are timed alternately; a figure is the median over the runs, and a ratio is taken between medians.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from trtbuild.runtime import Engine, EngineConfig, SamplingParams

ROOT = Path(__file__).parents[1]
PROMPT_LENGTHS = (16, 32, 64, 64, 128, 128, 256, 256)
MODEL = Path("~/.cache/trtbuild/models/SmolLM2-135M-Instruct").expanduser()


def engine_directory() -> Path:
    """The engine of the bf16 example, built (or reused) through the command line."""
    recipe = ROOT / "examples" / "smollm2-bf16.yaml"
    command = [sys.executable, "-m", "trtbuild", "build", str(recipe), "--until", "engine"]
    return Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


def median_times(runs: int, sides: dict[str, Callable[[], int]]) -> dict[str, tuple[float, int]]:
    """Median seconds and token count of each side; one untimed round first, then alternating."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    tokens = {name: run() for name, run in sides.items()}
    for _ in range(runs):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: (statistics.median(times[name]), tokens[name]) for name in sides}


def generate(model: torch.nn.Module, prompts: Sequence[list[int]], new: int) -> torch.Tensor:
    """Transformers' greedy `generate` on a left-padded batch, exactly `new` tokens each."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )[:, width:]


def main() -> None:
    """Run every case and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    directory = engine_directory()
    config = EngineConfig.read(directory)
    # No prefix reuse: every timed run would otherwise find its own prompt in the cache.
    config = replace(config, kv_cache=replace(config.kv_cache, enable_block_reuse=False), compute_dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    draw = random.Random(0)
    prompts = [[draw.randrange(100, 40_000) for _ in range(length)] for length in PROMPT_LENGTHS]
    lengths = [draw.randint(32, 128) for _ in prompts]
    with Engine.load(directory, config=config) as engine:
        one = [draw.randrange(100, 40_000) for _ in range(64)]

        def ours(batch: Sequence[list[int]], new: Sequence[int]) -> int:
            params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in new]
            requests = [engine.submit(prompt, param) for prompt, param in zip(batch, params, strict=True)]
            return sum(len(request.result().token_ids) for request in requests)

        check_equal_tokens(engine, model, one)
        single = median_times(
            arguments.runs,
            {"trtbuild": lambda: ours([one], [128]), "transformers": lambda: generate(model, [one], 128).numel()},
        )
        eight = median_times(
            arguments.runs,
            {
                "trtbuild": lambda: ours(prompts, lengths),
                "one after another": lambda: sum(
                    generate(model, [prompt], new).numel() for prompt, new in zip(prompts, lengths, strict=True)
                ),
                "padded batch": lambda: generate(model, prompts, max(lengths)).numel() and sum(lengths),
            },
        )
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {arguments.threads} threads, torch {torch.__version__}, median of {arguments.runs}\n")
    print("| case | trtbuild tok/s | peer | peer tok/s | ratio | goal |\n|---|---|---|---|---|---|")
    report("one request", single, "transformers", "1.0")
    report("eight at once", eight, "one after another", "2.5")
    report("eight at once", eight, "padded batch", "1.2")


def check_equal_tokens(engine: Engine, model: torch.nn.Module, prompt: list[int]) -> None:
    """Refuse to time two sides that do not do the same work."""
    ours = engine.submit(prompt, SamplingParams(max_tokens=32, ignore_eos=True)).result().token_ids
    theirs = generate(model, [prompt], 32)[0].tolist()
    if list(ours) != theirs:
        sys.exit(f"greedy tokens differ: {ours} against {theirs}")


def report(case: str, figures: dict[str, tuple[float, int]], peer: str, goal: str) -> None:
    """Print one row: useful tokens a second on both sides and their ratio."""
    (seconds, tokens), (peer_seconds, peer_tokens) = figures["trtbuild"], figures[peer]
    rate, peer_rate = tokens / seconds, peer_tokens / peer_seconds
    print(f"| {case} | {rate:.1f} | {peer} | {peer_rate:.1f} | {rate / peer_rate:.2f} | {goal} |")


if __name__ == "__main__":
    main()
