"""The shipped examples: each builds within its gate and answers a question through the real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trtbuild.serving.client import ask
from trtbuild.serving.server import TritonServer

pytestmark = [pytest.mark.smollm2, pytest.mark.triton]
ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
# What the measured ratios may be on any machine: rounding differs a little from one processor to the next.
RATIOS = {
    "smollm2-2to4-fp8": (2.7, 3.72),
    "smollm2-bf16": (0.999, 1.001),
    "smollm2-fp8": (1.02, 1.05),
    "smollm2-int4-awq": (1.15, 1.28),
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", EXAMPLES, ids=lambda path: path.stem)
def test_each_example_builds_and_serves(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.getbasetemp() / "examples"  # one store, so that equal steps run once
    out = home / recipe.stem
    command = [
        sys.executable,
        "-m",
        "trtbuild",
        "build",
        str(recipe),
        "-o",
        str(out),
        "--set",
        f"store={home / 'store'}",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT / "builder")}
    )
    assert done.returncode == 0, done.stderr
    quality = json.loads((out / "evidence" / "quality.json").read_text())
    low, high = RATIOS[recipe.stem]
    assert low <= quality["perplexity"]["ratio"] <= high
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    with TritonServer.start(out / "model_repository", log=home / f"{recipe.stem}.log") as server:
        answer = ask(server.grpc_url, messages, max_tokens=16)
    assert answer.num_output_tokens >= 1
    if recipe.stem in ("smollm2-bf16", "smollm2-fp8"):  # in four bits, or pruned, a model this small forgets it
        assert "Paris" in answer.text


def test_every_example_has_its_ratio() -> None:
    assert sorted(RATIOS) == [path.stem for path in EXAMPLES]
    assert EXAMPLES
