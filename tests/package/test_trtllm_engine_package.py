"""A package for TensorRT engines: what is in it, the engine that its script adds, and what `verify` finds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine_host import EngineHost

Cli = Callable[..., subprocess.CompletedProcess[str]]
IMAGE = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"


@pytest.fixture
def package(engine_package: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(engine_package[0], tmp_path / "package"))


def checks(cli: Cli, package: Path, code: int) -> dict[str, dict[str, Any]]:
    done = cli("verify", package, "--json", check=code)
    return {check["name"]: check for check in json.loads(done.stdout)}


def change(path: Path, *changes: tuple[str, Any]) -> None:
    """Set values of a JSON file by dotted path."""
    path.chmod(0o644)
    document = json.loads(path.read_text())
    for place, value in changes:
        *sections, last = place.split(".", 1) if place.startswith("bytes.") else place.split(".")
        inner = document
        for section in sections:
            inner = inner[section]
        inner[last] = value
    path.write_text(json.dumps(document))


def test_the_package(engine_package: tuple[Path, str], cli: Cli) -> None:
    package, said = engine_package
    why = "the engine was not built here (nvidia-smi is not on PATH)"
    assert f"{why}: run {package}/engine/build.sh in reach of {IMAGE}, on 2 x SM90, then this build again" in said
    names = {path.relative_to(package / "engine").as_posix() for path in (package / "engine").rglob("*")}
    assert {"checkpoint/config.json", "checkpoint/rank0.safetensors", "checkpoint/rank1.safetensors"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "engine.json", "build.sh"} <= names
    assert not any(name.endswith("model.safetensors") or "hf_quant" in name for name in names)
    engine = json.loads((package / "engine" / "engine.json").read_text())
    assert (engine["runtime"], engine["version"], engine["gpu"], engine["world_size"]) == (
        "trtllm-engine", "1.2.1", "9.0", 2,
    )  # fmt: skip
    assert engine["limits"]["max_num_tokens"] == 4 * 256
    assert os.access(package / "engine" / "build.sh", os.X_OK)
    deploy = sorted(path.name for path in (package / "deploy").iterdir())
    assert deploy == ["Dockerfile", "OCI.md", "compose.yaml", "launch.sh"]
    launch = (package / "deploy" / "launch.sh").read_text()
    assert "engine=/package/engine/built" in launch
    assert launch.count('-n 1 "$server"') == 2
    assert 'python3 - 0,1 "$engine" <<' in launch, "the engine is held against engine.json"
    config = (package / "model_repository" / "tensorrt_llm" / "config.pbtxt").read_text()
    assert 'backend: "tensorrtllm"' in config
    assert "max_batch_size: 4" in config
    assert '"/package/engine/built"' in config
    found = json.loads(cli("inspect", package, "--json").stdout)
    assert (found["built"], found["checkpoint"]["mapping"]["tp_size"]) == (False, 2)
    assert found["engine"] == engine


def test_verify_reports_every_check(engine_package: tuple[Path, str], cli: Cli) -> None:
    found = checks(cli, engine_package[0], 0)
    assert list(found) == [
        "bytes", "lock", "engine.json", "TensorRT-LLM checkpoint: config", "TensorRT-LLM checkpoint: ranks",
        "TensorRT engine", "model repository", "deployment files",
    ]  # fmt: skip
    assert found["TensorRT engine"]["detail"] == f"not built yet: engine/build.sh builds it in {IMAGE}"
    assert [name for name, check in found.items() if not check["ran"]] == ["TensorRT engine"]
    assert f"not run TensorRT engine: not built yet: engine/build.sh builds it in {IMAGE}\n" in (
        cli("verify", engine_package[0]).stdout
    )
    assert found["TensorRT-LLM checkpoint: config"]["detail"] == "LlamaForCausalLM, FP8, KV cache FP8"
    assert found["TensorRT-LLM checkpoint: ranks"]["detail"].endswith("tensors on 2 ranks")
    assert found["deployment files"]["detail"] == (
        f"Dockerfile, OCI.md, compose.yaml, launch.sh; {IMAGE}; world size 2"
    )


def test_a_repository_for_more_than_the_engine_will_be(package: Path, cli: Cli) -> None:
    """All five models agree with each other, and not with the plan of an engine that is not built yet."""
    for path in (package / "model_repository").glob("*/config.pbtxt"):
        path.chmod(0o644)
        path.write_text(path.read_text().replace("max_batch_size: 4", "max_batch_size: 9"))
    (problem,) = checks(cli, package, 5)["model repository"]["problems"]
    assert problem == "tensorrt_llm/config.pbtxt: max_batch_size is 9, and the engine is for 4; at most 4"


def test_what_cannot_be_served_here_says_where(engine_package: tuple[Path, str], cli: Cli) -> None:
    sentence = f"is for a TensorRT engine, which is built and served in {IMAGE}; there, run engine/build.sh, then"
    assert sentence in cli("serve", engine_package[0], check=6).stderr
    assert sentence in cli("verify", engine_package[0], "--served", check=6).stderr


def script(package: Path, tmp_path: Path, *, gpus: str = "9.0 9.0") -> subprocess.CompletedProcess[str]:
    """Run the package's own script on a host with stand-ins for nvidia-smi and docker, which leaves an engine."""
    host = EngineHost(tmp_path / "host", "nvidia-smi", "docker", gpus=gpus)
    command = ["/usr/bin/env", "bash", str(package / "engine" / "build.sh")]
    return subprocess.run(command, env=host.environment(), capture_output=True, text=True, check=False)


