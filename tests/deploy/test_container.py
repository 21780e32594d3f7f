"""The serve image, built from the wheel without a registry, and a package that answers in it."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from container_lab import Lab, build_package, build_serve, missing_on_host, open_lab
from test_write_deploy import HOSTILE

from trtbuild import __version__
from trtbuild.adapters.container import HEALTHCHECK

ROOT = Path(__file__).parents[2]
LABELS = {f"com.example.note{index}": value for index, value in enumerate(HOSTILE)}
PROMPT, ANSWER_TOKENS = "One recipe takes", 8
READY_WITHIN_S, GONE_WITHIN_S = 120, 40

pytestmark = [
    pytest.mark.container,
    pytest.mark.triton,
    # The first run on a machine makes the base image and installs torch into a layer; later ones reuse both.
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(missing_on_host()), reason=f"no container can be built here: {missing_on_host()}"),
]


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs in a container of these tests."""

    port: int
    started: psutil.Popen
    process: psutil.Process
    log: Path

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
        """Status and body of one HTTP request: GET, or POST of JSON."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            headers = {"Content-Type": "application/json"}
            connection.request("GET" if body is None else "POST", path, body and json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.read()


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with open_lab() as opened:
        yield opened


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(ROOT)]
    subprocess.run(command, check=True)
    (made,) = out.glob("trtbuild-*.whl")
    return made


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A package of a tiny FP8 model, as `trtbuild build` makes it, with labels that would break a careless file."""
    scratch = tmp_path_factory.mktemp("package")
    recipe = {
        "schema_version": 1,
        "model": {"path": str(tiny_llama)},
        "compress": {"format": "fp8", "calibration": {"count": 4, "length": 64}},
        "runtime": {"kind": "embedded", "max_batch_size": 2, "max_num_tokens": 128, "max_seq_len": 256},
        "serving": {"model_name": "tiny"},
        "deploy": {"labels": LABELS},
        "store": str(scratch / "store"),
    }
    (scratch / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    command = [sys.executable, "-m", "trtbuild", "build", str(scratch / "recipe.yaml"), "-o", str(scratch / "tiny")]
    # A strict umask, as some pipelines have it: the server in the container must be able to read all the same.
    environment = os.environ | {"PYTHONPATH": str(ROOT / "builder")}
    done = subprocess.run(command, env=environment, umask=0o077, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return scratch / "tiny"


@pytest.fixture(scope="module")
def serve_image(lab: Lab, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_serve(lab, wheel, tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def image(lab: Lab, serve_image: str, package: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_package(lab, package, tmp_path_factory.mktemp("image"))


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextmanager
def serving(command: Callable[[Sequence[str]], list[str]], entry: Sequence[str], log: Path) -> Iterator[Server]:
    """Start `entry` in a container, wait until it is ready, and see to it that nothing stays behind."""
    http_port, grpc_port, metrics_port = free_ports(3)
    # An image listens on every address of its own network; this one shares the network of the host.
    ports = (f"--http-port={http_port}", f"--grpc-port={grpc_port}", f"--metrics-port={metrics_port}")
    with log.open("wb") as stream:
        started = psutil.Popen(command([*entry, *ports, "--address=127.0.0.1"]), stdout=stream, stderr=stream)
    family: list[psutil.Process] = []
    try:
        server = Server(http_port, started, _ready(started, http_port, log), log)
        family = started.children(recursive=True)
        yield server
    finally:
        family = family or started.children(recursive=True)
        for process in [started, *family]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs([started, *family], timeout=GONE_WITHIN_S)


def _ready(started: psutil.Process, port: int, log: Path) -> psutil.Process:
    """The process of `trtbuild serve` once it answers."""
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        assert started.is_running(), log.read_text()
        assert started.status() != psutil.STATUS_ZOMBIE, log.read_text()
        if _healthy(port):
            (found,) = (child for child in started.children(recursive=True) if _is_serve(child))
            return found
        time.sleep(0.2)
    raise AssertionError(f"not ready within {READY_WITHIN_S} s:\n{log.read_text()}")


def _healthy(port: int) -> bool:
    program = HEALTHCHECK[3].replace("8000", str(port))
    return subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL, check=False).returncode == 0


def _is_serve(process: psutil.Process) -> bool:
    words = process.cmdline()
    return len(words) > 2 and words[1].endswith("/bin/trtbuild") and words[2] == "serve" and "python" in words[0]


def assert_stops(server: Server) -> None:
    """Send SIGTERM to the container's process, as a container engine would: it ends by itself, with exit code 0."""
    family = server.started.children(recursive=True)
    server.process.send_signal(signal.SIGTERM)
    assert server.started.wait(timeout=GONE_WITHIN_S) == 0, server.log.read_text()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []


def test_image_says_what_it_is_and_runs_without_root(lab: Lab, image: str, package: Path) -> None:
    described = lab.inspect(image)["config"]
    lock = json.loads((package / "plan.lock.json").read_text())
    labels = described["Labels"]
    assert {key: labels[key] for key in LABELS} == LABELS
    assert labels["io.trtbuild.version"] == __version__
    assert labels["io.trtbuild.runtime"] == "embedded"
    assert labels["io.trtbuild.engine.digest"] == lock["artifacts"]["engine"]["digest"]
    assert described["User"] == "10001:0"
    assert described["Entrypoint"][:2] == ["trtbuild", "serve"]
    assert described["Cmd"] == ["/package"]
    assert set(described["ExposedPorts"]) == {"8000/tcp", "8001/tcp", "8002/tcp"}
    assert described["Healthcheck"]["Test"] == list(HEALTHCHECK)


def test_no_build_secret_is_in_the_image(lab: Lab, image: str) -> None:
    described = lab.buildah("inspect", "--type", "image", image)
    assert "find-links" not in described
    assert "PIP_" not in described.replace("ARG PIP_", "").replace("PIP_CONFIG_FILE=/run/secrets/pip.conf", "")
    with lab.container(image) as name:
        root = Path(lab.buildah("mount", name))
        left = [path for path in (root / "run").rglob("*") if path.is_file() and path.stat().st_size]
        assert left == []
        assert not (root / "etc/pip.conf").exists()


def test_package_in_the_image_is_unchanged(lab: Lab, image: str) -> None:
    with lab.container(image) as name:
        verify = ("--isolation", "chroot", name, "--", "trtbuild", "verify", "/package")
        lab.buildah("run", *verify)


def test_package_answers_in_the_container(lab: Lab, image: str, package: Path, tmp_path: Path) -> None:
    described = lab.inspect(image)["config"]
    entry = [*described["Entrypoint"], *described["Cmd"]]
    with lab.container(image) as name:

        def command(words: Sequence[str]) -> list[str]:
            return lab.command("run", "--isolation", "chroot", "--network", "host", name, "--", *words)

        with serving(command, entry, tmp_path / "log.txt") as server:
            body = {"text_input": PROMPT, "sampling_param_max_tokens": ANSWER_TOKENS, "sampling_param_ignore_eos": True}
            status, answer = server.ask("/v2/models/tiny/generate", body)
            assert status == 200, answer
            assert json.loads(answer)["output_ids"] == _greedy(package)
            assert server.process.uids().real == 10001
            assert_stops(server)


def test_container_stops_as_process_1_on_a_read_only_root(lab: Lab, image: str, tmp_path: Path) -> None:
    """As compose.yaml runs it: own process ids, read-only root, /tmp and /dev/shm in memory, SIGTERM to process 1."""
    described = lab.inspect(image)["config"]
    entry = [*described["Entrypoint"], *described["Cmd"]]
    with lab.container(image) as name:
        root = lab.buildah("mount", name)
        variables = ["env", "-i", *described["Env"]]
        script = f"""
            set -eu
            mount --make-rprivate /
            mount --bind {root} {root}
            mount --rbind /dev {root}/dev
            mount -t tmpfs -o nosuid,nodev,noexec,size=1g tmpfs {root}/dev/shm
            mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs {root}/tmp
            mount -t proc proc {root}/proc
            mount -o remount,bind,ro {root}
            exec chroot --userspec=10001:0 --groups=0 {root} """

        def command(words: Sequence[str]) -> list[str]:
            inside = script + shlex.join([*variables, *words])
            return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", inside]

        with serving(command, entry, tmp_path / "log.txt") as server:
            inside = Path(f"/proc/{server.process.pid}/status").read_text()
            assert "\nNSpid:\t" + f"{server.process.pid}\t1\n" in inside
            assert_stops(server)


def _greedy(package: Path) -> list[int]:
    """The tokens that the engine itself gives on this host."""
    from transformers import AutoTokenizer

    from trtbuild.runtime import Engine, SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(package / "engine")
    with Engine.load(package / "engine") as engine:
        parameters = SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True)
        (completion,) = engine.generate([tokenizer(PROMPT)["input_ids"]], parameters)
    return list(completion.token_ids)
