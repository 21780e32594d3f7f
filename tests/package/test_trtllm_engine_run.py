"""`trtbuild build` runs trtllm-build where it can, goes on after an interruption, and takes engines built elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine_host import EngineHost

ROOT = Path(__file__).parents[2]
Cli = Callable[..., subprocess.CompletedProcess[str]]
GPU_HOST = ("nvidia-smi", "docker")


@pytest.fixture(autouse=True)
def _no_engine_yet(engine_package: tuple[Path, str], store: Path) -> Iterator[None]:
    """Steps stay in the store between tests, engines do not."""
    yield
    for name in ("built", "building", "timing"):
        shutil.rmtree(store / name, ignore_errors=True)


@pytest.fixture
def host(tmp_path: Path) -> EngineHost:
    return EngineHost(tmp_path / "host", *GPU_HOST)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "package"


def digest(package: Path) -> str:
    return str(json.loads((package / "manifest.json").read_text())["digest"])


def listed(package: Path) -> set[str]:
    return {entry["path"] for entry in json.loads((package / "manifest.json").read_text())["files"]}


ENGINE = {f"engine/built/{name}" for name in ("config.json", "rank0.engine", "rank1.engine", "trtbuild.json")}


def test_the_engine_is_built_and_read_back(
    cli: Cli, engine_recipe: Path, engine_package: tuple[Path, str], host: EngineHost, out: Path, store: Path
) -> None:
    done = cli("build", engine_recipe, "-o", out, **host.environment())
    assert "trtllm-build: built (" in done.stderr
    assert "was not built here" not in done.stderr
    assert listed(out) - listed(engine_package[0]) == ENGINE
    assert digest(out) == digest(engine_package[0]), "engines differ in bytes, packages of one lock do not"
    verified = json.loads(cli("verify", out, "--json").stdout)
    assert {"name": "TensorRT engine", "detail": "TensorRT-LLM 1.2.1, 2 ranks, SM90"}.items() <= next(
        check for check in verified if check["name"] == "TensorRT engine"
    ).items()
    step = json.loads((out / "evidence" / "build.json").read_text())["steps"]["trtllm-build"]
    assert (step["result"]["runner"], step["result"]["record"]["gpus"]) == ("docker", ["NVIDIA H100 80GB HBM3"])
    (log,) = (store / "built").glob("*/log.txt")
    assert "[TRT-LLM] [I] Build TensorRT engine Unnamed Network 1" in log.read_text()
    (mounts,) = ([one for one in call if one.endswith(("ro", ":/build"))] for call in host.calls("docker", "run"))
    assert mounts[0].startswith(f"{store}/engine/")
    assert mounts[1].startswith(f"{store}/building/built-")
    assert not list((store / "building").iterdir()), "the place of work is cleared"
    again = cli("build", engine_recipe, "-o", out, **host.environment())
    assert "trtllm-build: reused" in again.stderr
    assert "package: reused" in again.stderr
    assert len(host.calls("docker", "run")) == 1


def test_the_timings_serve_the_next_engine(cli: Cli, engine_recipe: Path, host: EngineHost, out: Path) -> None:
    cli("build", engine_recipe, "-o", out, "--until", "engine", **host.environment())
    more = ("--set", "runtime.max_batch_size=5", "--until", "engine")
    done = cli("build", engine_recipe, *more, **host.environment())
    assert sorted(host.calls("rank")[-2:]) == [["0", "gpu 0", "True"], ["1", "gpu 1", "True"]]
    assert (Path(done.stdout.strip()) / "rank1.engine").is_file(), "--until engine prints the built engine"
    assert not out.exists()


def test_a_failure_has_its_last_lines_and_the_next_build_goes_on(
    cli: Cli, engine_recipe: Path, host: EngineHost, out: Path
) -> None:
    failed = cli("build", engine_recipe, "-o", out, check=4, **host.environment(FAKE_MODE="fails"))
    cause = "error: trtllm-build in docker ended with exit code 1 (RuntimeError: CUDA out of memory):\n"
    assert cause in failed.stderr
    assert "AssertionError: Engine building failed, please check error log." in failed.stderr
    log = Path(failed.stderr.rpartition("the whole log is ")[2].partition("; ")[0])
    assert "Build TensorRT engine Unnamed Network 0" in log.read_text()
    assert not out.exists()
    assert host.containers() == []
    cli("build", engine_recipe, "-o", out, **host.environment())
    assert sorted(host.built()) == ["0", "1", "1"]
    assert listed(out) >= ENGINE


def test_an_engine_of_another_version_is_refused(
    cli: Cli, engine_recipe: Path, host: EngineHost, out: Path, store: Path
) -> None:
    lies = cli("build", engine_recipe, "-o", out, check=5, **host.environment(FAKE_MODE="lies"))
    assert "is not the engine that the plan says:" in lies.stderr
    assert "config.json: version: is '1.1.0', the plan says '1.2.1'" in lies.stderr
    assert "; the container is not what nvcr.io/nvidia/tritonserver:26.07" in lies.stderr
    says = cli("build", engine_recipe, "-o", out, check=3, **host.environment(FAKE_VERSION="1.1.0"))
    assert "the engine was not built: the container has TensorRT-LLM 1.1.0, not 1.2.1" in says.stderr
    assert not (store / "built").exists()
    assert not out.exists()
    cli("build", engine_recipe, "-o", out, **host.environment())
    assert listed(out) >= ENGINE


def start(recipe: Path, out: Path, host: EngineHost, store: Path) -> subprocess.Popen[bytes]:
    """A build whose second rank never ends, once it has come so far."""
    environment = host.environment(FAKE_MODE="hangs", PYTHONPATH=str(ROOT / "builder"))
    command = [sys.executable, "-m", "trtbuild", "build", str(recipe), "-o", str(out)]
    child = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not any("hanging" in log.read_text() for log in (store / "staging").glob("built-*/log.txt")):
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.05)
    assert host.containers() != []
    return child


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build_leaves_nothing_running(
    cli: Cli, engine_recipe: Path, host: EngineHost, out: Path, store: Path, number: signal.Signals
) -> None:
    child = start(engine_recipe, out, host, store)
    child.send_signal(number)
    assert child.wait(60) == (130 if number == signal.SIGINT else -number)
    deadline = time.monotonic() + 30
    while host.containers():  # who is killed at once cannot wait for the script
        assert number != signal.SIGINT
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (store / "built").exists()
    assert not out.exists()
    cli("build", engine_recipe, "-o", out, **host.environment())
    assert sorted(host.built()) == ["0", "1", "1"], "what was finished is kept"
    assert listed(out) >= ENGINE


def test_a_runner_that_is_asked_for_and_is_not_there(cli: Cli, engine_recipe: Path, out: Path, tmp_path: Path) -> None:
    host = EngineHost(tmp_path / "host", "nvidia-smi", "docker", FAKE_BROKEN="docker")
    fresh = ("--set", f"store={tmp_path / 'store'}", "--set", "runtime.build_in=docker")
    done = cli("build", engine_recipe, "-o", out, *fresh, check=6, **host.environment())
    assert done.stderr.splitlines()[-1] == (
        "error: runtime.build_in: docker: docker info fails: Cannot connect to the Docker daemon at "
        "unix:///var/run/docker.sock.; mend that, or set runtime.build_in: script and run engine/build.sh where it can "
        "be built"
    )
    assert "fetch" not in done.stderr, "it says so before it works"
    assert not out.exists()
    cli("build", engine_recipe, "--set", "runtime.build_in=docker", "--until", "compress", **host.environment())


def test_an_engine_that_is_there_needs_no_runner(
    cli: Cli, engine_recipe: Path, host: EngineHost, laptop: EngineHost, out: Path
) -> None:
    docker = ("--set", "runtime.build_in=docker")
    cli("build", engine_recipe, "-o", out, *docker, **host.environment())
    shutil.rmtree(out)
    assert "trtllm-build: reused" in cli("build", engine_recipe, "-o", out, *docker, **laptop.environment()).stderr
    other = ("--set", "runtime.max_batch_size=3")
    done = cli("build", engine_recipe, "-o", out, *docker, *other, check=6, **laptop.environment())
    assert "runtime.build_in: docker: nvidia-smi is not on PATH" in done.stderr
    assert "engine: started" not in done.stderr


def test_script_runs_nothing(cli: Cli, engine_recipe: Path, host: EngineHost, out: Path) -> None:
    done = cli("build", engine_recipe, "-o", out, "--set", "runtime.build_in=script", **host.environment())
    assert "the engine was not built here (runtime.build_in is script): run" in done.stderr
    assert host.calls("docker") == []
    assert not listed(out) & ENGINE


def run_script(package: Path, host: EngineHost, **more: str) -> int:
    command = ["/usr/bin/env", "bash", str(package / "engine" / "build.sh")]
    return subprocess.run(command, env=host.environment(**more), capture_output=True, check=False).returncode


def test_an_engine_built_elsewhere_is_taken(
    cli: Cli,
    engine_recipe: Path,
    engine_package: tuple[Path, str],
    host: EngineHost,
    laptop: EngineHost,
    out: Path,
    store: Path,
) -> None:
    shutil.copytree(engine_package[0], out)
    assert run_script(out, host) == 0
    assert not listed(out) & ENGINE
    taken = cli("build", engine_recipe, "-o", out, **laptop.environment())
    assert "trtllm-build: taken from the package" in taken.stderr
    assert listed(out) >= ENGINE
    assert not (out / "engine" / "built.work").exists()
    assert digest(out) == digest(engine_package[0])
    cli("verify", out)
    assert "package: reused" in cli("build", engine_recipe, "-o", out, **laptop.environment()).stderr
    # It is in the store now: another recipe may take its place, and the first one has it back.
    other = cli("build", engine_recipe, "-o", out, "--set", "runtime.max_batch_size=5", **laptop.environment())
    assert "was not built here" in other.stderr
    assert not listed(out) & ENGINE
    back = cli("build", engine_recipe, "-o", out, **laptop.environment())
    assert "trtllm-build: reused" in back.stderr
    assert listed(out) >= ENGINE
    (out / "engine" / "built" / "rank0.engine").chmod(0o644)
    (out / "engine" / "built" / "rank0.engine").write_bytes(b"engine of rank 7")
    assert "engine/built/rank0.engine has other bytes than were recorded" in cli("verify", out, check=5).stdout
    shutil.rmtree(store / "built")  # without the store's copy, nothing of a damaged one is taken
    damaged = cli("build", engine_recipe, "-o", out, check=5, **laptop.environment())
    assert f"{out}/engine/built is damaged: rank0.engine has other bytes than were recorded; move" in damaged.stderr


def test_an_engine_that_only_the_package_has_is_not_replaced(
    cli: Cli, engine_recipe: Path, engine_package: tuple[Path, str], host: EngineHost, laptop: EngineHost, out: Path
) -> None:
    shutil.copytree(engine_package[0], out)
    assert run_script(out, host) == 0
    other = ("--set", "runtime.max_batch_size=5")
    refused = cli("build", engine_recipe, "-o", out, *other, check=2, **laptop.environment())
    assert "holds engine/built, which engine/build.sh made, and the package would be replaced by" in refused.stderr
    early = cli("build", engine_recipe, "-o", out, *other, check=2, **host.environment())
    assert "holds engine/built, which engine/build.sh made" in early.stderr
    assert len(host.calls("docker", "run")) == 1, "refused before hours of work"
    assert (out / "engine" / "built" / "rank1.engine").is_file()
    shutil.rmtree(out / "engine" / "built")
    working = cli("build", engine_recipe, "-o", out, *other, check=2, **laptop.environment())
    assert "holds engine/built.work, which engine/build.sh made" in working.stderr


def test_an_engine_in_the_package_that_is_another(
    cli: Cli, engine_recipe: Path, engine_package: tuple[Path, str], host: EngineHost, laptop: EngineHost, out: Path
) -> None:
    shutil.copytree(engine_package[0], out)
    assert run_script(out, host, FAKE_MODE="lies") == 0
    done = cli("build", engine_recipe, "-o", out, check=5, **laptop.environment())
    place = out / "engine" / "built"
    assert f"{place} is not the engine that the plan says:\n  config.json: version: is '1.1.0'" in done.stderr
    assert done.stderr.rstrip().endswith(f"; move {place} away, and build again")


def test_a_package_where_the_script_runs_is_left_alone(
    cli: Cli, engine_recipe: Path, engine_package: tuple[Path, str], host: EngineHost, laptop: EngineHost, out: Path
) -> None:
    shutil.copytree(engine_package[0], out)
    command = ["/usr/bin/env", "bash", str(out / "engine" / "build.sh")]
    said = host.log.parent / "said"
    with said.open("wb") as output:
        child = subprocess.Popen(command, env=host.environment(FAKE_MODE="hangs"), stdout=output, stderr=output)
        try:
            host.wait_for("hanging", said)
            other = ("--set", "runtime.max_batch_size=5")
            done = cli("build", engine_recipe, "-o", out, *other, check=2, **laptop.environment())
            assert f"engine/build.sh builds an engine in {out} right now" in done.stderr
        finally:
            child.terminate()
            child.wait(30)
