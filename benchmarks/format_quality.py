"""Quality of every format on one model: perplexity, KL divergence, top-1 agreement, bits per weight; and a picture.

    PYTHONPATH=builder python benchmarks/format_quality.py MODEL_DIR [--only fp8,nvfp4] [--work DIR] [--picture FILE]

Each format is compressed as the build does, and its exported files are measured as the build's evaluation does: by the
embedded engine, against Transformers in float32. "ModelOpt in memory" is `mtq.quantize` on the same calibration text,
measured on the same windows through ModelOpt's own fake quantization, for the formats that it can compute on a CPU.
Formats that the model's shape does not allow are named. One process for each format; results are kept in --work, so
that a second run only draws. The picture needs matplotlib (the extra `bench`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

CALIBRATION = {"data": None, "column": None, "count": 8, "length": 256, "seed": 0}
TOKENS, LENGTH, GROUP = 4096, 512, 64
# (format, KV cache)
ROWS: tuple[tuple[str, str], ...] = (
    *((name, "none") for name in (
        "none", "fp8", "fp8_per_channel_per_token", "fp8_block", "int8_sq", "int8_weight_only", "int4_awq", "w4a8_awq",
        "nvfp4", "w4a16_nvfp4", "mxfp8", "mxfp4",
    )),
    ("none", "fp8"), ("none", "nvfp4"), ("none", "int8"), ("fp8", "fp8"), ("fp8", "nvfp4"),
)  # fmt: skip
# What ModelOpt 0.47 computes on a CPU.
IN_MEMORY = {"fp8", "fp8_per_channel_per_token", "int8_sq", "int8_weight_only", "int4_awq", "w4a8_awq"}


def main() -> None:
    """Measure what is asked for, print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, default=Path("format-quality"))
    parser.add_argument("--only", default="", help="formats, separated by commas")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        name, cache = given.one.split("+")
        _write(given.work / f"{given.one}.json", measure(given.model, given.work, name, cache))
        return
    given.work.mkdir(parents=True, exist_ok=True)
    wanted = [row for row in ROWS if not given.only or row[0] in given.only.split(",")]
    for name, cache in wanted:
        label = f"{name}+{cache}"
        if not (given.work / f"{label}.json").exists():
            command = [sys.executable, __file__, str(given.model), "--work", str(given.work), "--one", label]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    results = [json.loads((given.work / f"{name}+{cache}.json").read_text()) for name, cache in wanted]
    print(table(results))
    if given.picture:
        draw(results, given.picture)


def measure(model: Path, work: Path, name: str, cache: str) -> dict[str, Any]:
    """One row: compress, evaluate the files, and evaluate ModelOpt's model in memory."""
    from trtbuild.compress.run import run as compress
    from trtbuild.errors import TrtbuildError
    from trtbuild.evaluate.run import run as evaluate

    output = work / f"{name}+{cache}"
    row: dict[str, Any] = {"format": name, "kv_cache": cache}
    try:
        compress(request(model, output, name, cache), _silent)
    except TrtbuildError as error:
        return row | {"refused": str(error)}
    quality = evaluate(
        {
            "source": str(model), "engine": str(output), "tokens": TOKENS, "length": LENGTH, "device": "cpu",
            "kv_cache_dtype": "auto" if cache == "none" else cache, "trust_remote_code": False,
        },
        _silent,
    )  # fmt: skip
    row |= {"ours": _numbers(quality), "bits": bits_per_weight(output)}
    if (name in IN_MEMORY and cache in ("none", "fp8")) or (name == "none" and cache in ("fp8", "int8")):
        row["modelopt"] = in_memory(model, request(model, output, name, cache))
    return row


def request(model: Path, output: Path, name: str, cache: str) -> dict[str, Any]:
    """What the compress step is asked for."""
    from trtbuild.weight_formats import takes_group

    return {
        "source": str(model), "tokenizer": str(model), "output": str(output), "format": name,
        "group_size": GROUP if takes_group(name) else None, "sparsity": "none", "sparsity_method": "sparsegpt",
        "kv_cache": cache, "exclude": [], "calibration": CALIBRATION, "trust_remote_code": False, "device": "cpu",
    }  # fmt: skip


