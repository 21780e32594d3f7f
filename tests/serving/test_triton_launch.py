"""The launch script of a TensorRT engine: its exact text for 1, 2 and 8 ranks, and what it runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trtbuild.adapters.triton_launch import LaunchSpec, launch_problems, render_launch
from trtbuild.adapters.triton_parameters import EngineParameters
from trtbuild.errors import RecipeError

IMAGE = "nvcr.io/nvidia/tritonserver:26.04-trtllm-python-py3"


def launch(tensor: int = 1, pipeline: int = 1, mode: Any = "leader", **more: Any) -> LaunchSpec:
    path = more.pop("gpt_model_path", "/package/engine")
    package = more.pop("package", "/package")
    world = more.pop("world_size", tensor * pipeline)
    engine = EngineParameters(path, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline, **more)
    return LaunchSpec(engine, world, IMAGE, mode, package=package)


def expected(tensor: int, pipeline: int, *, ranks: str) -> str:
    """The script of leader mode; the sentences are written once more, from the launcher's description."""
    world = need = tensor * pipeline
    plural = "s" if world > 1 else ""
    return f"""#!/bin/sh
# Serve this package's TensorRT engine in leader mode: one tritonserver for each of {world} rank{plural}, \
under one mpirun.
# Rank 0 loads every model and answers; the others load the engine's model alone and take their work from rank 0.
# Runs inside a container such as {IMAGE}
# with this package in its place (below). Arguments go to tritonserver. Triton has no authentication.
set -eu

fail() {{
    echo "launch.sh: $1" >&2
    exit 6 # trtbuild's own code for "this host lacks something"
}}

server=${{TRITONSERVER:-/opt/tritonserver/bin/tritonserver}}
package=/package
engine=/package/engine
[ -x "$server" ] || fail "$server is not here; start this in the container, or set TRITONSERVER"
command -v mpirun >/dev/null 2>&1 || fail "mpirun is not on PATH; start this in the container"
[ -f "$engine/rank{world - 1}.engine" ] || fail "$engine/rank{world - 1}.engine is not here; \
build the engine for world size {world}, and put the package at $package"
# The ranks follow from the engine that the server will load, not from what this script remembers.
mapping='import json, sys; m = json.load(open(sys.argv[1]))["pretrained_config"]["mapping"]; \
print(*(m[n] for n in sys.argv[2:]))'
found=$(python3 -c "$mapping" "$engine/config.json" world_size tp_size pp_size) || \
fail "$engine/config.json cannot be read"
[ "$found" = '{world} {tensor} {pipeline}' ] || fail "$engine has the world size, tensor and pipeline parallel sizes \
$found, and this package is for {world} {tensor} {pipeline}; it is another engine"
[ ! -e "$engine/rank{world}.engine" ] || fail "$engine was built for more than world size {world}; it is another engine"
gpus=$(nvidia-smi --list-gpus | wc -l)
[ "$gpus" -ge {need} ] || fail "$gpus GPUs are visible, and {need} are needed"

set -- \\
    "--model-repository=$package/model_repository" \\
    "--grpc-port=${{GRPC_PORT:-8001}}" "--http-port=${{HTTP_PORT:-8000}}" "--metrics-port=${{METRICS_PORT:-8002}}" \\
    --disable-auto-complete-config \\
    "$@"
# Each server's Python models get shared memory of their own: the prefix tells ranks and servers apart.
shm="--backend-config=python,shm-region-prefix-name=trtbuild_$$"
exec mpirun --allow-run-as-root \\
{ranks}"""


FIRST = '    -n 1 "$server" "$@" "${shm}_0_"'
OTHER = '    -n 1 "$server" "$@" --model-control-mode=explicit --load-model=tensorrt_llm "${{shm}}_{rank}_"'


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (8, 1), (4, 2)])
def test_the_exact_text_of_leader_mode(tensor: int, pipeline: int) -> None:
    world = tensor * pipeline
    ranks = " : \\\n".join([FIRST, *(OTHER.format(rank=rank) for rank in range(1, world))]) + "\n"
    assert render_launch(launch(tensor, pipeline)) == expected(tensor, pipeline, ranks=ranks)


