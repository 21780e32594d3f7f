"""What Triton adds to the bare engine: time per request and per token, and total throughput, with 1 and 8 clients.

    python benchmarks/triton_overhead.py [--runs 3] [--package DIR]

Both sides run the same package (the bf16 example) with prompts of 64 random token ids and 64 greedy tokens a request,
EOS ignored. The bare engine runs in a child process, the served one inside Triton's python backend, one after
the other, with the machine otherwise idle. Clients stream over gRPC. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from trtbuild.serving.client import ask
from trtbuild.serving.server import TritonServer

ROOT = Path(__file__).parents[1]
PROMPT, NEW = 64, 64
Rounds = list[list[list[list[int]]]]  # round, client, request, token ids
Timed = tuple[float, list[tuple[float, float]]]

_BARE = """
import json, sys, threading, time
from trtbuild.runtime import Engine, SamplingParams
rounds, new = json.loads(sys.argv[2]), int(sys.argv[3])
params = SamplingParams(max_tokens=new, ignore_eos=True)
def client(engine, own, out):
    for prompt in own:
        started = time.perf_counter()
        first = None
        for output in engine.submit(prompt, params):
            first = first or time.perf_counter() - started
        out.append((first, time.perf_counter() - started))
with Engine.load(sys.argv[1]) as engine:
    engine.submit(rounds[0][0][0], params).result()
    for clients in rounds:
        out, started = [], time.perf_counter()
        threads = [threading.Thread(target=client, args=(engine, own, out)) for own in clients]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        print(json.dumps([time.perf_counter() - started, out]), flush=True)
"""


def draw_prompts(clients: int, each: int, seed: int) -> list[list[list[int]]]:
    """Prompts of every client; all differ, so that no run profits from another's blocks."""
    draw = random.Random(seed)
    return [[[draw.randrange(100, 40_000) for _ in range(PROMPT)] for _ in range(each)] for _ in range(clients)]


def bare(package: Path, rounds: Rounds) -> list[Timed]:
    """(wall seconds, [(first token, whole request), ...]) of every round on the engine alone."""
    command = [sys.executable, "-c", _BARE, str(package / "engine"), json.dumps(rounds), str(NEW)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def served(server: TritonServer, rounds: Rounds) -> list[Timed]:
    """The same over gRPC streams."""
    results = []
    for clients in rounds:
        out: list[tuple[float, float]] = []

        def client(own: list[list[int]], out: list[tuple[float, float]] = out) -> None:
            for prompt in own:
                answer = ask(server.grpc_url, input_ids=prompt, max_tokens=NEW, ignore_eos=True)
                out.append((answer.seconds_to_first_token, answer.seconds))

        started = time.perf_counter()
        threads = [threading.Thread(target=client, args=(own,)) for own in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        results.append((time.perf_counter() - started, out))
    return results


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--package", type=Path, help="a package; default: the bf16 example, built into a temporary place"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        package = arguments.package or Path(directory) / "package"
        if arguments.package is None:
            recipe = ROOT / "examples" / "smollm2-bf16.yaml"
            subprocess.run([sys.executable, "-m", "trtbuild", "build", str(recipe), "-o", str(package)], check=True)
        rows = []
        for clients, each in ((1, 3), (8, 2)):
            rounds = [draw_prompts(clients, each, seed) for seed in range(arguments.runs)]
            alone = bare(package, rounds)
            with TritonServer.start(package / "model_repository", log=Path(directory) / "serve.log") as server:
                ask(
                    server.grpc_url, input_ids=rounds[0][0][0], max_tokens=NEW, ignore_eos=True
                )  # the first one warms up
                over = served(server, [draw_prompts(clients, each, 1000 + seed) for seed in range(arguments.runs)])
            rows.append((clients, clients * each * NEW, alone, over))
    columns = (
        "clients",
        "bare tok/s",
        "Triton tok/s",
        "ratio",
        "goal",
        "added ms a request",
        "to the first token",
        "a token",
    )
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for clients, tokens, alone, over in rows:
        report(clients, tokens, alone, over)


def report(clients: int, tokens: int, alone: list[Timed], over: list[Timed]) -> None:
    """Print one row from the medians over rounds (throughput) and over requests (latency)."""
    rates = [tokens / statistics.median(wall for wall, _ in side) for side in (alone, over)]
    first = [statistics.median(times[0] for _, out in side for times in out) for side in (alone, over)]
    whole = [statistics.median(times[1] for _, out in side for times in out) for side in (alone, over)]
    added, added_first = (1000 * (pair[1] - pair[0]) for pair in (whole, first))
    per_token = (added - added_first) / (NEW - 1)
    cells = (clients, f"{rates[0]:.1f}", f"{rates[1]:.1f}", f"{rates[1] / rates[0]:.3f}", "0.95")
    times = (f"{added:.1f}", f"{added_first:.1f}", f"{per_token:.2f}")
    print("| " + " | ".join(map(str, (*cells, *times))) + " |")


if __name__ == "__main__":
    main()
