"""The static Dockerfiles: what they may contain, and that they agree with the rest of the project."""

from __future__ import annotations

import http.server
import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trtbuild.adapters.container import GRPC_PORT, HEALTHCHECK, HTTP_PORT, METRICS_PORT

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILES = {name: REPOSITORY / "docker" / f"{name}.Dockerfile" for name in ("build", "serve")}
EXTRAS = {"build": ("build", "serve"), "serve": ("embedded", "serve")}


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of one Dockerfile: comments dropped, continued lines joined."""
    lines = [line for line in DOCKERFILES[name].read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    pairs = (line.strip().partition(" ") for line in joined.splitlines() if line.strip())
    return [(keyword, " ".join(rest.split())) for keyword, _, rest in pairs]


def values(name: str, keyword: str) -> list[str]:
    return [rest for found, rest in instructions(name) if found == keyword]


def test_every_dockerfile_is_tested() -> None:
    assert sorted(path.name for path in (REPOSITORY / "docker").glob("*Dockerfile*")) == [
        "build.Dockerfile",
        "serve.Dockerfile",
    ]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_is_static_and_ends_without_root(name: str) -> None:
    assert not re.search(r"\{\{|\{%", DOCKERFILES[name].read_text(encoding="utf-8"))
    assert values(name, "USER") == ["10001:0"]
    assert instructions(name)[-2][0] == "ENTRYPOINT"
    assert isinstance(json.loads(values(name, "ENTRYPOINT")[0]), list)
    assert isinstance(json.loads(values(name, "CMD")[-1]), list)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_no_failure_is_hidden_and_no_secret_has_a_name(name: str) -> None:
    for run in values(name, "RUN"):
        # An exec-form command has no shell; in the others every part must succeed.
        assert run.startswith("[") or not re.search(r"[|;]", run), run
    arguments = " ".join(values(name, "ARG") + values(name, "ENV"))
    assert not re.search(r"TOKEN|PASSWORD|SECRET|PIP_INDEX_URL|PIP_EXTRA_INDEX_URL", arguments)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dependencies_come_before_the_package(name: str) -> None:
    order = [rest for keyword, rest in instructions(name) if keyword in {"RUN", "COPY"}]
    (torch,) = (index for index, rest in enumerate(order) if '"torch==${TORCH_VERSION}"' in rest)
    (package,) = (index for index, rest in enumerate(order) if rest.startswith("${WHEEL_DIR}/"))
    assert torch < package
    assert all("--constraint /opt/trtbuild/constraints.txt" in rest for rest in order if "pip install" in rest)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_large_dependencies_have_a_layer_of_their_own(name: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = {re.split(r"[\[<>=!~;]", item)[0] for extra in EXTRAS[name] for item in extras[extra]}
    (heavy,) = (run for run in values(name, "RUN") if "nvidia-pytriton" in run)
    named = set(heavy.partition("constraints.txt ")[2].split())
    assert {"nvidia-pytriton", "transformers"} < named <= wanted
    assert any(f'"trtbuild[{",".join(EXTRAS[name])}]"' in run for run in values(name, "RUN"))


@pytest.mark.parametrize("name", DOCKERFILES)
def test_torch_has_the_version_that_setup_installs(name: str) -> None:
    setup = (REPOSITORY / "scripts" / "setup").read_text(encoding="utf-8")
    (version,) = re.findall(r"^torch=([0-9.]+)$", setup, flags=re.MULTILINE)
    assert f"TORCH_VERSION={version}" in values(name, "ARG")


def test_both_start_from_the_same_layers() -> None:
    def until_torch(name: str) -> list[tuple[str, str]]:
        found = instructions(name)
        (end,) = (index for index, (_, rest) in enumerate(found) if "${TORCH_VERSION}" in rest)
        return found[: end + 1]

    assert until_torch("build") == until_torch("serve")


def test_serve_image_exposes_and_checks_the_ports_of_the_adapter() -> None:
    assert values("serve", "EXPOSE") == [f"{HTTP_PORT} {GRPC_PORT} {METRICS_PORT}"]
    command = DOCKERFILES["serve"].read_text(encoding="utf-8").split("--retries=3 \\\n  CMD ")[1].split("\n")[0]
    assert json.loads(command) == list(HEALTHCHECK[1:])


@contextmanager
def server(status: int) -> Iterator[int]:
    """An HTTP server on loopback that answers the readiness path with `status` and all else with 404."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/v2/health/ready" else 404)
            self.end_headers()

        def log_message(self, *_args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield running.server_address[1]
        finally:
            running.shutdown()
            thread.join()


def health(port: int) -> int:
    # A proxy in the environment must not be asked for the container's own address.
    environment = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    program = HEALTHCHECK[3].replace(str(HTTP_PORT), str(port))
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, check=False, stderr=subprocess.DEVNULL
    ).returncode


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (400, False), (503, False)])
def test_health_check_follows_the_answer(status: int, healthy: bool) -> None:
    with server(status) as port:
        assert (health(port) == 0) == healthy


def test_health_check_fails_without_a_server() -> None:
    with server(200) as port:
        pass
    assert health(port) != 0
