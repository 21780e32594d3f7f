"""FP8 and INT4-AWQ of a random model in the shape of Llama 3.1 8B: trtbuild beside ModelOpt in memory and plain copies.

    PYTHONPATH=builder python benchmarks/gpu/compress.py [--formats fp8,int4_awq] [--layers 32] [--work DIR]

Makes the checkpoint (16 GB in bf16), then, each in a process of its own: `cp` of its files; trtbuild's compress step;
ModelOpt alone on the model as Transformers loads it (`mtq.quantize`, `export_hf_checkpoint`). Prints seconds of the
whole process, from first read to last write, and the peak of GPU memory; then compares the two outputs tensor by
tensor. `--peer-batch` is how many samples ModelOpt's calibration loop runs at once; outputs can be equal in every bit
only if it is ours. `--device cpu --width 256` runs the same without a GPU, to check the benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

CALIBRATION = {"data": None, "column": None, "seed": 0}
_FILE_BYTES = 5_000_000_000


def make_checkpoint(directory: Path, options: argparse.Namespace) -> None:
    """Write the random model in files of at most 5 GB, and a tokenizer."""
    import torch
    from safetensors.torch import save_file

    from tiny import save_tokenizer

    directory.mkdir(parents=True)
    width, middle, vocabulary = options.width, options.width * 7 // 2, options.vocabulary
    heads = width // 128
    keys = max(heads // 4, 1)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": width,
        "intermediate_size": middle, "num_hidden_layers": options.layers, "num_attention_heads": heads,
        "num_key_value_heads": keys, "head_dim": 128, "vocab_size": vocabulary, "hidden_act": "silu",
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 0,
        "eos_token_id": 2, "pad_token_id": 2, "rope_theta": 500000.0,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    save_tokenizer(directory)
    sides = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (keys * 128, width),
        "self_attn.v_proj": (keys * 128, width), "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (middle, width), "mlp.up_proj": (middle, width), "mlp.down_proj": (width, middle),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for index in range(options.layers):
        for name, side in sides.items():
            shapes[f"model.layers.{index}.{name}.weight"] = side
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{index}.{name}.weight"] = (width,)
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}
    generator = torch.Generator(options.device).manual_seed(0)
    weight_map: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}
    files = 0

    def flush() -> None:
        nonlocal files
        name = f"part-{files:02d}.safetensors"
        save_file(held, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, name))
        held.clear()
        files += 1

    for name, shape in shapes.items():
        value = torch.empty(shape, dtype=torch.bfloat16, device=options.device)
        value = value.normal_(0.0, 0.02, generator=generator) if len(shape) > 1 else value.fill_(1.0)
        if sum(tensor.nbytes for tensor in held.values()) + value.nbytes > _FILE_BYTES:
            flush()
        held[name] = value.cpu()
    flush()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def run_ours(source: Path, output: Path, options: argparse.Namespace, form: str) -> dict[str, Any]:
    """The compress step as the build runs it."""
    request = {
        "source": str(source), "output": str(output), "format": form, "sparsity": "none", "kv_cache": "none",
        "group_size": 128 if form == "int4_awq" else None, "exclude": [], "device": options.device,
        "calibration": CALIBRATION | {"count": options.samples, "length": options.length},
    }  # fmt: skip
    path = output.with_suffix(".json")
    path.write_text(json.dumps(request))
    seconds, answer = child([sys.executable, "-m", "trtbuild.compress", str(path)])
    if "result" not in answer:
        raise SystemExit(str(answer))
    phases, device = answer["result"]["seconds"], answer["result"]["device"] or {}
    return {
        "whole": seconds,
        "work": phases["load"] + phases["layers"],
        "phases": phases,
        "gpu": device.get("peak_memory_bytes", 0),
        "gpu_reserved": device.get("peak_reserved_bytes", 0),
        "host": answer["usage"]["peak_memory_bytes"],
        "notes": answer["result"]["notes"],
    }


def run_peer(source: Path, output: Path, options: argparse.Namespace, form: str) -> dict[str, Any]:
    """ModelOpt alone; see `peer`."""
    arguments = [str(Path(__file__).resolve()), "--peer", form, "--source", str(source), "--output", str(output)]
    arguments += ["--samples", str(options.samples), "--length", str(options.length), "--device", options.device]
    seconds, answer = child([sys.executable, *arguments, "--peer-batch", str(options.peer_batch)])
    return answer | {"whole": seconds}


def peer(options: argparse.Namespace) -> dict[str, Any]:
    """Quantize with ModelOpt the model that Transformers loads, in this process."""
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    from trtbuild.compress.textdata import CalibrationSpec, load_samples
    from trtbuild.worker import peak_memory_bytes

    spec = CalibrationSpec(data=None, column=None, count=options.samples, length=options.length, seed=0)
    samples = load_samples(spec, options.source).input_ids
    ids = torch.tensor([list(sample) for sample in samples])
    marks = [time.monotonic()]
    model = AutoModelForCausalLM.from_pretrained(options.source, dtype=torch.bfloat16, device_map=options.device)
    marks.append(time.monotonic())

    def loop(model: Any) -> None:
        with torch.no_grad():
            for batch in ids.to(model.device).split(options.peer_batch):
                model(input_ids=batch, use_cache=False, logits_to_keep=1)

    mtq.quantize(model, {"fp8": mtq.FP8_DEFAULT_CFG, "int4_awq": mtq.INT4_AWQ_CFG}[options.peer], loop)
    marks.append(time.monotonic())
    export_hf_checkpoint(model, export_dir=options.output)
    marks.append(time.monotonic())
    steps = [round(end - begin, 2) for begin, end in pairwise(marks)]
    on_gpu = options.device == "cuda"
    return {
        "work": marks[-1] - marks[0],
        "phases": dict(zip(("load", "quantize", "export"), steps, strict=True)),
        "gpu": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "gpu_reserved": torch.cuda.max_memory_reserved() if on_gpu else 0,
        "host": peak_memory_bytes(),
        "notes": [],
    }


def child(command: list[str]) -> tuple[float, dict[str, Any]]:
    """(seconds, the JSON object in the last line that was printed) of a process."""
    started = time.monotonic()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "builder"), os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    seconds = time.monotonic() - started
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    answer: dict[str, Any] = json.loads(lines[-1])
    return seconds, answer


def compare(ours: Path, theirs: Path, every: int) -> str:
    """How many tensors of every so manieth layer are equal in every bit, and which share of bytes the others differ."""
    import torch
    from safetensors import safe_open

    def places(directory: Path) -> dict[str, Path]:
        found = {}
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                found.update(dict.fromkeys(file.keys(), path))
        return found

    mine, other = places(ours), places(theirs)
    equal, unequal, kinds = 0, 0, {}
    opened = {path: safe_open(path, "pt") for path in {*mine.values(), *other.values()}}
    for name in sorted(mine.keys() & other.keys()):
        if (layer := re.search(r"layers\.(\d+)\.", name)) and int(layer[1]) % every:
            continue
        a, b = opened[mine[name]].get_tensor(name), opened[other[name]].get_tensor(name)
        if a.dtype == b.dtype and a.shape == b.shape:
            different = int((a.reshape(-1).view(torch.uint8) != b.reshape(-1).view(torch.uint8)).sum())
            share = different / max(a.nbytes, 1)
        else:
            share = 1.0
            print(f"  {name}: {a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}")
        equal, unequal = equal + (share == 0), unequal + (share > 0)
        if share:
            kind = name.rpartition(".")[2] if "layers" in name else name
            kinds[kind] = (kinds.get(kind, (0, 0.0))[0] + 1, max(kinds.get(kind, (0, 0.0))[1], share))
    missing = len(mine.keys() ^ other.keys())
    return f"{equal} tensors equal in every bit, {unequal} not {kinds}, {missing} in one of both alone"


def copied(source: Path, scratch: Path) -> float:
    """Seconds to copy the source's files, from and to memory as far as the system likes."""
    started = time.monotonic()
    shutil.copytree(source, scratch)
    seconds = time.monotonic() - started
    shutil.rmtree(scratch)
    return seconds


