"""Peak memory and time of streamed compression against depth, and its time against plain copies of the same bytes.

    PYTHONPATH=builder python benchmarks/compress_stream.py [--width 1024] [--depths 8,32] [--format fp8] [--work DIR]
    PYTHONPATH=builder python benchmarks/compress_stream.py --like-70b --depths 1,3 --samples 8 --length 512

Makes random Llama-shaped checkpoints of one width and several depths, compresses each in a child process of its own as
the build does, and prints one row for each. `copies` is the time to read the source's files and to write the output's
with plain file copies, warm. The files are written under --work and removed at the end.

`--like-70b` makes the first layers of a model in the shape of Llama 3.1 70B, gives the compression 8 GiB, and from the
two depths says how long all 80 layers take.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from tiny import VOCAB_SIZE, save_tokenizer


def make_checkpoint(
    directory: Path, *, width: int, middle: int, depth: int, key_heads: int = 0, vocabulary: int = VOCAB_SIZE
) -> None:
    """Write a random bf16 checkpoint, one file for each decoder layer."""
    directory.mkdir(parents=True)
    heads = max(width // 128, 1)
    key_heads = key_heads or max(heads // 4, 1)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": width,
        "intermediate_size": middle, "num_hidden_layers": depth, "num_attention_heads": heads,
        "num_key_value_heads": key_heads, "head_dim": 128, "vocab_size": vocabulary, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 0,
        "eos_token_id": 2, "pad_token_id": 2, "rope_theta": 10000.0,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    save_tokenizer(directory)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)

    outer = {"model.embed_tokens.weight": random(vocabulary, width), "lm_head.weight": random(vocabulary, width)}
    save(directory / "outer.safetensors", outer | {"model.norm.weight": torch.ones(width, dtype=torch.bfloat16)})
    weight_map = dict.fromkeys([*outer, "model.norm.weight"], "outer.safetensors")
    keys = key_heads * 128
    for index in range(depth):
        prefix = f"model.layers.{index}"
        sides = {
            "self_attn.q_proj": (heads * 128, width), "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width), "self_attn.o_proj": (width, heads * 128),
            "mlp.gate_proj": (middle, width), "mlp.up_proj": (middle, width), "mlp.down_proj": (width, middle),
        }  # fmt: skip
        layer = {f"{prefix}.{name}.weight": random(*side) for name, side in sides.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            layer[f"{prefix}.{name}.weight"] = torch.ones(width, dtype=torch.bfloat16)
        save(directory / f"layer-{index:03d}.safetensors", layer)
        weight_map |= dict.fromkeys(layer, f"layer-{index:03d}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write one file."""
    save_file(tensors, path, metadata={"format": "pt"})


def compress(source: Path, output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Compress in a child process; return its answer."""
    request = {
        "source": str(source), "output": str(output), "group_size": None, "sparsity": "none", "kv_cache": "none",
        "exclude": [], "device": "cpu",
    } | settings  # fmt: skip
    path = output.with_suffix(".request.json")
    path.write_text(json.dumps(request))
    done = subprocess.run(
        [sys.executable, "-m", "trtbuild.compress", str(path)], capture_output=True, text=True, check=False
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}
    if "result" not in answer:
        raise SystemExit(f"{answer.get('error') or done.stderr[-3000:]}")
    return answer


def copies(source: Path, output: Path, scratch: Path) -> float:
    """Seconds to read the source's tensors and to write as many bytes as the output has, by plain file copies."""
    started = time.monotonic()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(4 << 20):
                pass
    for path in sorted(output.glob("*.safetensors")):
        shutil.copyfile(path, scratch / path.name)
    taken = time.monotonic() - started
    shutil.rmtree(scratch)
    return taken


def main() -> None:
    """Print one row for each depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--middle", type=int, help="intermediate size; 3.5 times the width unless given")
    parser.add_argument("--depths", default="8,32")
    parser.add_argument("--format", default="fp8")
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--like-70b", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("/tmp/compress_stream"))
    options = parser.parse_args()
    shape: dict[str, int] = {"width": options.width, "middle": options.middle or options.width * 7 // 2}
    if options.like_70b:
        shape = {"width": 8192, "middle": 28672, "key_heads": 8, "vocabulary": 128256}
    calibration = {"data": None, "column": None, "count": options.samples, "length": options.length, "seed": 0}
    settings = {"format": options.format, "group_size": options.group_size, "calibration": calibration}
    settings |= {"max_memory": 8 << 30} if options.like_70b else {}
    measured: dict[int, tuple[float, int]] = {}
    print(
        "layers  source GB  output GB  peak GB  seconds  phases "
        + " " * 52
        + "copies s  layers and whole against copies"
    )
    for depth in map(int, options.depths.split(",")):
        work = options.work / f"{shape['width']}-{depth}"
        shutil.rmtree(work, ignore_errors=True)
        make_checkpoint(work / "source", depth=depth, **shape)
        (work / "scratch").mkdir()
        os.sync()  # or the disk is still busy with the source
        answer = compress(work / "source", work / "output", settings)
        usage, phases = answer["usage"], answer["result"]["seconds"]
        sizes = [
            sum(path.stat().st_size for path in (work / name).glob("*.safetensors")) for name in ("source", "output")
        ]
        measured[depth] = usage["seconds"], usage["peak_memory_bytes"]
        os.sync()
        plain = copies(work / "source", work / "output", work / "scratch")
        row = [f"{depth:6}", *(f"{size / 1e9:9.2f}" for size in sizes), f"{usage['peak_memory_bytes'] / 1e9:7.2f}"]
        row += [f"{usage['seconds']:7.1f}", f"{phases!s:56}", f"{plain:8.2f}"]
        row += [f"{seconds / plain:5.2f}" for seconds in (phases["layers"], usage["seconds"])]
        print("  ".join(row), flush=True)
        print(*answer["result"]["notes"], sep="\n", end="")
        shutil.rmtree(work)
    if options.like_70b:
        fewer, more = min(measured), max(measured)
        layer = (measured[more][0] - measured[fewer][0]) / (more - fewer)
        print(f"a layer takes {layer:.1f} s, so 80 layers about {measured[more][0] + (80 - more) * layer:.0f} s")


if __name__ == "__main__":
    main()
