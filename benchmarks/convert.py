"""The conversion to a TensorRT-LLM checkpoint against copying the same bytes: a 7B-sized INT4 model of random codes.

    python benchmarks/convert.py [--layers 32] [--runs 3] [--tp 2] [--directory DIR]

Makes the checkpoint (Llama 2 7B's sizes, W4A16_AWQ in groups of 128) in a temporary directory, then alternately copies
its files and converts them in a fresh process; what was written is removed in between and the disk is synchronized, so
that both sides begin alike. A figure is the median; memory is the converting process's peak. Everything is removed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from os import sync
from pathlib import Path

import numpy as np

HIDDEN, MLP, HEADS, VOCAB, GROUP = 4096, 11008, 32, 32000, 128
BYTES = {"BF16": 2, "F32": 4, "U8": 1}
Shapes = dict[str, tuple[str, tuple[int, ...]]]


def tensors(layers: int) -> Shapes:
    """Name, type and shape of every tensor, as ModelOpt's unified export has them."""
    made: Shapes = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), ("BF16", (VOCAB, HIDDEN)))
    made["model.norm.weight"] = ("BF16", (HIDDEN,))
    linears = {f"self_attn.{letter}_proj": (HIDDEN, HIDDEN) for letter in "qkvo"}
    linears |= {"mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN), "mlp.down_proj": (HIDDEN, MLP)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made[f"{prefix}{norm}.weight"] = ("BF16", (HIDDEN,))
        for name, (rows, columns) in linears.items():
            made[f"{prefix}{name}.weight"] = ("U8", (rows // 2, columns))
            made[f"{prefix}{name}.weight_scale"] = ("F32", (rows, columns // GROUP))
            if name in {"self_attn.o_proj", "mlp.down_proj"}:
                made[f"{prefix}{name}.pre_quant_scale"] = ("BF16", (columns,))
    return made


def make_checkpoint(path: Path, layers: int) -> None:
    """Write config and one safetensors file; the data is a random block over and over."""
    path.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": MLP,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": VOCAB,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0,
    }  # fmt: skip
    quantization = {"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": None, "group_size": GROUP}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}), encoding="utf-8")
    header, end = {}, 0
    for name, (dtype, shape) in tensors(layers).items():
        size = int(np.prod(shape)) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    block = np.random.default_rng(0).integers(0, 256, 16 << 20, dtype=np.uint8).tobytes()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin in range(0, end, len(block)):
            file.write(block[: min(len(block), end - begin)])


def convert(source: Path, output: Path, tp: int) -> int:
    """Convert in a child process and return its peak resident bytes."""
    request = output.with_name("request.json")
    request.write_text(json.dumps({"source": str(source), "output": str(output), "tp_size": tp}), encoding="utf-8")
    command = [sys.executable, "-m", "trtbuild.convert", str(request)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout.splitlines()[-1])["usage"]["peak_memory_bytes"])


def main() -> None:
    """Print a Markdown row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--directory", type=Path)
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {"copy": [], "convert": []}
    peak = 0
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        source, output = Path(directory) / "source", Path(directory) / "output"
        make_checkpoint(source, arguments.layers)
        size = (source / "model.safetensors").stat().st_size
        for _ in range(arguments.runs):
            for side, seconds in times.items():
                sync()
                started = time.perf_counter()
                if side == "copy":
                    shutil.copytree(source, output)
                else:
                    peak = max(peak, convert(source, output, arguments.tp))
                seconds.append(time.perf_counter() - started)
                shutil.rmtree(output)
    copied, converted = (statistics.median(seconds) for seconds in times.values())
    print("| layers | tp | GB | copy s | convert s | speed of copying | peak MB | goal |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {arguments.layers} | {arguments.tp} | {size / 1e9:.2f} | {copied:.2f} | {converted:.2f} "
        f"| {copied / converted:.2f} | {peak / 1e6:.0f} | 0.5, 2048 |"
    )


if __name__ == "__main__":
    main()
