"""Speculation in the embedded engine on a CPU: what it drafts, what is accepted, and what that gains or costs.

    python benchmarks/speculative_cpu.py [--runs 3] [--threads 2] [--tokens 96] [--layers 6]

Model: SmolLM2-135M-Instruct in float32, greedy, without prefix reuse. Every row is timed in turn with the engine that
drafts nothing, in one process; a figure is the median over the runs. Methods:
  ngram           prompt lookup over the request's own text, 4 tokens behind patterns of up to 3
  draft_target    the model's own first layers, its norm and head, as draft: never trained for that
  the model       the model as its own draft: the most that the draft's acceptance can be, at the full price
Texts: a passage that was repeated a few times already ("repetitive") and an open question through the chat template
("free"), alone and four at once.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from trtbuild.runtime import Engine, EngineConfig, KvCacheConfig, SamplingParams, SpeculativeConfig

MODEL = Path("~/.cache/trtbuild/models/SmolLM2-135M-Instruct").expanduser()
TEXTS = {
    "repetitive": [
        "The quick brown fox jumps over the lazy dog and runs back to its den. " * 4,
        "| day | open | close |\n| Monday | 09:00 | 17:00 |\n| Tuesday | 09:00 | 17:00 |\n" * 3,
        "for item in items:\n    total = total + item.price * item.count\n    print(item.name, total)\n" * 3,
        "Thank you for your order. We will send it to you within two days. " * 4,
    ],
    "free": [
        "Why is the sky blue in the day and red in the evening?",
        "Tell me a short story about a lighthouse keeper who finds a letter.",
        "What should I think of before I adopt a dog?",
        "Explain how a bicycle stays upright to somebody who has never seen one.",
    ],
}


@dataclass
class Side:
    """One engine and its times for the batch at hand."""

    name: str
    engine: Engine
    times: list[float] = field(default_factory=list)
    tokens: list[tuple[int, ...]] = field(default_factory=list)
    counts: tuple[int, int, int] = (0, 0, 0)

    def run(self, prompts: list[list[int]], new: int, *, timed: bool) -> None:
        """Answer all prompts at once."""
        before, started = self.engine.stats(), time.perf_counter()
        found = self.engine.generate(prompts, SamplingParams(max_tokens=new, ignore_eos=True))
        if timed:
            self.times.append(time.perf_counter() - started)
        after = self.engine.stats()
        self.tokens = [one.token_ids for one in found]
        self.counts = (
            after.steps - before.steps,
            after.draft_tokens - before.draft_tokens,
            after.accepted_draft_tokens - before.accepted_draft_tokens,
        )


def truncated(target: Path, layers: int) -> None:
    """Write the model's first layers as a model of their own."""
    target.mkdir()
    for path in MODEL.iterdir():
        if path.suffix in (".json", ".jinja", ".txt"):
            (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((MODEL / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    tensors = {name: tensor for path in sorted(MODEL.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})


@contextmanager
def engines(layers: int) -> Iterator[list[Side]]:
    """The engine that drafts nothing, then one for each method."""
    sections = {
        "none": None,
        "ngram": SpeculativeConfig("ngram", max_draft_len=4, max_matching_ngram_size=3, is_public_pool=False),
        f"draft_target, {layers} of 30 layers": SpeculativeConfig("draft_target", max_draft_len=3, draft="cut"),
        "draft_target, the model": SpeculativeConfig("draft_target", max_draft_len=3, draft="whole"),
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for path in MODEL.iterdir():
            (root / path.name).symlink_to(path)
        truncated(root / "cut", layers)
        (root / "whole").symlink_to(MODEL)
        sides = []
        for name, section in sections.items():
            config = EngineConfig(
                device="cpu", compute_dtype="float32", max_batch_size=4, speculative=section,
                kv_cache=KvCacheConfig(max_tokens=4096, enable_block_reuse=False),
            )  # fmt: skip
            sides.append(Side(name, Engine.load(root, config=config)))
        try:
            yield sides
        finally:
            for side in sides:
                side.engine.close()


def prompt_of(tokenizer: Any, text: str, *, raw: bool) -> list[int]:
    """A text to be continued as it stands, or a question as a chat."""
    if raw:
        return list(tokenizer.encode(text))
    chat = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])


def report(text: str, batch: int, side: Side, plain: Side) -> None:
    """One row: what was drafted and what that gained over the engine without drafts."""
    steps, drafted, accepted = side.counts
    tokens = sum(map(len, side.tokens))
    speed = statistics.median(plain.times) / statistics.median(side.times)
    same = sum(one == other for one, other in zip(side.tokens, plain.tokens, strict=True))
    rate = f"{accepted / drafted:.2f}" if drafted else "-"
    print(
        f"| {text} | {batch} | {side.name} | {tokens / statistics.median(side.times):.1f} | {rate} | {drafted} | "
        f"{tokens / steps / batch:.2f} | {speed:.2f} | {same} of {batch} |",
        flush=True,
    )


def main() -> None:
    """Run every case and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--layers", type=int, default=6)
    arguments = parser.parse_args()
    if not MODEL.is_dir():
        sys.exit(f"{MODEL} is missing; build examples/smollm2-bf16.yaml once")
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {arguments.threads} threads, torch {torch.__version__}, median of {arguments.runs}\n")
    print("| text | requests | method | tok/s | acceptance | drafted | tokens a step | speed-up | same tokens |")
    print("|---|---|---|---|---|---|---|---|---|")
    with engines(arguments.layers) as sides:
        for text, questions in TEXTS.items():
            prompts = [prompt_of(tokenizer, question, raw=text == "repetitive") for question in questions]
            for batch in (1, 4):
                for side in sides:
                    side.times.clear()
                    side.run(prompts[:batch], 8, timed=False)
                for _ in range(arguments.runs):
                    for side in sides:
                        side.run(prompts[:batch], arguments.tokens, timed=True)
                for side in sides:
                    report(text, batch, side, sides[0])


if __name__ == "__main__":
    main()
