"""Peak memory of every heavy step, and of the served engine, for the example recipes.

    python benchmarks/memory.py [RECIPE ...]

Steps report the peak of their own process (``evidence/build.json`` and ``quality.json``); the serving process is
Triton's python stub, whose peak is read from /proc after one answered request.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from trtbuild.serving.client import ask
from trtbuild.serving.server import TritonServer

ROOT = Path(__file__).parents[1]
RECIPES = ("smollm2-bf16", "smollm2-fp8")


def main() -> None:
    """Print a Markdown table, in MB."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [ROOT / "examples" / f"{name}.yaml" for name in RECIPES]
    parser.add_argument("recipes", nargs="*", type=Path, default=default)
    print("| recipe | weights on disk | compress | evaluate | serving |\n|---|---|---|---|---|")
    for recipe in parser.parse_args().recipes:
        with tempfile.TemporaryDirectory() as directory:
            package = Path(directory) / "package"
            command = [sys.executable, "-m", "trtbuild", "build", str(recipe), "-o", str(package)]
            subprocess.run(command, check=True, capture_output=True)
            build = json.loads((package / "evidence" / "build.json").read_text(encoding="utf-8"))
            quality = json.loads((package / "evidence" / "quality.json").read_text(encoding="utf-8"))
            peaks = (
                build["bytes"]["engine"],
                build["steps"]["compress"]["usage"]["peak_memory_bytes"],
                quality["usage"]["peak_memory_bytes"],
                serving_peak(package),
            )
        print(f"| {recipe.stem} | " + " | ".join(f"{peak / 1e6:.0f}" for peak in peaks) + " |")


def serving_peak(package: Path) -> int:
    """Peak resident bytes of the largest process below the server after one answer."""
    log = package.with_name("serve.log")
    with TritonServer.start(package / "model_repository", log=log) as server:
        ask(server.grpc_url, "Say something about memory.", max_tokens=64)
        processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        return max(peak_bytes(process.pid) for process in processes)


def peak_bytes(pid: int) -> int:
    """VmHWM of one process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
