"""Which kernel and tiling reads the weights of a linear layer fastest: the source of the table in linear.py.

    python benchmarks/gpu/tilings.py [--formats bf16,fp8]

The sizes are those of Llama 3.1 8B. Each figure is microseconds a call inside a CUDA graph that goes through enough
copies of the weights to find none of them in the L2 cache, and the share of the measured copy bandwidth.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from speed import copy_bandwidth, device_seconds

from trtbuild.runtime.fast.kernels.activation import silu_mul
from trtbuild.runtime.fast.kernels.one_row import Tiling, one_row

SIZES = {"qkv": (6144, 4096), "output": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
TILINGS = [(16, 512, 4, 3), (8, 512, 4, 3), (8, 1024, 4, 3), (4, 1024, 4, 3), (16, 256, 4, 4), (4, 2048, 8, 2)]


def seconds_each(calls: list[Callable[[], object]]) -> float:
    """The time of one of `calls`, run after one another in a graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return device_seconds(graph.replay, 10) / len(calls)


def library(x: torch.Tensor, weight: torch.Tensor, one: torch.Tensor, *, gated: bool) -> torch.Tensor:
    """The same on cuBLAS, with our activation behind it where `gated`."""
    fp8 = x.dtype == torch.float8_e4m3fn
    if fp8:
        y = torch._scaled_mm(x, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    else:
        y = torch.nn.functional.linear(x, weight)
    return silu_mul(y, one if fp8 else None) if gated else y


def measure(label: str, weights: list[torch.Tensor], bandwidth: float, *, gated: bool) -> None:
    """Print a line for the library and for every tiling."""
    outputs, inputs = weights[0].shape
    fp8 = weights[0].dtype == torch.float8_e4m3fn
    one = torch.tensor(1e-5, device="cuda")
    x = torch.randn(1, inputs, device="cuda", dtype=torch.bfloat16).to(weights[0].dtype)

    def show(what: str, call: Callable[[torch.Tensor], object]) -> None:
        try:
            found = seconds_each([partial(call, weight) for weight in weights])
        except Exception as error:  # noqa: BLE001  a tiling may not fit into shared memory
            print(f"{label} {what}: {type(error).__name__}", flush=True)
            return
        share = outputs * inputs * weights[0].itemsize / bandwidth / found
        print(f"{label} {what}: {found * 1e6:.1f} us, {share:.2f}", flush=True)

    show("library", lambda weight: library(x, weight, one, gated=gated))
    scale = one if gated and fp8 else None
    for tiling in TILINGS:
        chosen = Tiling(*tiling)
        show(
            str(tiling),
            lambda weight, chosen=chosen: one_row(
                x, weight, chosen, factor=one if fp8 else None, gated=gated, scale=scale
            ),
        )


def main() -> None:
    """Measure every size with every tiling and with the library."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="bf16,fp8")
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    for form in arguments.formats.split(","):
        dtype = torch.float8_e4m3fn if form == "fp8" else torch.bfloat16
        for name, (outputs, inputs) in SIZES.items():
            count = max(3, int(4e8 // (outputs * inputs * dtype.itemsize)))
            weights = [
                torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16).to(dtype) for _ in range(count)
            ]
            measure(f"{form} {name}", weights, bandwidth, gated=name == "gate_up")


if __name__ == "__main__":
    main()
