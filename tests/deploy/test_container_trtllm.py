"""The Dockerfile of a package for TensorRT-LLM, built on a plain Debian in the place of NVIDIA's container."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from container_lab import BASE_IMAGE, Lab, missing_on_host, open_lab
from test_deploy_trtllm import ENGINE, ENGINE_FILES, LLM, plan_for, step

from trtbuild.adapters.container import HEALTHCHECK

TAG = "localhost/trtbuild-test-trtllm"
pytestmark = [
    pytest.mark.container,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing_on_host()), reason=f"no container can be built here: {missing_on_host()}"),
]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with open_lab() as opened:
        yield opened


def package_of(checkpoint: Path, text: str, out: Path, *files: str) -> Path:
    """A package as far as its Dockerfile copies it."""
    plan = plan_for(checkpoint, text, "runtime.tensor_parallel_size=2")
    for kind, name in (("repository", "model_repository"), ("deploy", "deploy")):
        shutil.copytree(step(plan, kind, out / f"{kind}-step"), out / "package" / name)
    for file in (*files, "evidence/quality.json", "manifest.json", "plan.lock.json", "recipe.yaml"):
        (out / "package" / file).parent.mkdir(parents=True, exist_ok=True)
        (out / "package" / file).write_text("tensor_parallel_size: 2\n")
    return out / "package"


def build(lab: Lab, package: Path) -> None:
    # Docker format: an image in OCI format has no health check.
    options = ("--isolation", "chroot", "--format", "docker", "--build-arg", f"BASE_IMAGE={BASE_IMAGE}")
    lab.remove(TAG)
    lab.buildah("bud", *options, "--tag", TAG, "--file", package / "deploy" / "Dockerfile", package)


def run(lab: Lab, *command: str) -> subprocess.CompletedProcess[str]:
    with lab.container(TAG) as name:
        words = lab.command("run", "--isolation", "chroot", name, "--", *command)
        return subprocess.run(words, capture_output=True, text=True, check=False)


def test_an_image_for_the_llm_api(lab: Lab, tiny_llama: Path, tmp_path: Path) -> None:
    build(lab, package_of(tiny_llama, LLM, tmp_path, "engine/llm_args.yaml", "engine/config.json"))
    config = lab.inspect(TAG)["config"]
    assert (config["User"], config["Cmd"]) == ("1000:0", ["/package/deploy/launch.sh"])
    assert config["Healthcheck"]["Test"] == list(HEALTHCHECK)
    assert set(config["ExposedPorts"]) == {"8000/tcp", "8001/tcp", "8002/tcp"}
    assert config["Labels"]["io.trtbuild.runtime"] == "trtllm"
    done = run(lab, "sh", "-c", "id -u; stat -c %u:%g /package/engine/llm_args.yaml; exec /package/deploy/launch.sh")
    assert done.stdout.split() == ["1000", "1000:0"], done.stderr
    assert "/opt/tritonserver/bin/tritonserver is not here; start this in the container" in done.stderr


def test_an_image_for_an_engine_holds_no_checkpoint(lab: Lab, tiny_llama: Path, tmp_path: Path) -> None:
    files = [f"engine/{name}" for name in ENGINE_FILES]
    package = package_of(tiny_llama, ENGINE, tmp_path, *files)
    with pytest.raises(AssertionError, match="engine/built"):
        build(lab, package)
    (package / "engine" / "built").mkdir()
    (package / "engine" / "built" / "rank1.engine").touch()
    build(lab, package)
    done = run(lab, "find", "/package/engine", "-type", "f")
    assert sorted(done.stdout.splitlines()) == [
        "/package/engine/built/rank1.engine", "/package/engine/config.json", "/package/engine/tokenizer 1.json",
    ]  # fmt: skip
