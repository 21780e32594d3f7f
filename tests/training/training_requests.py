"""Requests of the draft step over tiny checkpoints: seconds of work each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = (
    *(
        "model",
        "answers",
        "question",
        "stream",
        "tokens",
        "recipe",
        "checkpoint",
        "deployment",
        "quick",
        "brown",
        "fox",
    ),
    *("lazy", "dog", "proven", "work"),
)


def save_prompts(path: Path, count: int = 24) -> Path:
    """Different short prompts, made of few words."""
    rows = [
        " ".join(WORDS[(number * step) % len(WORDS)] for step in (1, 2, 3)) + f" {number}" for number in range(count)
    ]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def make_request(checkpoint: Path, folder: Path, method: str, **changes: Any) -> dict[str, Any]:
    """A request whose files lie below `folder`; prompts are made where there are none."""
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        save_prompts(prompts)
    own = {"num_heads": 2} if method == "medusa" else {"ttt_steps": 2, "captured": [0, 1]}
    request: dict[str, Any] = {
        "method": method, "checkpoint": str(checkpoint), "prompts": str(prompts), "output": str(folder / "draft"),
        "work": str(folder / "work"), "key": "key", "weights": "w" * 64, "format": "none", "column": None,
        "samples": 20, "held_out": 0.2, "max_seq_len": 64, "max_answer_tokens": 12, "epochs": 15, "batch_size": 8,
        "learning_rate": 1e-2, "num_layers": 1, "seed": 0, "device": "cpu", "trust_remote_code": False,
    }  # fmt: skip
    return request | own | changes


def silent(done: int, total: int, what: str) -> None:
    """A progress that only checks what it is told."""
    assert 0 <= done <= total
    assert what
