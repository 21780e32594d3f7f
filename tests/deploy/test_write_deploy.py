"""The deployment files hold what the spec says, whatever characters it is made of, and nothing of the environment."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from trtbuild import __version__
from trtbuild.adapters.container import HEALTHCHECK, DeploySpec, check_deploy, image_labels, write_deploy
from trtbuild.errors import CompatibilityError, RecipeError

SPEC = DeploySpec(
    model_name="tensorrt_llm",
    runtime="embedded",
    image="registry.example.com:5000/team/smollm2:1.0",
    engine_digest="sha256:" + "ab" * 32,
    labels={"com.example.owner": "ml platform"},
)
HOSTILE = [
    "",
    " leading and trailing ",
    'it\'s "quoted"',
    "$HOME ${HOME} $(id) `id` $$",
    "back\\slash at the end\\",
    "# no comment",
    "a=b c=d",
    "<<EOF",
    "{{ jinja }} {% raw %}",
    "``` fence",
    "emoji 👩‍🚀, العربية, 漢字, combining e\u0301",
    "'; rm -rf / #",
    "*/? [a-z]",
]


def written(spec: DeploySpec, out: Path) -> dict[str, str]:
    write_deploy(spec, out)
    return {path.name: path.read_text(encoding="utf-8") for path in out.iterdir()}


def labels_of(dockerfile: str) -> dict[str, str]:
    """The labels of a Dockerfile whose LABEL instructions each hold one pair on one line, quoted as a shell would."""
    pairs = {}
    for line in dockerfile.split("\n"):
        if line.startswith("LABEL "):
            (word,) = shlex.split(line.removeprefix("LABEL "))
            key, _, value = word.partition("=")
            pairs[key] = value
    return pairs


def test_writes_every_file(tmp_path: Path) -> None:
    assert sorted(written(SPEC, tmp_path)) == ["Dockerfile", "OCI.md", "compose.yaml", "launch.sh"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ((), []),
        (("launch",), ["launch.sh"]),
        (("dockerfile",), ["Dockerfile", "OCI.md"]),
        (["compose"], ["compose.yaml"]),
    ],
)
def test_writes_the_chosen_files_alone(tmp_path: Path, files: Any, expected: list[str]) -> None:
    assert sorted(written(replace(SPEC, files=files), tmp_path)) == expected


def test_equal_specs_give_equal_bytes(tmp_path: Path) -> None:
    assert written(SPEC, tmp_path / "a") == written(SPEC, tmp_path / "b")


def test_no_file_has_a_leftover_of_a_template(tmp_path: Path) -> None:
    for name, text in written(SPEC, tmp_path).items():
        assert not re.search(r"\{\{|\{%|%\}|\}\}", text), name


def test_the_environment_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written(SPEC, tmp_path / "a")
    for name in ("HF_TOKEN", "SERVE_IMAGE", "BASE_IMAGE", "HTTP_PORT", "BIND_ADDRESS", "USER", "HOME", "PIP_INDEX_URL"):
        monkeypatch.setenv(name, "planted-secret-3b1f")
    after = written(SPEC, tmp_path / "b")
    assert after == before
    assert "planted-secret-3b1f" not in "".join(after.values())


def test_dockerfile_labels_say_where_the_image_comes_from(tmp_path: Path) -> None:
    labels = labels_of(written(SPEC, tmp_path)["Dockerfile"])
    assert labels == image_labels(SPEC)
    assert labels["io.trtbuild.engine.digest"] == SPEC.engine_digest
    assert labels["io.trtbuild.version"] == __version__
    assert labels["io.trtbuild.runtime"] == "embedded"
    assert labels["com.example.owner"] == "ml platform"
    assert labels["org.opencontainers.image.title"] == "tensorrt_llm"


def test_a_recipe_may_replace_a_standard_label(tmp_path: Path) -> None:
    spec = replace(SPEC, labels={"org.opencontainers.image.title": "Our model"})
    assert labels_of(written(spec, tmp_path)["Dockerfile"])["org.opencontainers.image.title"] == "Our model"


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_label_values_survive(tmp_path: Path, value: str) -> None:
    files = written(replace(SPEC, labels={"com.example.note": value}), tmp_path)
    assert labels_of(files["Dockerfile"])["com.example.note"] == value
    notes = files["OCI.md"].split("```json\n")[1].split("\n```\n")[0]
    assert json.loads(notes)["com.example.note"] == value


one_line = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=40)


@settings(max_examples=60)
@given(value=one_line, model_name=one_line)
def test_any_text_on_one_line_breaks_no_file(value: str, model_name: str) -> None:
    spec = replace(SPEC, labels={"com.example.note": value}, model_name=model_name)
    with tempfile.TemporaryDirectory() as directory:
        files = written(spec, Path(directory))
    assert labels_of(files["Dockerfile"]) == image_labels(spec)
    assert yaml.safe_load(files["compose.yaml"])["services"]["triton"]["image"] == SPEC.image


@settings(max_examples=60)
@given(model_name=one_line)
def test_the_compose_project_follows_composes_grammar(model_name: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        compose = written(replace(SPEC, model_name=model_name, files=("compose",)), Path(directory))["compose.yaml"]
    assert re.fullmatch("[a-z0-9][a-z0-9_-]*", yaml.safe_load(compose)["name"])


def test_compose_is_locked_down_and_checked(tmp_path: Path) -> None:
    service = yaml.safe_load(written(SPEC, tmp_path)["compose.yaml"])["services"]["triton"]
    assert service["image"] == SPEC.image
    assert service["build"] == {"context": "..", "dockerfile": "deploy/Dockerfile"}
    assert service["healthcheck"]["test"] == list(HEALTHCHECK)
    assert service["read_only"] is True
    assert service["shm_size"] == "1gb"
    assert service["restart"] == "unless-stopped"
    assert service["cap_drop"] == ["ALL"]
    assert "deploy" not in service
    assert [port.rsplit(":", 1)[1] for port in service["ports"]] == ["8000", "8001", "8002"]
    assert all(port.startswith("${BIND_ADDRESS:-127.0.0.1}:") for port in service["ports"])


def test_compose_holds_no_accidental_interpolation(tmp_path: Path) -> None:
    text = written(replace(SPEC, model_name="a$b${c}"), tmp_path)["compose.yaml"]
    assert set(re.findall(r"\$\{?(\w*)", text)) == {"BIND_ADDRESS", "HTTP_PORT", "GRPC_PORT", "METRICS_PORT"}


def test_compose_reserves_gpus(tmp_path: Path) -> None:
    service = yaml.safe_load(written(replace(SPEC, gpus=2), tmp_path)["compose.yaml"])["services"]["triton"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 2, "capabilities": ["gpu"]}


def test_dockerfile_runs_without_root_and_copies_a_whole_package(tmp_path: Path) -> None:
    lines = written(SPEC, tmp_path)["Dockerfile"].splitlines()
    instructions = [line for line in lines if line and not line.startswith("#")]
    assert instructions[:2] == [f"ARG SERVE_IMAGE=localhost/trtbuild-serve:{__version__}", "FROM ${SERVE_IMAGE}"]
    assert instructions[-1] == "USER 10001:0"
    copied = " ".join(line for line in instructions if line.startswith("COPY"))
    parts = ("engine", "model_repository", "deploy", "evidence", "manifest.json", "plan.lock.json", "recipe.yaml")
    assert all(f" {part} " in copied for part in parts)
    assert not any(line.startswith(("ENV", "RUN", "ADD")) for line in instructions)


def run_launch(script: Path, path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([script, *arguments], env={"PATH": str(path)}, capture_output=True, text=True, check=False)


@pytest.fixture
def bin_dir(tmp_path: Path) -> Path:
    """A directory for PATH with what the script needs of a host, and no trtbuild."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in ("sh", "dirname"):
        found = shutil.which(name)
        assert found is not None
        (directory / name).symlink_to(found)
    return directory


