"""`serve`, `ask` and `verify --served` as a user types them, against the real server."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tiny import save_checkpoint
from trtbuild.runtime import Engine, EngineConfig, SamplingParams

pytestmark = pytest.mark.triton
Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def urls(package: Path) -> Iterator[tuple[str, str]]:
    """(HTTP, gRPC) of ``trtbuild serve`` over the package; ends with Ctrl-C and exit code 0."""
    ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
    process = subprocess.Popen(
        [sys.executable, "-m", "trtbuild", "serve", str(package), *ports], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        ready = process.stdout.readline()
        found = re.fullmatch(r"ready: (http://\S+) \(HTTP\), (\S+) \(gRPC\), (http://\S+) \(metrics\)\n", ready)
        assert found is not None, ready
        yield found[1], found[2]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_ask_streams_over_grpc_and_answers_over_http(urls: tuple[str, str], cli: Cli) -> None:
    http, grpc = urls
    arguments = ("--model", "tiny", "--max-tokens", 12)
    streamed = cli("ask", "What is a token?", "--url", grpc, *arguments)
    whole = cli("ask", "What is a token?", "--url", http, "--no-stream", *arguments)
    assert streamed.stdout == whole.stdout
    assert re.search(r"\((stop|length); \d+ tokens, [\d.]+ tok/s, first token after [\d.]+ s\)", streamed.stderr)
    answer = json.loads(cli("ask", "What is a token?", "--url", grpc, "--json", *arguments).stdout)
    assert answer["text"] + "\n" == whole.stdout
    assert 1 <= len(answer["output_ids"]) <= 12


def test_sampling_with_a_seed_repeats(urls: tuple[str, str], cli: Cli) -> None:
    arguments = ("--url", urls[1], "--model", "tiny", "--max-tokens", 12, "--temperature", 1.5, "--seed", 3, "--raw")
    assert cli("ask", "Once", *arguments).stdout == cli("ask", "Once", *arguments).stdout


def test_refusals_of_the_server_are_sentences(urls: tuple[str, str], cli: Cli) -> None:
    done = cli("ask", "x", "--url", urls[1], "--model", "tiny", "--max-tokens", 100_000, check=2)
    assert "max_tokens" in done.stderr
    assert "Traceback" not in done.stderr
    assert cli("ask", "x", "--url", urls[1], "--model", "other", check=None).returncode != 0


def test_a_recipe_with_a_draft_becomes_a_package_that_drafts(
    recipe: Path, tiny_llama: Path, cli: Cli, tmp_path: Path
) -> None:
    draft = save_checkpoint(tmp_path / "draft", overrides={"num_hidden_layers": 1, "intermediate_size": 64})
    options = [f"speculative.{one}" for one in ("method=draft_target", f"draft={draft}", "draft_len_schedule={1: 5}")]
    cli("build", recipe, "-o", tmp_path / "p", *(item for one in options for item in ("--set", one)))
    engine = tmp_path / "p" / "engine"
    with Engine.load(engine) as drafting, Engine.load(tiny_llama, config=EngineConfig(device="cpu")) as plain:
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        found, expected = (one.generate([[5, 6, 7]], params)[0] for one in (drafting, plain))
        assert found.token_ids == expected.token_ids
        assert found.metrics.total_draft_tokens > 20
    assert "passed" in cli("verify", tmp_path / "p").stdout
    tokenizer = draft / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8").replace("<|im_start|>", "<|start|>"), encoding="utf-8")
    arguments = [item for one in options for item in ("--set", one)]
    assert "has another tokenizer than the model" in cli("check", recipe, *arguments, check=3).stderr


def test_nobody_answers(cli: Cli) -> None:
    done = cli("ask", "x", "--url", "http://127.0.0.1:9", check=6)
    assert "is the server running? `trtbuild serve PACKAGE`" in done.stderr


def test_verify_served_passes_and_a_missed_gate_is_exit_7(
    package: Path, recipe: Path, cli: Cli, tmp_path: Path
) -> None:
    checks = json.loads(cli("verify", package, "--served", "--json").stdout)
    assert [check["passed"] for check in checks] == [True] * len(checks)
    assert {"served perplexity", "streaming equals not streaming"} <= {check["name"] for check in checks}
    # The same package with evidence of a better original: then the served ratio misses the recipe's gate.
    out = tmp_path / "p"
    cli("build", recipe, "-o", out)
    quality = out / "evidence" / "quality.json"
    evidence = json.loads(quality.read_text())
    evidence["perplexity"]["reference"] /= 2
    rewrite(out, "evidence/quality.json", json.dumps(evidence))
    done = cli("verify", out, "--served", check=7)
    assert "the ratio exceeds quality.max_perplexity_ratio 1.01" in done.stdout


def test_layout_ensemble_is_built_and_verified(recipe: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "five"
    cli("build", recipe, "-o", out, "--set", "serving.layout=ensemble", "--set", "serving.model_name=tensorrt_llm")
    models = sorted(path.name for path in (out / "model_repository").iterdir())
    assert models == ["ensemble", "postprocessing", "preprocessing", "tensorrt_llm", "tensorrt_llm_bls"]
    for _ in range(3):
        done = cli("verify", out, "--served", "--json", check=None)
        if "process of model 'tensorrt_llm_bls' was ended by signal" not in done.stderr:
            break  # Triton 2.51 may crash that model, which is said with its cause; all else counts
        assert "Triton before 25.01" in done.stderr
    assert done.returncode == 0, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert all(check["passed"] for check in checks.values())
    assert checks["served greedy tokens equal the engine's"]["detail"].startswith("1.0000 of ")
    assert checks["served perplexity"]["detail"].startswith("not measured: layout ensemble reports no prompt")


def rewrite(package: Path, name: str, text: str) -> None:
    """Change a file of a package together with its line in the manifest (evidence is outside the package digest)."""
    import hashlib

    (package / name).write_text(text)
    manifest = json.loads((package / "manifest.json").read_text())
    for entry in manifest["files"]:
        if entry["path"] == name:
            entry |= {"size": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (package / "manifest.json").write_text(json.dumps(manifest))


def test_byte_code_is_neither_left_in_a_package_nor_taken_from_one(
    urls: tuple[str, str], package: Path, cli: Cli, tmp_path: Path
) -> None:
    places = list(package.rglob("__pycache__"))
    assert [path.read_bytes() for path in places] == [b""]  # still a file, although it is being served
    copy = Path(shutil.copytree(package, tmp_path / "copy"))
    forged = copy / "model_repository" / "tiny" / "1" / "__pycache__"
    forged.unlink()
    forged.mkdir()
    (forged / "model.cpython-311.pyc").write_bytes(b"anything")
    found = cli("verify", copy, check=5).stdout
    assert "model_repository/tiny/1/__pycache__ is missing" in found
    assert "model_repository/tiny/1/__pycache__/model.cpython-311.pyc was not part of it" in found
