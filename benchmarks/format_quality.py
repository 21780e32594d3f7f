"""Quality of every format on one model: perplexity, KL divergence, top-1 agreement, bits per weight; and a picture.

    PYTHONPATH=builder python benchmarks/format_quality.py MODEL_DIR --work DIR [--only fp8,nvfp4] [--picture FILE.svg]

Each case is compressed as the build does, and its exported files are measured as the build's evaluation does: by the
embedded engine, against Transformers in float32. "ModelOpt in memory" is ModelOpt's own compression of the whole model
on the same calibration text, measured on the same windows through its fake quantization, before any export, where it
can compute that on a CPU. Formats that the model's shape or a CPU does not allow are named. One process for each case;
a finished one is kept as DIR/CASE.json, so that a run which was ended goes on there, and one with all cases only draws.
The original model's logits are computed once and kept under DIR/reference (0.8 GB for SmolLM2).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quality_picture import draw

CALIBRATION = {"data": None, "column": None, "count": 8, "length": 256, "seed": 0}
TOKENS, LENGTH, GROUP, BITS = 4096, 512, 64, 5.0
NO_CPU = "computes it on CUDA alone"


@dataclass(frozen=True, slots=True)
class Case:
    """One row: what is asked for, and why ModelOpt is not measured beside it; empty where it is."""

    name: str
    changes: dict[str, Any]
    no_peer: str = ""
    kv_cache: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_cache", self.changes.get("kv_cache", "none"))


def _formats(*names: str, no_peer: str = "") -> list[Case]:
    return [Case(name, {"format": name}, no_peer) for name in names]


AUTO = {"format": "none", "auto": {"formats": ["fp8", "int4_awq"], "target_bits": BITS, "method": "gradient"}}
CASES = {
    case.name: case
    for case in (
        Case("bf16", {"format": "none"}, "nothing is compressed"),
        *_formats("fp8", "fp8_per_channel_per_token", "fp8_block", "int8_sq", "int8_weight_only", "int4_awq"),
        *_formats("int4_gptq", no_peer="its GPTQ rounds a whole matrix for every column: too slow here"),
        *_formats("w4a8_awq"),
        *_formats("nvfp4", "nvfp4_awq", "w4a16_nvfp4", "mxfp8", "mxfp4", no_peer=NO_CPU),
        Case("auto-5-bits", AUTO, "the choice and the calibration are its own"),
        Case("2to4-fp8", {"format": "fp8", "sparsity": "2:4"}),
        Case("kv-fp8", {"format": "none", "kv_cache": "fp8"}),
        Case("kv-nvfp4", {"format": "none", "kv_cache": "nvfp4"}, NO_CPU),
        Case("kv-int8", {"format": "none", "kv_cache": "int8"}),
        Case("fp8-kv-fp8", {"format": "fp8", "kv_cache": "fp8"}),
        Case("fp8-kv-nvfp4", {"format": "fp8", "kv_cache": "nvfp4"}, NO_CPU),
    )
}


def main() -> None:
    """Measure what is asked for, print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", default=",".join(CASES), help="cases, separated by commas")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    model = given.model.expanduser().resolve()
    if given.one:
        write_json(given.work / f"{given.one}.json", measure(model, given.work / given.one, CASES[given.one]))
        return
    given.work.mkdir(parents=True, exist_ok=True)
    wanted = given.only.split(",")
    for name in wanted:
        if not (given.work / f"{name}.json").exists():
            command = [sys.executable, __file__, str(model), "--work", str(given.work), "--one", name]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            print(f"{name} is finished", file=sys.stderr, flush=True)
    results = [json.loads((given.work / f"{name}.json").read_text()) for name in wanted]
    print(table(results))
    if given.picture:
        given.picture.write_text(draw(results), encoding="utf-8")


def measure(model: Path, output: Path, case: Case) -> dict[str, Any]:
    """One row: compress, evaluate the files, and evaluate ModelOpt's model in memory."""
    import trtbuild.evaluate.run as evaluation
    from trtbuild.compress.run import run as compress
    from trtbuild.errors import TrtbuildError

    evaluation.Reference = lambda source, **_: KeptReference(source, output.parent / "reference")  # type: ignore[misc]
    row: dict[str, Any] = {"case": case.name, "kv_cache": case.kv_cache}
    shutil.rmtree(output, ignore_errors=True)
    started = time.monotonic()
    try:
        made = compress(request(model, output, case), silent)
    except TrtbuildError as error:
        return row | {"refused": str(error)}
    row |= {"compress_seconds": round(time.monotonic() - started), "bits": made["bits_per_weight"] or 16.0}
    quality = evaluation.run(
        {
            "source": str(model), "engine": str(output), "tokens": TOKENS, "length": LENGTH, "device": "cpu",
            "kv_cache_dtype": "auto" if case.kv_cache == "none" else case.kv_cache, "trust_remote_code": False,
        },
        silent,
    )  # fmt: skip
    shutil.rmtree(output)
    row["ours"] = {
        "perplexity": quality["perplexity"]["engine"],
        "ratio": quality["perplexity"]["ratio"],
        "ratio_error": quality["perplexity"]["ratio_standard_error"],
        "kl": quality["kl_divergence"]["mean"],
        "top1": quality["top1_agreement"]["share"],
        "file_bytes": quality["bytes"]["engine"],
    }
    return row | (
        {"no_peer": case.no_peer} if case.no_peer else {"modelopt": in_memory(model, output.parent / "reference", case)}
    )


