"""Perplexity after 2:4 and INT4 of one checkpoint, by each method, on one set of calibration samples.

    PYTHONPATH=builder python benchmarks/compress_solvers.py CHECKPOINT [--count 32] [--length 512] [--group 64]
        [--cases dense,mask-only,...] [--work DIR]

`mask-only` is the SparseGPT of nvidia-modelopt 0.47, which chooses the mask and leaves the weights; the other cases are
requests of the compress step. Every checkpoint is read back from its files, as the embedded engine does, computed in
float32 and scored on the shipped held-out text. The files are written under --work and removed as they are done with.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from trtbuild.compress.run import run
from trtbuild.compress.textdata import CalibrationSpec, HeldoutSpec, heldout_windows, load_samples
from trtbuild.runtime.checkpoint import load_model

_SPARSE = {"sparsity": "2:4", "sparsity_method": "sparsegpt"}
CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "mask-only": {},
    "magnitude": _SPARSE | {"sparsity_method": "magnitude"},
    "sparsegpt": _SPARSE,
    "fp8": {"format": "fp8"},
    "sparsegpt+fp8": _SPARSE | {"format": "fp8"},
    "int4_awq": {"format": "int4_awq"},
    "int4_gptq": {"format": "int4_gptq"},
    "sparsegpt+int4_awq": _SPARSE | {"format": "int4_awq"},
    "sparsegpt+int4_gptq": _SPARSE | {"format": "int4_gptq"},
}


def mask_only(source: Path, output: Path, calibration: dict[str, Any]) -> None:
    """Prune with ModelOpt, the whole model in memory."""
    import modelopt.torch.sparsity as mts
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    samples = load_samples(CalibrationSpec(**calibration), source).input_ids

    def loop(model: Any) -> None:
        with torch.no_grad():
            for sample in samples:
                model(input_ids=torch.tensor([list(sample)]), use_cache=False, logits_to_keep=1)

    rules = {"nn.Linear": {"*": {}, "*lm_head*": None}}
    mts.sparsify(model, [("sparsegpt", rules)], config={"verbose": False, "forward_loop": loop})
    mts.export(model)
    model.to(torch.bfloat16).save_pretrained(output)
    for path in source.glob("tokenizer*"):
        shutil.copyfile(path, output / path.name)


def perplexity(directory: Path) -> float:
    """Of the checkpoint in `directory` on 4,096 held-out tokens, computed in float32."""
    spec = HeldoutSpec(data=None, tokens=4096, length=512)
    windows = heldout_windows(spec, directory).input_ids
    cpu = torch.device("cpu")
    loaded = load_model(directory, device=cpu, dtype=torch.float32, weights="auto", attn_implementation="sdpa")
    total = count = 0.0
    with torch.inference_mode():
        for window in windows:
            ids = torch.tensor([list(window)])
            logits = loaded.model(input_ids=ids, use_cache=False).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum"))
            count += len(window) - 1
    return math.exp(total / count)


def silent(done: int, total: int, what: str) -> None:
    """Say nothing of the progress."""


def measure(name: str, source: Path, output: Path, calibration: dict[str, Any], group: int) -> dict[str, Any]:
    """Compress as the case says and return its row."""
    started = time.monotonic()
    found: dict[str, Any] = {}
    if name == "mask-only":
        mask_only(source, output, calibration)
    else:
        changes = CASES[name]
        grouped = str(changes.get("format", "")).startswith("int4")
        request = {
            "source": str(source), "output": str(output), "format": "none", "kv_cache": "none", "sparsity": "none",
            "group_size": group if grouped else None, "exclude": [], "device": "cpu", "calibration": calibration,
        } | changes  # fmt: skip
        found = run(request, silent)
    seconds = time.monotonic() - started
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    row = {"case": name, "perplexity": round(perplexity(output), 3), "MB": round(size / 1e6), "seconds": round(seconds)}
    return row | {key: found[key] for key in ("sparsity", "output_error", "notes") if found.get(key)}


def main() -> None:
    """Print one JSON row for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--work", type=Path, default=Path("build/compress_solvers"))
    options = parser.parse_args()
    calibration = {"data": None, "column": None, "count": options.count, "length": options.length, "seed": 0}
    for name in options.cases.split(","):
        output = options.work / name
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        row = measure(name, options.checkpoint, output, calibration, options.group)
        print(json.dumps(row), flush=True)
        shutil.rmtree(output)


if __name__ == "__main__":
    main()
