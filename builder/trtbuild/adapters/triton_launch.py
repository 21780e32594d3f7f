"""The script that starts Triton over a TensorRT engine on one or several GPUs of one host.

The commands are those of TensorRT-LLM's own launcher (NVIDIA/TensorRT-LLM triton_backend/scripts/
launch_triton_server.py @0b06796b, @0a2e2c1f): in leader mode one ``-n 1 tritonserver`` for each rank under one mpirun,
where ranks above 0 load the engine's model explicitly; in orchestrator mode (``--multi-model``) one server with
``TRTLLM_ORCHESTRATOR=1``, without pinned and CUDA memory pools, that starts the workers itself
(``TRTLLM_ORCHESTRATOR_SPAWN_PROCESSES=1``, world size 1). Each server's Python backend gets a prefix of its own for
shared memory. Several instances with GPUs of their own, ``0,1;2,3``, need the orchestrator (triton-inference-server/
tensorrtllm_backend docs/llama_multi_instance.md @05ceae03).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trtbuild.adapters.triton_parameters import EngineParameters
from trtbuild.errors import Problem, RecipeError
from trtbuild.render import data_dir, render

_PACKAGE = "/package"
_CHECK = data_dir("templates") / "deploy" / "check_built.py"


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """What decides the script.

    Args:
        engine: the parameters of the model with the engine.
        world_size: ranks that the engine was built for.
        container: the image that the script runs in.
        mode: ``leader`` or ``orchestrator``.
        model: name of the model with the engine.
        package: where the container sees the package.
        draft: the parameters of the draft model's engine, which has as many ranks.
        described: whether an ``engine.json`` lies beside each engine's directory, as in a package; the script holds the
            engine against it.
    """

    engine: EngineParameters
    world_size: int
    container: str
    mode: Literal["leader", "orchestrator"] = "leader"
    model: str = "tensorrt_llm"
    draft: EngineParameters | None = None
    package: str = _PACKAGE
    described: bool = False


def launch_problems(spec: LaunchSpec) -> list[Problem]:
    """Everything because of which the script would start another world than the engine's; empty when it is sound."""
    engine, problems = spec.engine, []
    tensor, pipeline = engine.tensor_parallel_size, engine.pipeline_parallel_size
    if spec.world_size != engine.world_size:
        message = (
            f"the engine has {spec.world_size} ranks, and tensor_parallel_size {tensor} times pipeline_parallel_size "
            f"{pipeline} is {engine.world_size}"
        )
        problems.append(Problem("runtime", message, "build the engine for the same parallelism"))
    groups = engine.gpu_device_ids or ()
    for group in groups:
        if len(set(group)) != engine.world_size or len(group) != engine.world_size:
            message = f"{list(group)} are not {engine.world_size} distinct GPUs, one for each rank"
            problems.append(Problem("gpu_device_ids", message, "name one GPU for each rank"))
    if spec.mode == "leader" and len(groups) > 1:
        message = f"{len(groups)} instances of the engine cannot be started in leader mode"
        problems.append(Problem("gpu_device_ids", message, "use orchestrator mode"))
    if spec.mode == "leader" and spec.draft is not None and spec.world_size > 1:
        message = f"a draft model's engine beside this one, with {spec.world_size} ranks each"
        problems.append(Problem("speculative.draft", message, "use orchestrator mode"))
    if spec.mode == "orchestrator" and engine.backend == "tensorrtllm" and engine.participant_ids is not None:
        message = "are for servers that do not start their workers, and orchestrator mode starts them"
        problems.append(Problem("participant_ids", message, "leave them out"))
    if engine.num_nodes != 1:
        message = f"{engine.num_nodes} nodes: the script starts the ranks of one host"
        problems.append(Problem("num_nodes", message, "use 1, or start mpirun over your hosts yourself"))
    return problems


def render_launch(spec: LaunchSpec) -> str:
    """The text of the script; pure.

    Raises:
        RecipeError: every fault that `launch_problems` finds.
    """
    problems = launch_problems(spec)
    if problems:
        raise RecipeError(problems)
    named = [gpu for group in spec.engine.gpu_device_ids or () for gpu in group]
    context = {
        "name": "launch.sh",
        "mode": spec.mode,
        "world_size": spec.world_size,
        # An orchestrator is one server, whatever the engine's ranks.
        "ranks": list(range(spec.world_size if spec.mode == "leader" else 1)),
        "gpus": max(named) + 1 if named else spec.world_size,
        "container": spec.container,
        "package": spec.package,
        "engine_dir": spec.engine.gpt_model_path,
        "mapping": f"{spec.world_size} {spec.engine.tensor_parallel_size} {spec.engine.pipeline_parallel_size}",
        "draft_dir": spec.draft.gpt_model_path if spec.draft else None,
        "model": spec.model,
        "used": ",".join(map(str, sorted(set(named)) if named else range(spec.world_size))),
        "check_py": _CHECK.read_text(encoding="utf-8") if spec.described else "",
    }
    return render("deploy/launch-engine.sh.j2", context)
