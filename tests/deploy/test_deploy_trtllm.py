"""Deployment files of TensorRT-LLM's runtimes, from the recipe to the files, and what the scripts run."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_schema import faults
from test_write_deploy import labels_of

from trtbuild.adapters import container_checks, triton
from trtbuild.adapters.container import HEALTHCHECK, write_deploy
from trtbuild.adapters.triton_launch_llm import LaunchSpec, launch_problems, render_launch
from trtbuild.checkpoint_files import open_directory
from trtbuild.errors import CompatibilityError, RecipeError
from trtbuild.model import read_facts
from trtbuild.plan import Plan, Source
from trtbuild.planner import make_plan
from trtbuild.recipe_file import parse_recipe
from trtbuild.releases import containers
from trtbuild.steps import Work, deploy_spec, launch_ranks, run_step
from trtbuild.store import Artifact, FileEntry, Staging
from trtbuild.toolchain import tool_versions

IMAGE = f"nvcr.io/nvidia/tritonserver:{containers()[0].tag}-trtllm-python-py3"
ENGINE = "runtime: {kind: trtllm-engine}\ntarget: {gpu: H100}\n"
LLM = "runtime: {kind: trtllm}\ntarget: {gpu: H100}\n"
TWO = "serving.gpu_device_ids=[[0, 1], [2, 3]]"
FORMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "llm": (LLM, ()),
    "llm, 4 ranks": (LLM, ("runtime.tensor_parallel_size=4", "compress.format=fp8", "compress.kv_cache=fp8")),
    "llm, instances": (LLM, ("runtime.tensor_parallel_size=2", TWO)),
    "llm, stock": (LLM, ("serving.model_py=upstream",)),
    "llm, hosts": (LLM, ("runtime.pipeline_parallel_size=3", "runtime.extra.gpus_per_node=1")),
    "engine": (ENGINE, ("runtime.tensor_parallel_size=2",)),
    "engine, instances": (ENGINE, ("runtime.tensor_parallel_size=2", TWO)),
    "engine, orchestrator": (ENGINE, ("serving.communication_mode=orchestrator",)),
    "engine, python": (ENGINE, ("serving.backend=python", "serving.gpu_device_ids=[[1]]")),
    "engine, tokens": (ENGINE, ("serving.layout=tokens",)),
}


def plan_for(checkpoint: Path, text: str, *overrides: str) -> Plan:
    loaded = parse_recipe(f"schema_version: 1\nmodel: {{path: {checkpoint}}}\n{text}", Path("r.yaml"), overrides)
    return make_plan(loaded, read_facts(open_directory(checkpoint)), Source(str(checkpoint)), tool_versions())


def step(plan: Plan, kind: str, out: Path) -> Path:
    """What a step of the plan writes; the engine is one of two files and a directory."""
    files = tuple(FileEntry(path=path, size=1, sha256="0") for path in ENGINE_FILES)
    staging = Staging(out, out / "unfinished")
    staging.content.mkdir(parents=True)
    work = Work(
        plan=plan, step=plan.step(kind), source=out, source_files=(), files={}, file_digests={}, staging=staging,
        inputs={"engine": Artifact("engine", "key", out, "sha256:12", {}, files)},
        reporter=None,  # type: ignore[arg-type]
    )  # fmt: skip
    run_step(work)
    return staging.content


ENGINE_FILES = ("build.sh", "checkpoint/rank0.safetensors", "config.json", "tokenizer 1.json")


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def deploy(form: str, tiny_llama: Path, tmp_path: Path) -> tuple[Plan, Path]:
    text, overrides = FORMS[form]
    plan = plan_for(tiny_llama, text, *overrides)
    return plan, step(plan, "deploy", tmp_path / "deploy")


def instructions(dockerfile: str) -> list[str]:
    lines = [line for line in dockerfile.splitlines() if line and not line.startswith("#")]
    return "\n".join(lines).replace("\\\n", "").splitlines()


def test_the_dockerfile(form: str, deploy: tuple[Plan, Path]) -> None:
    text = (deploy[1] / "Dockerfile").read_text()
    lines = instructions(text)
    assert lines[:2] == [f"ARG BASE_IMAGE={IMAGE}", "FROM ${BASE_IMAGE}"]
    assert lines[-3:] == ["USER 1000:0", "WORKDIR /tmp", 'CMD ["/package/deploy/launch.sh"]']
    (check,) = [line for line in lines if line.startswith("HEALTHCHECK")]
    assert json.loads(check.split(" CMD ")[1]) == list(HEALTHCHECK[1:])
    assert "EXPOSE 8000 8001 8002" in lines
    labels = labels_of(text)
    assert labels["io.trtbuild.engine.digest"] == "sha256:12"
    assert labels["org.opencontainers.image.base.name"] == IMAGE
    copied = [line.removeprefix("COPY --chown=1000:0 ") for line in lines if line.startswith("COPY")]
    engine = (
        ["engine/built /package/engine/built", '["engine/config.json", "engine/tokenizer 1.json", "/package/engine/"]']
        if form.startswith("engine")
        else ["engine /package/engine"]
    )
    assert copied == [
        *engine,
        *(f"{name} /package/{name}" for name in ("model_repository", "deploy", "evidence")),
        "manifest.json plan.lock.json recipe.yaml /package/",
    ]
    runs = [json.loads(line.removeprefix("RUN ")) for line in lines if line.startswith("RUN")]
    there, here = "/app/all_models/llmapi/tensorrt_llm/1", "/package/model_repository/tensorrt_llm/1/"
    assert runs == ([["cp", f"{there}/model.py", f"{there}/helpers.py", here]] if form == "llm, stock" else [])


GPUS = {
    "llm, 4 ranks": 4, "llm, instances": 4, "engine": 2, "engine, instances": 4, "engine, python": 2,
}  # fmt: skip


def test_the_compose_file(form: str, deploy: tuple[Plan, Path]) -> None:
    if form == "llm, hosts":
        assert not (deploy[1] / "compose.yaml").exists()
        return
    document = yaml.safe_load((deploy[1] / "compose.yaml").read_text())
    assert faults(document) == []
    service, gpus = document["services"]["triton"], GPUS.get(form, 1)
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": gpus, "capabilities": ["gpu"]}
    assert service["ulimits"] == {"memlock": -1, "stack": 67108864}
    assert service["shm_size"] == f"{max(2, gpus)}gb"
    assert service["healthcheck"]["test"] == list(HEALTHCHECK)
    assert service["init"] is True
    assert "read_only" not in service


def test_the_schema_finds_what_compose_would_refuse(tiny_llama: Path, tmp_path: Path) -> None:
    deploy = step(plan_for(tiny_llama, LLM), "deploy", tmp_path)
    sound = yaml.safe_load((deploy / "compose.yaml").read_text())
    changes: list[tuple[Callable[[Any], Any], str]] = [
        (lambda one: one.update(shmsize="1gb"), "triton.shmsize is unknown"),
        (lambda one: one["deploy"]["resources"]["reservations"]["devices"][0].pop("capabilities"), "is missing"),
        (lambda one: one["ulimits"].update(memlock="unlimited"), "is no int"),
        (lambda one: one["healthcheck"].update(interval="10"), "'10' is no"),
        (lambda one: one.update(ports=["8000"] * 2), "stands twice"),
    ]
    for change, sentence in changes:
        document = copy.deepcopy(sound)
        change(document["services"]["triton"])
        assert any(sentence in fault for fault in faults(document)), sentence


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed (Debian package shellcheck)"
)
def test_shellcheck_finds_nothing(deploy: tuple[Plan, Path]) -> None:
    done = subprocess.run(["shellcheck", deploy[1] / "launch.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_verify_finds_nothing_in_them(deploy: tuple[Plan, Path]) -> None:
    plan, directory = deploy
    spec = deploy_spec(plan.step("deploy"), "sha256:12")
    ranks = launch_ranks(plan.step("deploy"))
    assert ranks is not None
    assert ranks.world_size == plan.step("engine").parameters["world_size"]
    problems, detail = container_checks.check(directory, spec, ranks)
    assert problems == []
    assert detail.endswith(f"; {IMAGE}; world size {ranks.world_size}")


def edit(directory: Path, name: str, old: str, new: str) -> None:
    text = (directory / name).read_text()
    assert old in text
    (directory / name).write_text(text.replace(old, new))


@pytest.mark.parametrize("runtime", [LLM, ENGINE])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda at: edit(at, "Dockerfile", f"BASE_IMAGE={IMAGE}", "BASE_IMAGE=x:1"), "starts from x:1, and the plan s"),
        (
            lambda at: edit(at, "Dockerfile", "digest=sha256:12", "digest=sha256:13"),
            "io.trtbuild.engine.digest is 'sha",
        ),
        (lambda at: edit(at, "compose.yaml", "count: 2", "count: 1"), "compose.yaml: GPUs is 1, and the plan says 2"),
        (lambda at: edit(at, "compose.yaml", "localhost/", "elsewhere/"), "compose.yaml: image is 'elsewhere/tensorrt"),
        (lambda at: edit(at, "compose.yaml", "services:", "services: ["), "compose.yaml: cannot be read"),
        (lambda at: edit(at, "launch.sh", "2 1", "1 2"), "launch.sh: checks the parallel sizes "),
        (lambda at: edit(at, "launch.sh", "-trtllm-", "-other-"), "launch.sh: names another container"),
        (lambda at: (at / "launch.sh").chmod(0o644), "launch.sh: is not executable"),
        (lambda at: (at / "OCI.md").unlink(), "OCI.md is missing"),
        (lambda at: (at / "run.sh").touch(), "run.sh is none of the plan's"),
    ],
)
def test_verify_finds_what_was_changed(
    tiny_llama: Path, tmp_path: Path, runtime: str, change: Callable[[Path], None], sentence: str
) -> None:
    plan = plan_for(tiny_llama, runtime, "runtime.tensor_parallel_size=2")
    directory = step(plan, "deploy", tmp_path)
    change(directory)
    found, _ = container_checks.check(
        directory, deploy_spec(plan.step("deploy"), "sha256:12"), launch_ranks(plan.step("deploy"))
    )
    assert any(sentence in problem for problem in found), found


def test_a_release_without_a_container_has_no_files(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, LLM, "runtime.version=1.4.0rc1")
    origins = {value.path: value.origin for value in plan.values}
    assert plan.value("deploy.files") == ()
    assert origins["deploy.files"] == "no Triton container has TensorRT-LLM 1.4.0rc1"
    assert list(step(plan, "deploy", tmp_path).iterdir()) == []
    with pytest.raises(CompatibilityError, match=r"deploy\.files: launch: no Triton container has TensorRT-LLM 1\.4"):
        plan_for(tiny_llama, LLM, "runtime.version=1.4.0rc1", "deploy.files=[launch]")
    spec = replace(deploy_spec(plan.step("deploy"), "x"), files=("launch",))
    with pytest.raises(CompatibilityError, match="needs a container and a script"):
        write_deploy(spec, tmp_path / "none")


def test_several_hosts_have_no_compose_file(tiny_llama: Path) -> None:
    changes = ("runtime.pipeline_parallel_size=3", "runtime.extra.gpus_per_node=2")
    assert plan_for(tiny_llama, LLM, *changes).value("deploy.files") == ("dockerfile", "launch")
    with pytest.raises(
        CompatibilityError, match=r"deploy\.files: compose: a compose file starts one host, and these a"
    ):
        plan_for(tiny_llama, LLM, *changes, "deploy.files=[compose]")
    with pytest.raises(RecipeError, match=r"serving\.gpu_device_ids: instances run on one host, and runtime\.extra"):
        plan_for(tiny_llama, LLM, *changes, "serving.gpu_device_ids=[[0,1,2]]")


# What the recipe says of an engine's server reaches the repository and the script.


def test_the_files_of_several_instances(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, *_flat("engine, instances"))
    origins = {value.path: value.origin for value in plan.values}
    assert plan.value("serving.communication_mode") == "orchestrator"
    assert origins["serving.communication_mode"] == "several instances need it"
    repository = step(plan, "repository", tmp_path / "repository")
    config = (repository / "tensorrt_llm" / "config.pbtxt").read_text()
    assert 'key: "gpu_device_ids" value { string_value: "0,1;2,3" }' in config
    assert "count: 2 kind: KIND_CPU" in config
    script = (step(plan, "deploy", tmp_path / "deploy") / "launch.sh").read_text()
    assert "export TRTLLM_ORCHESTRATOR=1" in script
    assert script.count('-n 1 "$server"') == 1
    assert '[ "$gpus" -ge 4 ]' in script
    assert triton.check_repository(repository, engine=engine_of(tiny_llama, tmp_path)) == []


def test_leader_mode_is_the_default_of_one_instance(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, *_flat("engine"))
    assert plan.value("serving.communication_mode") == "leader"
    script = (step(plan, "deploy", tmp_path) / "launch.sh").read_text()
    assert "ORCHESTRATOR" not in script
    assert script.count('-n 1 "$server"') == 2


def test_the_python_backend_and_the_model_alone(tiny_llama: Path, tmp_path: Path) -> None:
    changes = ("serving.backend=python", "serving.layout=tokens")
    plan = plan_for(tiny_llama, ENGINE, *changes)
    repository = step(plan, "repository", tmp_path)
    assert [path.name for path in repository.iterdir()] == ["tensorrt_llm"]
    config = (repository / "tensorrt_llm" / "config.pbtxt").read_text()
    assert 'backend: "python"' in config
    assert 'key: "container_model_py"' in config
    assert (repository / "tensorrt_llm" / "1" / "model.py").is_file()
    assert triton.check_repository(repository, engine=engine_of(tiny_llama, tmp_path)) == []
    five = step(plan_for(tiny_llama, ENGINE, changes[0]), "repository", tmp_path / "five")
    assert sorted(path.name for path in five.iterdir()) == [
        "ensemble", "postprocessing", "preprocessing", "tensorrt_llm", "tensorrt_llm_bls",
    ]  # fmt: skip
    assert 'backend: "python"' in (five / "tensorrt_llm" / "config.pbtxt").read_text()


def engine_of(checkpoint: Path, tmp_path: Path) -> Path:
    """An engine directory whose engine is not built yet."""
    directory = Path(shutil.copytree(checkpoint, tmp_path / "engine"))
    (directory / "engine.json").write_text("{}")
    return directory


def _flat(name: str) -> tuple[str, ...]:
    text, overrides = FORMS[name]
    return (text, *overrides)


# The script of the LLM API, with stand-ins for the server and NVIDIA's tools.


def run(
    tmp_path: Path,
    spec: LaunchSpec,
    *words: str,
    gpus: int = 8,
    args: str = "tensor_parallel_size: 2\n",
    place: str = "pack age",
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    tools, package = tmp_path / "tools", tmp_path / place
    for folder in (tools, package / "deploy", (package / spec.arguments).parent):
        folder.mkdir(parents=True, exist_ok=True)
    (package / spec.arguments).write_text(args)
    show = 'echo "$0"; printf "%s\\n" "$@"; echo "scales=${TRTLLM_LOAD_KV_SCALES:-}"'
    texts = {
        "python3": f'exec {sys.executable} "$@"',
        "tritonserver": show,
        "trtllm-llmapi-launch": show,
        "nvidia-smi": f"yes GPU | head -n {gpus}",
    }
    for name, text in texts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    script = package / "deploy" / "launch.sh"
    script.write_text(render_launch(spec))
    variables = {"PATH": f"{tools}:{os.environ['PATH']}", "TRITONSERVER": str(tools / "tritonserver")} | environment
    return subprocess.run(
        ["sh", script, *words], env=variables, capture_output=True, text=True, check=False, timeout=20
    )


def spec_of(tensor: int = 2, pipeline: int = 1, **more: Any) -> LaunchSpec:
    gpus = more.pop("gpus", tensor * pipeline)
    arguments = more.pop("arguments", "engine/llm_args.yaml")
    return LaunchSpec(IMAGE, tensor, pipeline, 1, gpus, arguments, **more)


def test_one_host_starts_one_server(tmp_path: Path) -> None:
    done = run(tmp_path, spec_of(kv_scales=True), "--log-verbose=1", "two words", HTTP_PORT="9000")
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    prefix = words.pop(6)
    assert words == [
        str(tmp_path / "tools" / "tritonserver"), f"--model-repository={tmp_path / 'pack age'}/model_repository",
        "--grpc-port=8001", "--http-port=9000", "--metrics-port=8002", "--disable-auto-complete-config",
        "--log-verbose=1", "two words", "scales=1",
    ]  # fmt: skip
    assert prefix.startswith("--backend-config=python,shm-region-prefix-name=trtbuild_")


def test_the_scales_are_the_user_s_to_switch_off(tmp_path: Path) -> None:
    assert run(tmp_path, spec_of(kv_scales=True), TRTLLM_LOAD_KV_SCALES="0").stdout.endswith("scales=0\n")
    assert run(tmp_path, spec_of()).stdout.endswith("scales=\n")


@pytest.mark.parametrize("variable", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"])
def test_each_rank_of_several_hosts_runs_upstream_s_launcher(tmp_path: Path, variable: str) -> None:
    spec = spec_of(pipeline=2, gpus=2, hosts=2)
    sizes = "tensor_parallel_size: 2\npipeline_parallel_size: 2\n"
    done = run(tmp_path, spec, gpus=2, args=sizes, place="package", **{variable: "4"})
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert words[:2] == [str(tmp_path / "tools" / name) for name in ("trtllm-llmapi-launch", "tritonserver")]
    assert f"--model-repository={tmp_path}/package/model_repository" in words
    alone = run(tmp_path, spec, gpus=2, args=sizes, place="package")
    assert alone.returncode == 6
    assert "was started as 1 tasks, and 4 ranks on 2 hosts need one each; start it under srun or mpirun" in alone.stderr
    blank = run(tmp_path, spec, gpus=2, args=sizes, **{variable: "4"})
    assert blank.returncode == 6
    assert "trtllm-llmapi-launch would divide '--model-repository=" in blank.stderr


@pytest.mark.parametrize(
    ("spec", "options", "sentence"),
    [
        (spec_of(), {"gpus": 1}, "1 GPUs are visible, and 2 are needed"),
        (
            spec_of(),
            {"args": "tensor_parallel_size: 4\n"},
            "has the tensor, pipeline and context parallel sizes 4 1 1, a",
        ),
        (
            spec_of(),
            {"args": "{}\n"},
            "sizes 1 1 1, and this package is for 2 1 1 (world size 2); build the package ag",
        ),
        (spec_of(), {"args": "- a list\n"}, "llm_args.yaml cannot be read"),
        (
            spec_of(),
            {"SLURM_NTASKS": "3"},
            "this was started as 3 tasks, and there are 2 ranks; start it once, or once",
        ),
        (
            spec_of(instances=2, gpus=4),
            {"OMPI_COMM_WORLD_SIZE": "2"},
            "and one server starts 2 instances; start it once",
        ),
        (spec_of(), {"TRITONSERVER": "/none"}, "/none is not here; start this in the container, or set TRITONSERVER"),
        (spec_of(fixed_place=True), {}, "and its model.yaml names /package; put it there"),
    ],
)
def test_a_host_or_package_that_does_not_fit_is_named(
    tmp_path: Path, spec: LaunchSpec, options: dict[str, Any], sentence: str
) -> None:
    done = run(tmp_path, spec, **options)
    assert done.returncode == 6
    assert done.stdout == ""
    assert sentence in done.stderr


def test_ranks_that_no_script_can_start() -> None:
    several = spec_of(instances=2, hosts=2)
    assert "2 instances cannot be spread over 2 hosts" in launch_problems(several)[0].message
    few = spec_of(tensor=4, gpus=1, hosts=2)
    assert "2 hosts with 1 GPUs each are too few for 4 ranks" in launch_problems(few)[0].message
    with pytest.raises(RecipeError):
        render_launch(few)