def in_memory(model: Path, raw: dict[str, Any]) -> dict[str, float]:
    """ModelOpt's own fake quantization of the whole model, before any export."""
    import torch

    from trtbuild.compress.quantize import _config
    from trtbuild.compress.request import parse_request
    from trtbuild.compress.textdata import CalibrationSpec, HeldoutSpec, heldout_windows, load_samples
    from trtbuild.evaluate.metrics import score_window, summarize
    from trtbuild.evaluate.reference import Reference

    import modelopt.torch.quantization as mtq  # isort: skip
    from transformers import AutoModelForCausalLM

    reference = Reference(model, device="cpu", trust_remote_code=False)
    quantized = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    samples = load_samples(CalibrationSpec(**CALIBRATION), model)  # type: ignore[arg-type]

    def loop(running: Any) -> None:
        with torch.no_grad():
            for sample in samples.input_ids:
                running(input_ids=torch.tensor([sample]), use_cache=False, logits_to_keep=1)

    mtq.quantize(quantized, _config(parse_request(raw)), loop)
    windows = heldout_windows(HeldoutSpec(data=None, tokens=TOKENS, length=LENGTH), model, trust_remote_code=False)
    scores = []
    for window in windows.input_ids:
        with torch.no_grad():
            found = quantized(input_ids=torch.tensor([window[:-1]]), use_cache=False).logits[0]
        scores.append(score_window(reference.logits(window[:-1]), found, torch.tensor(window[1:])))
    quality = asdict(summarize(scores))
    return {
        "perplexity": quality["engine_perplexity"],
        "kl": quality["kl_divergence"]["value"],
        "top1": quality["top1_agreement"]["value"],
    }


def bits_per_weight(directory: Path) -> float:
    """Bits in the file for each weight of a linear layer of the decoder, scales among them."""
    from trtbuild.runtime.checkpoint_files import TensorFiles, read_quantization
    from trtbuild.runtime.numerics import NUMERICS

    files, algorithm = TensorFiles(directory), read_quantization(directory).algorithm
    stored = weights = 0
    for name in files.names:
        layer, _, leaf = name.rpartition(".")
        if ".layers." not in name or not layer.endswith("_proj") or leaf in ("k_scale", "v_scale", "bias"):
            continue
        tensor = files.tensor(name)
        stored += tensor.numel() * tensor.element_size()
        if leaf == "weight":
            weights += tensor.numel() * (NUMERICS[algorithm].rows * NUMERICS[algorithm].columns if algorithm else 1)
    return 8 * stored / weights


def _numbers(result: dict[str, Any]) -> dict[str, float]:
    return {
        "perplexity": result["perplexity"]["engine"],
        "reference": result["perplexity"]["reference"],
        "ratio": result["perplexity"]["ratio"],
        "ratio_error": result["perplexity"]["ratio_standard_error"],
        "kl": result["kl_divergence"]["mean"],
        "top1": result["top1_agreement"]["share"],
        "file_bytes": result["bytes"]["engine"],
    }


def table(results: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = (
        "| format | KV cache | bits/weight | file MB | perplexity | ratio | KL (nats) | top-1 "
        "| ModelOpt in memory: perplexity, KL, top-1 |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|---|"]
    for row in results:
        if "refused" in row:
            lines.append(
                f"| {row['format']} | {row['kv_cache']} | refused: {row['refused'].splitlines()[-1]} | | | | | | |"
            )
            continue
        ours, theirs = row["ours"], row.get("modelopt")
        shown = f"{theirs['perplexity']:.2f}, {theirs['kl']:.4f}, {theirs['top1']:.1%}" if theirs else "-"
        lines.append(
            f"| {row['format']} | {row['kv_cache']} | {row['bits']:.2f} | {ours['file_bytes'] / 1e6:.0f} "
            f"| {ours['perplexity']:.2f} | {ours['ratio']:.3f} ± {ours['ratio_error']:.3f} | {ours['kl']:.4f} "
            f"| {ours['top1']:.1%} | {shown} |"
        )
    return "\n".join(lines)


_KINDS = {
    "floats, 8 bits": ("fp8", "mxfp8"),
    "integers, 8 bits": ("int8",),
    "INT4": ("int4", "w4a8"),
    "FP4": ("nvfp4", "w4a16", "mxfp4"),
}


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Divergence from the original against bits per weight, for the formats of weights alone."""
    import matplotlib as mpl

    mpl.use("svg" if path.suffix == ".svg" else "agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    rows = [row for row in results if row["kv_cache"] == "none" and row["format"] != "none" and "ours" in row]
    for kind, prefixes in _KINDS.items():
        group = [row for row in rows if row["format"].startswith(prefixes)]
        axes.scatter([row["bits"] for row in group], [row["ours"]["kl"] for row in group], s=45, label=kind, zorder=3)
    for row in rows:
        left = row["bits"] > 7
        axes.annotate(
            row["format"], (row["bits"], row["ours"]["kl"]), xytext=(-8 if left else 8, 0), textcoords="offset points",
            ha="right" if left else "left", va="center", fontsize=9,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlim(4, 8.5)
    axes.set_xlabel("bits per weight in the file, with scales")
    axes.set_ylabel("KL divergence from the original model (nats per token)")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(frameon=False, loc="upper right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _write(path: Path, row: dict[str, Any]) -> None:
    path.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")


def _silent(done: int, total: int, what: str) -> None:
    del done, total, what


if __name__ == "__main__":
    main()