def test_the_engine_that_the_script_built(package: Path, tmp_path: Path, cli: Cli) -> None:
    done = script(package, tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, str(package / "engine" / "built")), done.stderr
    found = checks(cli, package, 0)
    assert found["TensorRT engine"]["detail"] == "TensorRT-LLM 1.2.1, 2 ranks, SM90"
    assert json.loads(cli("inspect", package, "--json").stdout)["built"] is True
    assert "; there, run deploy/launch.sh with the package at /package" in cli("serve", package, check=6).stderr


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("config.json", ("version", "1.1.0"), "config.json: version: is '1.1.0', the plan says '1.2.1'"),
        ("config.json", ("pretrained_config.mapping.world_size", 4), "mapping.world_size: is 4, the plan says 2"),
        ("config.json", ("build_config.max_seq_len", 128), "build_config.max_seq_len: is 128, the plan says 256"),
        ("config.json", ("build_config.max_input_len", 100), "build_config.max_input_len: is 100, the plan says 200"),
        ("trtbuild.json", ("compute_capability", "8.9"), "compute_capability: is '8.9', the plan says '9.0'"),
        ("trtbuild.json", ("key", "another"), "key: is 'another', another checkpoint or other arguments than"),
        ("trtbuild.json", ("bytes.rank1.engine", 7), "rank1.engine has 16 bytes, and 7 were written"),
    ],
)
def test_an_engine_that_is_another(
    package: Path, tmp_path: Path, cli: Cli, file: str, changes: tuple[str, Any], sentence: str
) -> None:
    assert script(package, tmp_path).returncode == 0
    change(package / "engine" / "built" / file, changes)
    problems = checks(cli, package, 5)["TensorRT engine"]["problems"]
    assert len(problems) == 1
    assert sentence in problems[0]
    assert problems[0].endswith("; move engine/built away and run engine/build.sh")


def test_an_engine_with_less_than_it_should_have(package: Path, tmp_path: Path, cli: Cli) -> None:
    assert script(package, tmp_path).returncode == 0
    directory = package / "engine" / "built"
    (directory / "rank1.engine").unlink()
    (directory / "trtbuild.json").unlink()
    found = checks(cli, package, 5)
    problems = "\n".join(found["TensorRT engine"]["problems"])
    assert "trtbuild.json: is missing: nothing says for which GPU the engine was built; move" in problems
    assert "rank1.engine is missing, and there are 2 ranks; move" in problems
    assert any("engine/rank1.engine: the file is missing" in one for one in found["model repository"]["problems"])
    (directory / "config.json").write_text("{")
    assert "config.json cannot be read" in checks(cli, package, 5)["TensorRT engine"]["problems"][0]


