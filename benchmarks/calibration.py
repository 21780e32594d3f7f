"""Quality after calibration with the shipped text, and with text that the model itself has written.

    PYTHONPATH=builder python benchmarks/calibration.py MODEL_DIR [--count 16] [--length 256] [--tokens 8192]

Compresses the model in each format with each text, measures the result against the original on the shipped held-out
text, and prints one row for each. Compression and evaluation run in child processes, as in a build. The files are
written under --work and removed at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

FORMATS: dict[str, dict[str, Any]] = {"fp8": {"format": "fp8"}, "int4_awq": {"format": "int4_awq", "group_size": 64}}
TEXTS: dict[str, dict[str, Any]] = {
    "shipped, seed 0": {"seed": 0}, "shipped, seed 1": {"seed": 1}, "self, seed 0": {"data": "self", "seed": 0},
    "self, seed 1": {"data": "self", "seed": 1}, "self, padded": {"data": "self", "seed": 0, "packing": "padded"},
}  # fmt: skip


def child(module: str, request: dict[str, Any], path: Path) -> dict[str, Any]:
    """The result of one step in a process of its own."""
    path.write_text(json.dumps(request))
    done = subprocess.run([sys.executable, "-m", module, str(path)], capture_output=True, text=True, check=False)
    answer = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}
    if "result" not in answer:
        raise SystemExit(f"{module}: {answer.get('error') or done.stderr[-2000:]}")
    return dict(answer["result"])


def measure(model: Path, name: str, text: str, arguments: argparse.Namespace) -> None:
    """Compress, evaluate and print one row."""
    output = arguments.work / "out"
    shutil.rmtree(output, ignore_errors=True)
    calibration = {"column": None, "count": arguments.count, "length": arguments.length} | TEXTS[text]
    request = {
        "source": str(model), "output": str(output), "group_size": None, "sparsity": "none", "kv_cache": "none",
        "exclude": [], "device": "auto", "calibration": calibration,
    } | FORMATS[name]  # fmt: skip
    compressed = child("trtbuild.compress", request, arguments.work / "compress.json")
    request = {
        "source": str(model), "engine": str(output), "tokens": arguments.tokens, "length": 512, "data": None,
        "device": "auto", "kv_cache_dtype": "auto",
    }  # fmt: skip
    quality = child("trtbuild.evaluate", request, arguments.work / "evaluate.json")
    ratio, kl, top = quality["perplexity"], quality["kl_divergence"], quality["top1_agreement"]
    numbers = [
        f"{ratio['engine']:.3f}",
        f"{ratio['ratio']:.4f} ± {ratio['ratio_standard_error']:.4f}",
        f"{kl['mean']:.4f} ± {kl['standard_error']:.4f}",
        f"{top['share']:.3f}",
    ]
    print("|", " | ".join([name, text, *numbers, compressed["calibration"]["summary"]]), "|", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--texts", default=";".join(TEXTS), help="some of them, with semicolons between")
    parser.add_argument("--work", type=Path, default=Path("calibration-benchmark"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    print("| format | text | perplexity | ratio | KL, nats | top-1 | calibrated on |", flush=True)
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in arguments.formats.split(","):
        for text in arguments.texts.split(";"):
            measure(arguments.model.expanduser().resolve(), name, text, arguments)
    shutil.rmtree(arguments.work)


if __name__ == "__main__":
    main()