def test_launch_script_is_valid_shell(tmp_path: Path) -> None:
    write_deploy(SPEC, tmp_path)
    subprocess.run(["sh", "-n", tmp_path / "launch.sh"], check=True)
    assert stat.S_IMODE((tmp_path / "launch.sh").stat().st_mode) == 0o755


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed (Debian package shellcheck)"
)
def test_launch_script_passes_shellcheck(tmp_path: Path) -> None:
    write_deploy(SPEC, tmp_path)
    done = subprocess.run(["shellcheck", tmp_path / "launch.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_launch_script_refuses_without_trtbuild(tmp_path: Path, bin_dir: Path) -> None:
    write_deploy(SPEC, tmp_path / "package" / "deploy")
    done = run_launch(tmp_path / "package" / "deploy" / "launch.sh", bin_dir)
    assert done.returncode == 6
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"pip install 'trtbuild[embedded,serve]=={__version__}'" in done.stderr


@pytest.mark.parametrize("name", ["package", 'it\'s a $(package) with "quotes"', "-dash"])
def test_launch_script_serves_its_own_package_with_the_given_arguments(
    tmp_path: Path, bin_dir: Path, name: str
) -> None:
    write_deploy(SPEC, tmp_path / name / "deploy")
    fake = bin_dir / "trtbuild"
    fake.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    fake.chmod(0o755)
    done = run_launch(tmp_path / name / "deploy" / "launch.sh", bin_dir, "--http-port", "0", "two words")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["serve", str(tmp_path.resolve() / name), "--http-port", "0", "two words"]


@pytest.mark.parametrize(
    "image",
    [
        "",
        "team/Upper",
        "a b",
        "a:",
        "a@sha256:12",
        "a\nRUN id",
        "a'; id",
        "${X}",
        "a:" + "t" * 129,
        "-a",
        "a..b",
        "host:x/a",
    ],
)
def test_bad_image_names_are_refused(tmp_path: Path, image: str) -> None:
    with pytest.raises(RecipeError, match=r"deploy\.image: .* is no image name; .*; for example"):
        write_deploy(replace(SPEC, image=image), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "image",
    [
        "smollm2",
        "localhost/tensorrt_llm:latest",
        "ghcr.io/a/b/c:v1.0-rc_2",
        "h:5000/a",
        "a--b/c__d.e",
        "a@sha256:" + "0" * 64,
    ],
)
def test_image_names_are_accepted(image: str) -> None:
    assert check_deploy(replace(SPEC, image=image)) == []


@pytest.mark.parametrize("key", ["", "a b", "a=b", "-a", "a\n", "'a'", "${a}", "a."])
def test_bad_label_names_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(RecipeError, match=r"deploy\.labels: .* is no label name"):
        write_deploy(replace(SPEC, labels={key: "x"}), tmp_path)


@pytest.mark.parametrize("value", ["two\nlines", "bell\a", "\r", "nul\0", "\u2028"])
def test_label_values_on_more_lines_are_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(RecipeError, match=r"deploy\.labels\.com\.example\.note: .*line end"):
        write_deploy(replace(SPEC, labels={"com.example.note": value}), tmp_path)


def test_our_labels_cannot_be_replaced(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"labels under io\.trtbuild\. are written by trtbuild"):
        write_deploy(replace(SPEC, labels={"io.trtbuild.engine.digest": "forged"}), tmp_path)


def test_all_problems_are_reported_at_once() -> None:
    spec = replace(SPEC, image="A", labels={"a b": "x", "c": "\n"}, files=("helm",), model_name="a\nb")
    assert [problem.path for problem in check_deploy(spec)] == [
        "deploy.image",
        "serving.model_name",
        "deploy.labels",
        "deploy.labels.c",
        "deploy.files",
    ]


@pytest.mark.parametrize("runtime", ["trtllm", "trtllm-engine"])
def test_a_runtime_without_its_container_is_refused(tmp_path: Path, runtime: str) -> None:
    with pytest.raises(CompatibilityError, match=f"the runtime '{runtime}' needs a container and a"):
        write_deploy(replace(SPEC, runtime=runtime), tmp_path)
