"""Wall time of the light verbs as whole processes.

    python benchmarks/cli_times.py [--runs 7]

`trtbuild --help`, `check`, `plan` and a fully reused `build` of examples/smollm2-bf16.yaml, each a fresh process,
median; beside them the floor that no Python program goes under: `python -c pass`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "examples" / "smollm2-bf16.yaml")
GOALS = {"--help": 0.3, "check": 0.5, "plan": 0.7, "build (reused)": 1.5}


def wall(command: list[str], runs: int) -> float:
    """Median seconds of a command, after one untimed run."""
    times = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    trtbuild = str(Path(sys.executable).with_name("trtbuild"))
    with tempfile.TemporaryDirectory() as directory:
        commands = {
            "--help": [trtbuild, "--help"],
            "check": [trtbuild, "check", RECIPE],
            "plan": [trtbuild, "plan", RECIPE],
            "build (reused)": [trtbuild, "build", RECIPE, "-o", f"{directory}/package"],
        }
        floor = wall([sys.executable, "-c", "pass"], runs)
        print("| command | seconds | goal | python -c pass |\n|---|---|---|---|")
        for name, command in commands.items():
            print(f"| trtbuild {name} | {wall(command, runs):.2f} | {GOALS[name]} | {floor:.2f} |")


if __name__ == "__main__":
    main()
