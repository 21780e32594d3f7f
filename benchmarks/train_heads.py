"""Train Medusa heads and an EAGLE-3 draft for SmolLM2 in minutes on a CPU: loss, acceptance by position, time.

    python benchmarks/train_heads.py [--method medusa] [--method eagle3] [--samples 64] [--epochs 2] [--threads 2]

Model: SmolLM2-135M-Instruct, uncompressed, float32. Prompts: questions about passages of the calibration text that
trtbuild ships, through the chat template. The draft step runs as in a build (`trtbuild.training`), and its own numbers
are printed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from trtbuild.training.run import run

MODEL = Path("~/.cache/trtbuild/models/SmolLM2-135M-Instruct").expanduser()
TEXT = Path(__file__).parents[1] / "builder" / "trtbuild" / "_text" / "calibration.jsonl"
QUESTIONS = ("What is this passage about?", "Summarize this passage in one sentence.", "Who or what is named here?")
WORDS = 40


def save_prompts(path: Path) -> None:
    """A conversation a line: a question and the beginning, middle or end of a document."""
    with path.open("w", encoding="utf-8") as file:
        for line in TEXT.read_text(encoding="utf-8").splitlines():
            words = json.loads(line)["text"].split()
            for number, question in enumerate(QUESTIONS):
                start = number * max(len(words) - WORDS, 0) // (len(QUESTIONS) - 1)
                content = f"{question}\n\n{' '.join(words[start : start + WORDS])}"
                file.write(json.dumps({"messages": [{"role": "user", "content": content}]}) + "\n")


def train(method: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The result of one draft step."""
    own = {"num_heads": 3, "learning_rate": 1e-3} if method == "medusa" else {
        "ttt_steps": 3, "learning_rate": 5e-4, "captured": [1, 14, 26]
    }  # fmt: skip
    request = {
        "method": method, "checkpoint": str(MODEL), "prompts": str(folder / "prompts.jsonl"),
        "output": str(folder / method), "work": str(folder / f"{method}.work"), "key": method, "weights": "benchmark",
        "format": "none", "column": None, "samples": arguments.samples, "held_out": 0.15, "max_seq_len": 192,
        "max_answer_tokens": 64, "epochs": arguments.epochs, "batch_size": 4, "num_layers": 1, "seed": 0,
        "device": arguments.device, "trust_remote_code": False,
    }  # fmt: skip

    def progress(done: int, total: int, what: str) -> None:
        print(f"{method}: {done}/{total} {what}", file=sys.stderr)

    return run(request | own, progress)


def main() -> None:
    """Print a Markdown table, each row as soon as it is known, and every result as JSON below it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append", choices=("medusa", "eagle3"))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = ("method", "prompts", "steps", "loss", "accepted, held out", "accepted, learned", "tokens a step")
    print(f"| {' | '.join((*names, 'answer s', 'train s'))} |")
    print("|---|---|---|---|---|---|---|---|---|")
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        save_prompts(Path(directory) / "prompts.jsonl")
        for method in arguments.method or ("medusa", "eagle3"):
            results[method] = train(method, Path(directory), arguments)
            print(row(method, results[method]), flush=True)
    print(json.dumps(results))


def row(method: str, result: dict[str, Any]) -> str:
    """One line of the table; losses are means of the first and the last three steps."""
    held, learned = (result["acceptance"][name] for name in ("held_out", "learned"))
    shares = [" / ".join(f"{share:.2f}" for share in part["accepted"]) for part in (held, learned)]
    loss = [value for _, value in result["loss"]]
    cells = (
        method,
        f"{result['prompts']['learned']} + {result['prompts']['held_out']}",
        str(result["steps"]),
        f"{sum(loss[:3]) / 3:.2f} to {sum(loss[-3:]) / 3:.2f}",
        *shares,
        f"{held['tokens_per_step']:.2f}",
        f"{result['seconds']['answers']:.0f}",
        f"{result['seconds']['train']:.0f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