def request(model: Path, output: Path, case: Case) -> dict[str, Any]:
    """What the compress step is asked for."""
    from trtbuild.weight_formats import takes_group

    grouped = "auto" in case.changes or takes_group(case.changes["format"])
    return {
        "source": str(model), "tokenizer": str(model), "output": str(output), "group_size": GROUP if grouped else None,
        "sparsity": "none", "sparsity_method": "sparsegpt", "kv_cache": "none", "exclude": [],
        "calibration": CALIBRATION, "trust_remote_code": False, "device": "cpu",
    } | case.changes  # fmt: skip


class KeptReference:
    """The original model as the evaluation has it, whose logits are kept in a directory."""

    def __init__(self, source: Path, kept: Path) -> None:
        self._source, self._kept, self._model = source, kept, None
        kept.mkdir(exist_ok=True)

    def logits(self, token_ids: tuple[int, ...]) -> Any:
        """The logits after each of `token_ids`, [tokens, vocabulary]."""
        import torch

        from trtbuild.evaluate.reference import Reference

        path = self._kept / f"{hashlib.sha256(json.dumps(list(token_ids)).encode()).hexdigest()[:16]}.pt"
        if not path.exists():
            self._model = self._model or Reference(self._source, device="cpu", trust_remote_code=False)
            torch.save(self._model.logits(token_ids).clone(), path.with_suffix(".unfinished"))
            path.with_suffix(".unfinished").replace(path)
        return torch.load(path, mmap=True)


def in_memory(model: Path, kept: Path, case: Case) -> dict[str, float]:
    """ModelOpt's own compression of the whole model, computed by its fake quantization."""
    import torch

    from trtbuild.compress.quantize import format_config, kv_config
    from trtbuild.compress.textdata import CalibrationSpec, HeldoutSpec, heldout_windows, load_samples
    from trtbuild.evaluate.metrics import score_window, summarize

    import modelopt.torch.quantization as mtq  # isort: skip
    import modelopt.torch.sparsity as mts
    from transformers import AutoModelForCausalLM

    reference = KeptReference(model, kept)
    changed = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    samples = load_samples(CalibrationSpec(**CALIBRATION), model)  # type: ignore[arg-type]

    def loop(running: Any) -> None:
        with torch.no_grad():
            for sample in samples.input_ids:
                running(input_ids=torch.tensor([sample]), use_cache=False, logits_to_keep=1)

    if "sparsity" in case.changes:
        rules = {"nn.Linear": {"*": {}, "*lm_head*": None}}
        mts.sparsify(changed, [("sparsegpt", rules)], config={"verbose": False, "forward_loop": loop})
        mts.export(changed)
    config = format_config(case.changes["format"], GROUP)
    if case.kv_cache != "none":
        config["quant_cfg"] = [*config["quant_cfg"], *kv_config(case.kv_cache)]
    mtq.quantize(changed, config, loop)
    windows = heldout_windows(HeldoutSpec(data=None, tokens=TOKENS, length=LENGTH), model, trust_remote_code=False)
    scores = []
    for window in windows.input_ids:
        with torch.no_grad():
            found = changed(input_ids=torch.tensor([window[:-1]]), use_cache=False).logits[0]
        scores.append(score_window(reference.logits(window[:-1]), found, torch.tensor(window[1:])))
    quality = asdict(summarize(scores))
    return {
        "perplexity": quality["engine_perplexity"],
        "kl": quality["kl_divergence"]["value"],
        "top1": quality["top1_agreement"]["value"],
    }


def table(results: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| case | bits/weight | file MB | perplexity | ratio | KL, nats | top-1 | ModelOpt: perplexity, KL, top-1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        if "refused" in row:
            lines.append(f"| {row['case']} | refused: {row['refused'].splitlines()[0]} | | | | | | |")
            continue
        ours, theirs = row["ours"], row.get("modelopt")
        shown = f"{theirs['perplexity']:.2f}, {theirs['kl']:.4f}, {theirs['top1']:.3f}" if theirs else row["no_peer"]
        lines.append(
            f"| {row['case']} | {row['bits']:.2f} | {ours['file_bytes'] / 1e6:.0f} | {ours['perplexity']:.2f} "
            f"| {ours['ratio']:.3f} ± {ours['ratio_error']:.3f} | {ours['kl']:.4f} | {ours['top1']:.3f} | {shown} |"
        )
    return "\n".join(lines)


def write_json(path: Path, row: dict[str, Any]) -> None:
    """Write one row so that a killed run leaves none that is half written."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def silent(done: int, total: int, what: str) -> None:
    """Say nothing of the progress."""


if __name__ == "__main__":
    main()
