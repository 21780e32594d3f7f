"""Which kernel and share reads the weights of a linear layer fastest: the source of the table in linear.py.

    python benchmarks/gpu/tilings.py [--formats bf16,fp8,int4] [--rows 1,8,64,256]

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
from trtbuild.runtime.fast.kernels.few_rows import Block, few_rows
from trtbuild.runtime.fast.kernels.one_row import Tiling, one_row
from trtbuild.runtime.fast.kernels.one_row_int4 import Lines, one_row_int4
from trtbuild.runtime.fast.linear import Share

SIZES = {"qkv": (6144, 4096), "output": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
GROUP = 128
BYTES = {"bf16": 2.0, "fp8": 1.0, "int4": 0.5 + 2 / GROUP}
TILINGS = [(16, 512, 4, 3), (8, 512, 4, 3), (8, 1024, 4, 3), (4, 1024, 4, 3), (16, 256, 4, 4), (4, 2048, 8, 2)]
LINES = [(8, 8, 4), (8, 16, 4), (16, 4, 4), (16, 8, 4), (16, 8, 8), (32, 8, 8)]
BLOCKS = {
    "bf16": [(64, 128, 4, 4), (64, 256, 4, 3), (128, 64, 4, 5), (32, 256, 4, 4)],
    "fp8": [(64, 256, 4, 4), (64, 128, 4, 6), (128, 128, 4, 5), (32, 512, 4, 3)],
}
INT4_BLOCKS = [
    (64, 4, 2, 2),
    (64, 4, 3, 2),
    (64, 4, 2, 4),
    (64, 4, 3, 4),
    (128, 8, 3, 2),
    (128, 8, 4, 1),
    (64, 4, 3, 1),
]
PROGRAMS = (120, 400)  # fewer leave the device idle, more split the inputs for nothing


def shares(form: str, rows: int, outputs: int, *, gated: bool) -> list[Share]:
    """What is tried for `rows` rows and a matrix of `outputs` outputs."""
    if rows == 1:
        return [Lines(*one) for one in LINES] if form == "int4" else [Tiling(*one) for one in TILINGS]
    most = min(rows, 128)
    made = [Block(o, i, 1, w, s, rows=most) for o, i, w, s in BLOCKS.get(form, [])]
    if form == "int4":
        made = [Block(o, 0, 1, w, s, rows=most, groups=g) for o, w, s, g in INT4_BLOCKS]
    found: list[Share] = []
    for one in made:
        tiles = outputs // one.outputs
        splits = [1] if gated else [n for n in (1, 2, 4, 8, 16) if PROGRAMS[0] <= tiles * n <= PROGRAMS[1]]
        found += [Block(one.outputs, one.inputs, n, one.warps, one.stages, one.rows, one.groups) for n in splits]
    return found


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


class Case:
    """One layer at one number of rows, with enough copies of its weights."""

    def __init__(self, form: str, name: str, rows: int) -> None:
        self.form, self.gated = form, name == "gate_up"
        self.outputs, self.inputs = SIZES[name]
        self.bytes = self.outputs * self.inputs * BYTES[form]
        self.one = torch.tensor(1e-5, device="cuda")
        self.x = torch.randn(rows, self.inputs, device="cuda", dtype=torch.bfloat16)
        if form == "fp8":
            self.x = self.x.to(torch.float8_e4m3fn)
        self.weights = [self._weight() for _ in range(max(3, int(4e8 // self.bytes)))]

    def _weight(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.form == "int4":
            shape = (self.inputs // GROUP, self.outputs, GROUP // 2)
            scales = torch.rand(shape[:2], device="cuda").to(torch.bfloat16)
            return torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda"), scales
        weight = torch.randn(self.outputs, self.inputs, device="cuda", dtype=torch.bfloat16)
        return weight.to(self.x.dtype), None

    def library(self, weight: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        """The same on cuBLAS, with our activation behind it where `gated`."""
        fp8 = self.form == "fp8"
        if fp8:
            y = torch._scaled_mm(
                self.x, weight[0].t(), scale_a=self.one, scale_b=self.one, out_dtype=torch.bfloat16, use_fast_accum=True
            )
        else:
            y = torch.nn.functional.linear(self.x, weight[0])
        return silu_mul(y, self.one if fp8 else None) if self.gated else y

    def ours(self, share: Share, weight: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        """The same on our kernel of `share`."""
        codes, scales = weight
        if isinstance(share, Lines):
            assert scales is not None
            return one_row_int4(self.x, codes, scales, share, gated=self.gated)
        factor = self.one if self.form == "fp8" else None
        scale = self.one if self.form == "fp8" and self.gated else None
        if isinstance(share, Tiling):
            return one_row(self.x, codes, share, factor=factor, gated=self.gated, scale=scale)
        return few_rows(self.x, codes, share, scales=scales, factor=factor, gated=self.gated, scale=scale)


def measure(label: str, case: Case, rows: int, bandwidth: float) -> None:
    """Print a line for the library and for every share."""
    tried = shares(case.form, rows, case.outputs, gated=case.gated)
    calls: list[tuple[str, Callable[..., torch.Tensor]]] = [(str(one), partial(case.ours, one)) for one in tried]
    if case.form != "int4":
        calls.insert(0, ("library", case.library))
    for what, call in calls:
        try:
            found = seconds_each([partial(call, weight) for weight in case.weights])
        except Exception as error:  # noqa: BLE001  a share may not fit into shared memory
            print(f"{label} {what}: {type(error).__name__}", flush=True)
            continue
        print(f"{label} {what}: {found * 1e6:.1f} us, {case.bytes / bandwidth / found:.2f}", flush=True)


def main() -> None:
    """Measure every size with every share and with the library."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="bf16,fp8,int4")
    parser.add_argument("--rows", default="1,8,64,256")
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    for form in arguments.formats.split(","):
        for rows in map(int, arguments.rows.split(",")):
            for name in SIZES:
                measure(f"{form} {rows} {name}", Case(form, name, rows), rows, bandwidth)


if __name__ == "__main__":
    main()