@pytest.mark.parametrize("world", [1, 2, 8])
def test_the_exact_text_of_orchestrator_mode(world: int) -> None:
    """The same but for the head, and the server's pools: one server starts the workers."""
    lines = render_launch(launch(world, mode="orchestrator")).splitlines()
    leader = render_launch(launch(world)).splitlines()
    start = lines.index("export TRTLLM_ORCHESTRATOR=1")
    assert lines[start - 1 : start + 9] == [
        "",
        "export TRTLLM_ORCHESTRATOR=1",
        "export TRTLLM_ORCHESTRATOR_SPAWN_PROCESSES=1",
        "# The workers allocate on the GPUs themselves: the server must hold no pools there.",
        'set -- --pinned-memory-pool-byte-size=0 --enable-peer-access=false "$@"',
        "gpu=0",
        'while [ "$gpu" -lt "$gpus" ]; do',
        '    set -- "--cuda-memory-pool-byte-size=$gpu:0" "$@"',
        "    gpu=$((gpu + 1))",
        "done",
    ]
    assert lines[-1] == FIRST
    rest = lines[3 : start - 1] + lines[start + 9 : -1]
    same = leader[3 : leader.index("set -- \\") - 1] + leader[leader.index("set -- \\") - 1 :]
    assert rest == same[: len(rest)]
    assert "orchestrator mode: one tritonserver, which starts a worker for each of the" in lines[1]


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed (Debian package shellcheck)"
)
@pytest.mark.parametrize("mode", ["leader", "orchestrator"])
@pytest.mark.parametrize("world", [1, 2, 8])
def test_shellcheck_finds_nothing(tmp_path: Path, mode: str, world: int) -> None:
    (tmp_path / "launch.sh").write_text(render_launch(launch(world, mode=mode)))
    done = subprocess.run(["shellcheck", tmp_path / "launch.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (
            launch(2, world_size=4),
            "4 ranks, and tensor_parallel_size 2 times pipeline_parallel_size 1 is 2",
        ),
        (
            launch(2, 2, world_size=2),
            "2 ranks, and tensor_parallel_size 2 times pipeline_parallel_size 2 is 4",
        ),
        (launch(2, gpu_device_ids=((0, 0),)), "[0, 0] are not 2 distinct GPUs"),
        (launch(2, gpu_device_ids=((0, 1, 2),)), "[0, 1, 2] are not 2 distinct GPUs"),
        (launch(1, gpu_device_ids=((0,), (1,))), "2 instances of the engine cannot be started in leader mode"),
        (launch(1, mode="orchestrator", participant_ids=((1,),)), "are for servers that do not start their workers"),
        (launch(1, num_nodes=2), "2 nodes: the script starts the ranks of one host"),
    ],
)
def test_a_world_that_is_not_the_engine_s_is_refused(spec: LaunchSpec, sentence: str) -> None:
    assert any(sentence in problem.message for problem in launch_problems(spec))
    with pytest.raises(RecipeError, match="; "):
        render_launch(spec)


