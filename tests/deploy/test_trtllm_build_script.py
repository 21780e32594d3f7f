"""The script that builds a TensorRT engine, over stand-ins for every tool that it calls: see ``tests/fake_engine/``."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from engine_host import EngineHost
from trtbuild.adapters.trtllm_engine import RECORD, build_script
from trtbuild.adapters.trtllm_engine_checks import check_built
from trtbuild.trtllm_build import EngineSpec, Limits, arguments, choose

SPEC = EngineSpec(
    version="1.2.1", architecture="LlamaForCausalLM", format="FP8", kv_cache="FP8", gpu=90, tp_size=2, pp_size=1,
    limits=Limits(max_batch_size=64, max_seq_len=4096, max_num_tokens=8192),
)  # fmt: skip
IMAGE = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
KEY = "ab12" * 16
SCRIPT = build_script(SPEC, image=IMAGE, name="it's", key=KEY)
CONFIG = {
    "architecture": "LlamaForCausalLM",
    "mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
}


class Place:
    """A directory with the script and a checkpoint."""

    def __init__(self, path: Path, checkpoint: str = "checkpoint") -> None:
        self.path, self.checkpoint, self.engine = path, path / checkpoint, path / "engine"
        self.checkpoint.mkdir(parents=True)
        (self.checkpoint / "config.json").write_text(json.dumps(CONFIG))
        self.script = path / "build.sh"
        self.script.write_text(SCRIPT)

    @property
    def work(self) -> Path:
        return self.path / "engine.work"

    def command(self, *options: str) -> list[str]:
        return ["/usr/bin/env", "bash", str(self.script), *options, str(self.checkpoint), str(self.engine)]

    def run(self, host: EngineHost, *options: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*options),
            env=host.environment(**more),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "place")


def engine_is_right(place: Place, done: subprocess.CompletedProcess[str]) -> bool:
    assert (done.returncode, done.stdout.strip()) == (0, str(place.engine)), done.stderr
    assert check_built(place.engine, SPEC, key=KEY) == []
    names = {path.name for path in place.engine.iterdir()}
    assert names == {"config.json", RECORD, "rank0.engine", "rank1.engine"}
    assert {path.name for path in place.work.iterdir()} == {"lock", "key", "timing.cache"}
    return True


def test_shellcheck_finds_nothing(place: Place) -> None:
    found = shutil.which("shellcheck")
    if found is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([found, "--norc", str(place.script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def payload(build: Path) -> list[str]:
    facts = {"key": KEY, "version": "1.2.1", "gpu": "9.0", "ranks": 2}
    start = ["env", "HOME=/build/home", "USER=trtbuild", "PYTHONUNBUFFERED=1", f"TRTBUILD_IMAGE={IMAGE}"]
    start += ["python3", "/build/ranks.py"]
    return [*start, json.dumps(facts), *arguments(choose(SPEC), "/checkpoint", "/build/engine.part")]


def test_docker_builds_once(place: Place, tmp_path: Path) -> None:
    host = EngineHost(tmp_path / "host", "nvidia-smi", "docker")
    assert engine_is_right(place, place.run(host))
    (run,) = host.calls("docker", "run")
    assert run[:3] == ["run", "--rm", "--name"]
    assert run[3].startswith(f"trtbuild-{KEY[:12]}-")
    assert run[4:] == [
        "--gpus", "all", "--ipc=host", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864",
        "--user", f"{os.getuid()}:{os.getgid()}", "--workdir", "/build",
        "--volume", f"{place.checkpoint}:/checkpoint:ro", "--volume", f"{place.work}:/build",
        IMAGE, *payload(place.work),
    ]  # fmt: skip
    assert [call[2] for call in host.calls("docker", "rm", "--force")] == [run[3], run[3]], "before and after"
    record = json.loads((place.engine / RECORD).read_text())
    assert (record["gpus"], record["image"], record["tensorrt_llm"]) == (["NVIDIA H100 80GB HBM3"], IMAGE, "1.2.1")
    assert sorted(call[:2] for call in host.calls("rank")) == [["0", "gpu 0"], ["1", "gpu 1"]]
    assert place.run(host).stdout.strip() == str(place.engine)
    assert len(host.calls("docker", "run")) == 1


def test_docker_without_its_runtime_takes_the_cdi_device(place: Place, tmp_path: Path) -> None:
    host = EngineHost(tmp_path / "host", "nvidia-smi", "docker", "nvidia-ctk", FAKE_BROKEN="runtime")
    assert engine_is_right(place, place.run(host, "--with", "docker"))
    assert host.calls("docker", "run")[0][4:6] == ["--device", "nvidia.com/gpu=all"]


def test_rootless_docker(place: Place, tmp_path: Path) -> None:
    host = EngineHost(tmp_path / "host", "nvidia-smi", "docker", FAKE_BROKEN="rootful")
    assert engine_is_right(place, place.run(host))
    run = host.calls("docker", "run")[0]
    assert run[run.index("--user") + 1] == "0:0"


def test_podman(place: Place, tmp_path: Path) -> None:
    host = EngineHost(tmp_path / "host", "nvidia-smi", "podman", "nvidia-ctk")
    assert engine_is_right(place, place.run(host))
    (run,) = host.calls("podman", "run")
    assert run[4:] == [
        "--device", "nvidia.com/gpu=all", "--security-opt", "label=disable", "--ipc=host", "--ulimit", "host",
        "--workdir", "/build", "--volume", f"{place.checkpoint}:/checkpoint:ro", "--volume", f"{place.work}:/build",
        IMAGE, *payload(place.work),
    ]  # fmt: skip


def test_an_image_that_the_script_is_told(place: Place, tmp_path: Path) -> None:
    """For a release that no known container has, or where the planned image lies in another registry."""
    host = EngineHost(tmp_path / "host", "nvidia-smi", "enroot")
    place.script.write_text(build_script(replace(SPEC, version="1.2.9"), image=None, name="model", key=KEY))
    for options in ([], ["--check"], ["--with", "enroot"]):
        done = place.run(host, *options)
        assert done.returncode == 2
        assert "no container with TensorRT-LLM 1.2.9 is known: name one with --image" in done.stderr
    assert place.run(host, "--check", "--image", "lab/triton:1.2.9").stdout == "enroot\n"
    assert place.run(host, "--image", "").returncode == 2
    place.script.write_text(SCRIPT)
    assert place.run(host, "--image", "lab/one:1", FAKE_IMAGE="lab/one:1", FAKE_MODE="fails").returncode == 4
    (place.work / "timing.cache").write_text("of lab/one:1")
    other = "lab.example:5000/team/two:1"
    assert engine_is_right(place, place.run(host, "--image", other, FAKE_IMAGE=other))
    imported = [call[3] for call in host.calls("enroot", "import")]
    assert imported == ["docker://lab/one:1", "docker://lab.example:5000#team/two:1"], "another image, another file"
    assert "of lab/one:1" not in (place.work / "timing.cache").read_text()
    assert json.loads((place.engine / RECORD).read_text())["image"] == other


def test_enroot_imports_once_and_removes_what_it_created(place: Place, tmp_path: Path) -> None:
    host = EngineHost(tmp_path / "host", "nvidia-smi", "enroot")
    assert place.run(host, FAKE_MODE="fails").returncode == 4
    assert engine_is_right(place, place.run(host))
    assert host.calls("enroot", "import") == [
        ["import", "--output", f"{place.work}/image.part.sqsh",
         "docker://nvcr.io#nvidia/tritonserver:26.07-trtllm-python-py3"]
    ]  # fmt: skip
    start = host.calls("enroot", "start")[-1]
    assert start[1:6] == [
        "--rw", "--mount", f"{place.checkpoint}:/checkpoint:none:x-create=dir,bind,ro",
        "--mount", f"{place.work}:/build:none:x-create=dir,bind",
    ]  # fmt: skip
    assert start[11:] == payload(place.work)
    assert host.containers() == []


def test_slurm_with_pyxis(place: Place, tmp_path: Path) -> None:
    host = EngineHost(tmp_path / "host", "srun", "scancel")  # a login node has no GPU
    assert engine_is_right(place, place.run(host, "--with", "slurm"))
    run = host.calls("srun")[-1]
    name = run[0].removeprefix("--job-name=")
    assert run == [
        f"--job-name={name}", "--nodes=1", "--ntasks=1", "--gpus=2", "--mpi=none", "--kill-on-bad-exit=1",
        "--quit-on-interrupt", "--unbuffered",
        "--container-image=nvcr.io#nvidia/tritonserver:26.07-trtllm-python-py3",
        f"--container-mounts={place.checkpoint}:/checkpoint:ro,{place.work}:/build", "--container-workdir=/build",
        "--no-container-mount-home", "--no-container-remap-root", *payload(place.work),
    ]  # fmt: skip
    cancelled = host.calls("scancel")[-1]
    assert cancelled[0] == "--quiet"
    assert cancelled[2] == f"--name={name}"


def test_slurm_in_a_job_cancels_nothing(place: Place, tmp_path: Path) -> None:
    host = EngineHost(tmp_path / "host", "nvidia-smi", "srun", "scancel", SLURM_JOB_ID="7")
    assert engine_is_right(place, place.run(host))
    assert host.calls("scancel") == []


def test_a_finished_rank_is_not_built_again(place: Place, tmp_path: Path) -> None:
    host = EngineHost(tmp_path / "host", "nvidia-smi", "docker")
    failed = place.run(host, FAKE_MODE="fails")
    assert failed.returncode == 4
    assert "CUDA out of memory" in failed.stderr
    assert failed.stderr.splitlines()[-1] == "build.sh: trtllm-build in docker ended with exit code 1"
    assert not place.engine.exists()
    assert host.containers() == []
    assert sorted(host.built()) == ["0", "1"]
    again = place.run(host)
    assert engine_is_right(place, again)
    assert sorted(host.built()) == ["0", "1", "1"]
    assert "trtbuild: rank 0 is finished, from an earlier run" in again.stderr
    assert host.calls("rank")[-1][2] == "True", "the timings of rank 0 are read"


@pytest.mark.parametrize("damage", ["engine", "key", "marker"])
def test_a_rank_that_is_not_whole_is_built_again(place: Place, tmp_path: Path, damage: str) -> None:
    host = EngineHost(tmp_path / "host", "nvidia-smi", "docker")
    assert place.run(host, FAKE_MODE="fails").returncode == 4
    part = place.work / "engine.part"
    if damage == "engine":
        (part / "rank0.engine").write_bytes(b"cut")
    elif damage == "marker":
        (part / "rank0.done").write_text("{")
    else:
        (place.work / "key").write_text("another engine\n")
    assert engine_is_right(place, place.run(host))
    assert sorted(host.built()) == ["0", "0", "1", "1"]


def test_one_gpu_worker_after_another_resumes_too(tmp_path: Path) -> None:
    """With one rank trtllm-build works in its own process and not in a spawned one."""
    place = Place(tmp_path / "place")
    single = CONFIG | {"mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1}}
    (place.checkpoint / "config.json").write_text(json.dumps(single))
    place.script.write_text(build_script(replace(SPEC, tp_size=1), image=IMAGE, name="one", key=KEY))
    host = EngineHost(tmp_path / "host", "nvidia-smi", "docker", gpus="9.0")
    assert place.run(host).returncode == 0
    assert host.built() == ["0"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_running(place: Place, tmp_path: Path, number: signal.Signals) -> None:
    host = EngineHost(tmp_path / "host", "nvidia-smi", "docker")
    said = tmp_path / "said"
    with said.open("wb") as output:
        child = subprocess.Popen(place.command(), env=host.environment(FAKE_MODE="hangs"), stdout=output, stderr=output)
        host.wait_for("hanging", said)
        assert host.containers() != []
        child.send_signal(number)
        assert child.wait(30) == 128 + number
    assert host.containers() == []
    assert not place.engine.exists()
    assert engine_is_right(place, place.run(host))
    assert sorted(host.built()) == ["0", "1", "1"]


def test_enroot_ends_with_its_script(place: Place, tmp_path: Path) -> None:
    host = EngineHost(tmp_path / "host", "nvidia-smi", "enroot")
    said = tmp_path / "said"
    with said.open("wb") as output:
        child = subprocess.Popen(place.command(), env=host.environment(FAKE_MODE="hangs"), stdout=output, stderr=output)
        host.wait_for("hanging", said)
        child.terminate()
        assert child.wait(30) == 143
    assert host.containers() == []
    assert not processes_of(place), "workers of trtllm-build are no child of a container here"


def processes_of(place: Place) -> list[str]:
    """Command lines of processes that name this place."""
    lines = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                lines.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
    return [line for line in lines if str(place.work) in line]


def test_what_a_killed_script_left_is_removed_by_the_next(place: Place, tmp_path: Path) -> None:
    host = EngineHost(tmp_path / "host", "nvidia-smi", "docker")
    said = tmp_path / "said"
    with said.open("wb") as output:
        child = subprocess.Popen(place.command(), env=host.environment(FAKE_MODE="hangs"), stdout=output, stderr=output)
        host.wait_for("hanging", said)
        child.kill()
        child.wait()
    assert host.containers() != []
    assert engine_is_right(place, place.run(host))
    assert host.containers() == []


def test_two_at_once(place: Place, tmp_path: Path) -> None:
    host = EngineHost(tmp_path / "host", "nvidia-smi", "docker")
    said = tmp_path / "said"
    with said.open("wb") as output:
        child = subprocess.Popen(place.command(), env=host.environment(FAKE_MODE="hangs"), stdout=output, stderr=output)
        try:
            host.wait_for("hanging", said)
            second = place.run(host)
            assert (second.returncode, second.stderr.strip()) == (
                6, f"build.sh: another build of {place.engine} is running",
            )  # fmt: skip
            assert host.containers() != [], "the second one has removed the container of the first"
        finally:
            child.terminate()
            child.wait(30)


NOTHING = "nothing here runs the container: docker is not on PATH, podman is not on PATH, enroot is not on PATH"


CTK = "nvidia-smi docker podman nvidia-ctk"


@pytest.mark.parametrize(
    ("tools", "gpus", "options", "broken", "sentence"),
    [
        ("docker", "9.0 9.0", "", "", "nvidia-smi is not on PATH"),
        ("nvidia-smi docker", "9.0 9.0", "", "nvidia-smi", "nvidia-smi fails: NVIDIA-SMI has failed because"),
        ("nvidia-smi docker", "8.9 8.9", "", "", "the GPUs here have compute capability 8.9, this engine is for 9.0"),
        ("nvidia-smi docker", "8.0 9.0", "", "", "the GPUs here have compute capability 8.0 9.0, this engine is"),
        ("nvidia-smi docker", "9.0", "", "", "2 ranks need as many GPUs, there are 1"),
        ("nvidia-smi", "9.0 9.0", "", "", NOTHING),
        (CTK, "9.0 9.0", "--with docker", "docker", "docker info fails: Cannot connect to the Docker daemon"),
        (CTK, "9.0 9.0", "--with docker", "runtime cdi", "docker has neither the NVIDIA runtime nor the device"),
        (CTK, "9.0 9.0", "--with podman", "podman", "podman info fails: Error: cannot re-exec"),
        (CTK, "9.0 9.0", "--with podman", "cdi", "podman has no device nvidia.com/gpu=all"),
        (CTK, "9.0 9.0", "--with enroot", "", "enroot is not on PATH"),
        ("docker", "9.0 9.0", "--with slurm", "", "srun is not on PATH"),
        ("srun", "9.0 9.0", "--with slurm", "pyxis", "srun has no --container-image, which pyxis adds"),
        ("docker", "9.0 9.0", "--with lxc", "", "usage: build.sh [--with auto|docker|podman|enroot|slurm]"),
        ("docker", "9.0 9.0", "--fast", "", "usage: build.sh"),
        ("docker", "9.0 9.0", "more", "", "usage: build.sh"),
    ],
)
def test_the_script_refuses(
    place: Place, tmp_path: Path, tools: str, gpus: str, options: str, broken: str, sentence: str
) -> None:
    host = EngineHost(tmp_path / "host", *tools.split(), gpus=gpus, FAKE_BROKEN=broken)
    done = place.run(host, *options.split())
    assert done.returncode == (2 if "usage" in sentence else 6)
    assert done.stderr.startswith(f"build.sh: {sentence}"), done.stderr
    assert done.stderr.count("\n") == 1
    assert not place.engine.exists()
    assert host.built() == []


def test_auto_takes_the_first_that_works(place: Place, tmp_path: Path) -> None:
    host = EngineHost(tmp_path / "host", "nvidia-smi", "docker", "podman", "nvidia-ctk", "enroot", "srun")
    check = ("--check",)
    assert place.run(host, *check).stdout == "docker\n"
    assert place.run(host, *check, FAKE_BROKEN="docker").stdout == "podman\n"
    assert place.run(host, *check, FAKE_BROKEN="docker podman").stdout == "enroot\n"
    assert place.run(host, *check, "--with", "slurm").stdout == "slurm\n"
    bare = EngineHost(tmp_path / "bare", "nvidia-smi", "srun")
    assert place.run(bare, *check).returncode == 6
    assert place.run(bare, *check, SLURM_JOB_ID="1").stdout == "slurm\n"
    assert not place.engine.exists()
    assert not place.work.exists()


@pytest.mark.parametrize(
    ("more", "code", "sentence"),
    [
        ({"FAKE_VERSION": "1.1.0"}, 3, "build.sh: the container has TensorRT-LLM 1.1.0, not 1.2.1"),
        ({"FAKE_GPUS": "8.9 8.9"}, 6, "build.sh: compute capability in the container: 8.9; this engine is for 9.0"),
    ],
)
def test_a_container_that_is_another_builds_nothing(
    place: Place, tmp_path: Path, more: dict[str, str], code: int, sentence: str
) -> None:
    """On a login node nothing but the job itself sees the GPUs."""
    host = EngineHost(tmp_path / "host", "srun", "scancel")
    done = place.run(host, "--with", "slurm", **more)
    assert (done.returncode, done.stderr.strip()) == (code, sentence)
    assert host.built() == []


def test_what_is_in_the_way(place: Place, tmp_path: Path) -> None:
    host = EngineHost(tmp_path / "host", "nvidia-smi", "docker")
    place.engine.mkdir()
    done = place.run(host)
    assert (done.returncode, "exists but was not made by this script" in done.stderr) == (5, True)
    (place.engine / RECORD).write_text('{"key": "another"}')
    done = place.run(host)
    assert (done.returncode, f"{place.engine} is another engine; move it away" in done.stderr) == (5, True)
    shutil.rmtree(place.engine)
    (place.checkpoint / "config.json").unlink()
    assert place.run(host).returncode == 5


def test_paths(tmp_path: Path) -> None:
    spaces = Place(tmp_path / "place", "check point")
    docker = EngineHost(tmp_path / "docker", "nvidia-smi", "docker")
    assert engine_is_right(spaces, spaces.run(docker))
    shutil.rmtree(spaces.engine)
    enroot = EngineHost(tmp_path / "enroot", "nvidia-smi", "enroot")
    assert "enroot mounts no path with a colon, comma or space in it" in spaces.run(enroot).stderr
    colon = Place(tmp_path / "other", "check:point")
    assert "docker mounts no path with a colon in it" in colon.run(docker).stderr