def show(who: str, form: str, found: dict[str, Any]) -> None:
    """Print one row."""
    sizes = [f"{found[name] / 1e9:6.2f}" for name in ("gpu", "gpu_reserved", "host")]
    row = [f"{form:9}", f"{who:9}", f"{found['whole']:7.1f}", f"{found['work']:7.1f}", *sizes, str(found["phases"])]
    print("  ".join(row), *found["notes"], flush=True)


def main() -> None:
    """Run everything and print rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="fp8,int4_awq")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--peer-batch", type=int, default=1)
    parser.add_argument("--compare-every", type=int, default=1, help="of so many layers one is compared")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, default=Path("/tmp/gpu_compress"))
    for hidden in ("--peer", "--source", "--output"):
        parser.add_argument(hidden, type=str if hidden == "--peer" else Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        print(json.dumps(peer(options)))
        return
    shutil.rmtree(options.work, ignore_errors=True)
    source = options.work / "source"
    make_checkpoint(source, options)
    os.sync()  # or what is yet to be written of it would slow down who comes first
    size = sum(path.stat().st_size for path in source.iterdir()) / 1e9
    print(f"source {size:.2f} GB; copied in {copied(source, options.work / 'scratch'):.1f} s", flush=True)
    print("format     who        whole s   work s  GPU GB  reserved  host GB  phases")
    for form in options.formats.split(","):
        ours, theirs = options.work / f"ours-{form}", options.work / f"peer-{form}"
        mine = run_ours(source, ours, options, form)
        show("trtbuild", form, mine)
        if not options.no_peer:
            other = run_peer(source, theirs, options, form)
            show("ModelOpt", form, other)
            ratios = [f"{name} {mine[name] / other[name]:.2f}" for name in ("whole", "work", "gpu") if other[name]]
            print(f"{form}: {', '.join(ratios)}; {compare(ours, theirs, options.compare_every)}", flush=True)
        for path in (ours, theirs):
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