def run(
    tmp_path: Path,
    spec: LaunchSpec,
    *,
    ranks: int,
    gpus: int,
    sizes: tuple[int, int, int] = (2, 2, 1),
    arguments: tuple[str, ...] = (),
) -> Any:
    """The script with stand-ins for mpirun (prints its arguments, one a line), the server and nvidia-smi."""
    tools, engine = tmp_path / "tools", tmp_path / "pack age" / "engine"
    for folder in (tools, engine):
        folder.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        (engine / f"rank{rank}.engine").touch()
    mapping = dict(zip(("world_size", "tp_size", "pp_size"), sizes, strict=True))
    (engine / "config.json").write_text(json.dumps({"pretrained_config": {"mapping": mapping}}))
    scripts = {
        "mpirun": 'printf "%s\\n" "$@"\nprintf "orchestrator=%s\\n" "${TRTLLM_ORCHESTRATOR:-}"',
        "nvidia-smi": f"yes GPU | head -n {gpus}" if gpus else "exit 9",
        "tritonserver": "exit 1",
    }
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    script = tmp_path / "launch.sh"
    script.write_text(render_launch(spec))
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "TRITONSERVER": str(tools / "tritonserver")}
    return subprocess.run(
        ["sh", script, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=20
    )


def here(tmp_path: Path, tensor: int, **more: Any) -> LaunchSpec:
    root = tmp_path / "pack age"
    return launch(tensor, gpt_model_path=str(root / "engine"), package=str(root), **more)


def test_what_leader_mode_runs(tmp_path: Path) -> None:
    done = run(tmp_path, here(tmp_path, 2), ranks=2, gpus=2, arguments=("--log-verbose=1",))
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    server = str(tmp_path / "tools" / "tritonserver")
    colon = words.index(":")
    first, second = words[1:colon], words[colon + 1 : -1]
    common = [
        "-n", "1", server, f"--model-repository={tmp_path / 'pack age'}/model_repository", "--grpc-port=8001",
        "--http-port=8000", "--metrics-port=8002", "--disable-auto-complete-config", "--log-verbose=1",
    ]  # fmt: skip
    assert words[0] == "--allow-run-as-root"
    assert (first[:-1], second[:-3]) == (common, common)
    assert second[-3:-1] == ["--model-control-mode=explicit", "--load-model=tensorrt_llm"]
    prefixes = {line.rsplit("=", 1)[1] for line in (first[-1], second[-1])}
    assert len(prefixes) == 2
    assert all(prefix.startswith("trtbuild_") for prefix in prefixes)
    assert words[-1] == "orchestrator="


def test_what_orchestrator_mode_runs(tmp_path: Path) -> None:
    done = run(tmp_path, here(tmp_path, 2, mode="orchestrator"), ranks=2, gpus=3)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert ":" not in words
    assert words[-1] == "orchestrator=1"
    assert {f"--cuda-memory-pool-byte-size={gpu}:0" for gpu in range(3)} <= set(words)
    assert {"--pinned-memory-pool-byte-size=0", "--enable-peer-access=false"} <= set(words)


@pytest.mark.parametrize(
    ("ranks", "gpus", "sentence"),
    [
        (1, 2, "rank1.engine is not here; build the engine for world size 2"),
        (3, 2, "was built for more than world size 2; it is another engine"),
        (2, 1, "1 GPUs are visible, and 2 are needed"),
        (2, 0, "0 GPUs are visible, and 2 are needed"),
    ],
)
def test_a_host_that_does_not_fit_is_named(tmp_path: Path, ranks: int, gpus: int, sentence: str) -> None:
    done = run(tmp_path, here(tmp_path, 2), ranks=ranks, gpus=gpus)
    assert done.returncode == 6
    assert sentence in done.stderr


@pytest.mark.parametrize("sizes", [(2, 1, 2), (4, 4, 1), (2, 2, 2)])
def test_an_engine_of_other_sizes_is_named(tmp_path: Path, sizes: tuple[int, int, int]) -> None:
    done = run(tmp_path, here(tmp_path, 2), ranks=2, gpus=4, sizes=sizes)
    shown = " ".join(map(str, sizes))
    assert done.returncode == 6
    assert (
        f"has the world size, tensor and pipeline parallel sizes {shown}, and this package is for 2 2 1" in done.stderr
    )


def test_a_draft_model_beside_the_engine() -> None:
    draft = EngineParameters("/package/engine/draft/built", tensor_parallel_size=2)
    problems = launch_problems(replace(launch(2), draft=draft))
    assert [str(one) for one in problems] == [
        "speculative.draft: a draft model's engine beside this one, with 2 ranks each; use orchestrator mode"
    ]
    text = render_launch(replace(launch(2, mode="orchestrator"), draft=draft))
    assert "draft=/package/engine/draft/built" in text
    assert '[ -f "$draft/rank1.engine" ] || fail "$draft/rank1.engine is not here; build the draft model' in text
    assert launch_problems(replace(launch(1), draft=draft)) == []