def test_a_host_with_another_gpu_builds_nothing(package: Path, tmp_path: Path) -> None:
    done = script(package, tmp_path, gpus="8.9 8.9")
    assert done.returncode == 6
    assert "the GPUs here have compute capability 8.9, this engine is for 9.0" in done.stderr
    assert not (package / "engine" / "built").exists()


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def rename_a_tensor(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"transformer.ln_f.weight", b"transformer.ln_g.weight", 1))


@pytest.mark.parametrize(
    ("edit", "check", "sentence"),
    [
        (lambda package: change(package / "engine/checkpoint/config.json", ("mapping.tp_size", 4)),
         "TensorRT-LLM checkpoint: config", "mapping.tp_size is 4, the plan says 2; build the package again"),
        (lambda package: change(package / "engine/checkpoint/config.json", ("quantization.quant_algo", None)),
         "TensorRT-LLM checkpoint: config", "quantization.quant_algo is None, the plan says 'FP8'"),
        (lambda package: change(package / "engine/engine.json", ("version", "1.1.0")),
         "engine.json", "version is '1.1.0', the plan says '1.2.1'; build the package again"),
        (lambda package: (package / "engine/checkpoint/rank1.safetensors").unlink(),
         "TensorRT-LLM checkpoint: ranks", "rank1.safetensors is missing, and there are 2 ranks"),
        (lambda package: shutil.copy(package / "engine/config.json", package / "engine/checkpoint/rank2.safetensors"),
         "TensorRT-LLM checkpoint: ranks", "rank2.safetensors belongs to no rank of 2"),
        (lambda package: shorten(package / "engine/checkpoint/rank0.safetensors"),
         "TensorRT-LLM checkpoint: ranks", "rank0.safetensors is truncated"),
        (lambda package: rename_a_tensor(package / "engine/checkpoint/rank1.safetensors"),
         "TensorRT-LLM checkpoint: ranks", "ln_f.weight differs between rank0.safetensors and rank1.safetensors"),
        (lambda package: shutil.rmtree(package / "model_repository/tensorrt_llm_bls"),
         "model repository", "has ensemble, postprocessing, preprocessing, tensorrt_llm, and the plan says ensemble"),
        (lambda package: (package / "deploy/Dockerfile").write_text("ARG BASE_IMAGE=x:1\n"),
         "deployment files", f"deploy/Dockerfile: starts from x:1, and the plan says {IMAGE}; build the package again"),
        (lambda package: (package / "deploy/compose.yaml").unlink(),
         "deployment files", "deploy/compose.yaml is missing; build the package again"),
        (lambda package: (package / "engine/added.json").write_text("{}"),
         "bytes", "engine/added.json was not part of it"),
    ],
)  # fmt: skip
def test_what_was_changed_by_hand(
    package: Path, cli: Cli, edit: Callable[[Path], None], check: str, sentence: str
) -> None:
    edit(package)
    found = checks(cli, package, 5)
    assert any(sentence in problem for problem in found[check]["problems"]), found[check]
    assert found["bytes"]["problems"], "the bytes are others"


@pytest.mark.parametrize("text", ["[]", "{", '{"runtime": "trtllm-engine"}', '{"runtime": "embedded"}'])
@pytest.mark.parametrize("file", ["engine/engine.json", "engine/checkpoint/config.json", "plan.lock.json"])
def test_senseless_files_have_a_sentence(package: Path, cli: Cli, file: str, text: str) -> None:
    (package / file).write_text(text)
    found = checks(cli, package, 5)
    assert sum(bool(check["problems"]) for check in found.values()) >= 2, found


def test_a_repository_that_does_not_fit_the_engine(package: Path, tmp_path: Path, cli: Cli) -> None:
    assert script(package, tmp_path).returncode == 0
    path = package / "model_repository" / "tensorrt_llm" / "config.pbtxt"
    path.write_text(path.read_text().replace("max_batch_size: 4", "max_batch_size: 9"))
    problems = checks(cli, package, 5)["model repository"]["problems"]
    assert any("max_batch_size is 9, and the engine is for 4; at most 4" in problem for problem in problems)
    path = package / "model_repository" / "preprocessing" / "config.pbtxt"
    path.write_text(path.read_text().replace('string_value: "200"', 'string_value: "220"'))
    problems = checks(cli, package, 5)["model repository"]["problems"]
    assert any("max_input_tokens is 220, and the engine is for max_input_len 200" in one for one in problems)
