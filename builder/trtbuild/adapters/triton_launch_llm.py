"""The script that starts Triton over TensorRT-LLM's LLM API, on one host or on several.

On one host the server is started once: the LLM API spawns a process for each rank itself (NVIDIA/TensorRT-LLM
tensorrt_llm/llmapi/llm.py, `MpiPoolSession`), and several instances want a server without mpirun
(triton_backend/scripts/launch_triton_server.py @0a2e2c1f, ``--no-mpi``; its other arguments are passed here too). On
several hosts one task for each rank runs ``trtllm-llmapi-launch`` (tensorrt_llm/llmapi/trtllm-llmapi-launch @020c89e6):
rank 0 starts the server without the variables of MPI, the others work for it; upstream's guide does it with ``srun
--mpi=pmix`` (triton-inference-server/tensorrtllm_backend docs/llmapi.md).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from trtbuild.errors import Problem, RecipeError
from trtbuild.render import render


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """What decides the script.

    Args:
        container: the image that the script runs in.
        instances: model instances, each with ranks of its own.
        hosts: over how many hosts the ranks of one instance are spread.
        gpus: how many GPUs each host must show.
        arguments: the YAML with the LLM arguments, relative to the package.
        fixed_place: whether the arguments name the package's place, which is then /package.
        kv_scales: whether the checkpoint has scales of the KV cache, which TensorRT-LLM reads on demand.
    """

    container: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    context_parallel_size: int
    gpus: int
    arguments: str
    instances: int = 1
    hosts: int = 1
    fixed_place: bool = False
    kv_scales: bool = False

    @property
    def world_size(self) -> int:
        """How many ranks one instance has."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size


def launch_problems(spec: LaunchSpec) -> list[Problem]:
    """What no script can start; empty when it is sound."""
    problems = []
    if spec.hosts > 1 and spec.instances > 1:
        message = f"{spec.instances} instances cannot be spread over {spec.hosts} hosts: one server starts them"
        problems.append(Problem("gpu_device_ids", message, "use one instance, or one host"))
    if spec.gpus * spec.hosts < spec.world_size:
        message = f"{spec.hosts} hosts with {spec.gpus} GPUs each are too few for {spec.world_size} ranks"
        problems.append(Problem("gpus_per_node", message, "give each rank a GPU"))
    return problems


def render_launch(spec: LaunchSpec) -> str:
    """The text of the script; pure.

    Raises:
        RecipeError: every fault that `launch_problems` finds.
    """
    problems = launch_problems(spec)
    if problems:
        raise RecipeError(problems)
    return render("deploy/launch-llm.sh.j2", asdict(spec) | {"world_size": spec.world_size})
