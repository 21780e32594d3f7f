"""What a process must have before TensorRT-LLM starts in it: GPUs, a clean MPI environment, arguments, a rank.

Facts of NVIDIA/TensorRT-LLM, triton_backend/all_models/llmapi/tensorrt_llm/1/model.py @044a90d2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import yaml

from .trtllm_sampling import Model

ARGS_FILE, DRAFT = "llm_args.yaml", "draft"
# What mpirun, PMIx and PMI tell a process of the job it belongs to. A Python model inherits it from a server that was
# started by mpirun, and a second MPI_Init under the same name fails. Settings such as OMPI_MCA_btl stay.
_JOB = re.compile(
    r"OMPI_(COMM_WORLD_\w+|UNIVERSE_SIZE|FIRST_RANKS|APP_CTX_NUM_PROCS|MCA_orte_\w+)|ORTE_\w+|"
    r"PMIX_(RANK|NAMESPACE|SERVER_\w+|SYSTEM_TMPDIR|SECURITY_MODE|GDS_MODULE|BFROPS_MODULE|PTL_MODULE|VERSION|HOSTNAME)|"
    r"PMI_(RANK|SIZE|FD|SPAWNED|APPNUM)"
)
_JOB_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class SetupError(Exception):
    """The package or the server's configuration cannot be served as it is; the text says what to change."""


def gpu_groups(text: str) -> list[tuple[int, ...]]:
    """The GPU ids of every instance from a text such as ``0,1;2,3``; none for an empty text.

    Raises:
        SetupError: it is not written so.
    """
    if not text:
        return []
    if not re.fullmatch(r"\s*\d+\s*([,;]\s*\d+\s*)*", text):
        raise SetupError(
            f"parameter gpu_device_ids is {text!r}; write GPU numbers such as 0,1;2,3 (one group an instance)"
        )
    return [tuple(int(number) for number in group.split(",")) for group in text.split(";")]


def place(
    parameters: Mapping[str, str], instance: str, count: int, environment: MutableMapping[str, str]
) -> int | None:
    """Give this instance its GPUs and a clean MPI environment; the number of its GPUs, None where nobody chose.

    Must run before anything imports tensorrt_llm: CUDA opens the devices it sees, and the processes that MPI spawns
    inherit them.

    Raises:
        SetupError: the groups do not fit the instances.
    """
    groups = gpu_groups(parameters.get("gpu_device_ids", ""))
    if count != len(groups) and (groups or count > 1):
        raise SetupError(
            f"there are {count} instances (instance_group) and gpu_device_ids names {len(groups)} groups of GPUs; make "
            "them equal"
        )
    if groups or all(environment.get(name, "1") == "1" for name in _JOB_SIZES):
        for name in [name for name in environment if _JOB.fullmatch(name)]:
            del environment[name]
    if not groups:
        return None
    number = re.search(r"_(\d+)$", instance)  # such as tensorrt_llm_0_1: model, group, instance
    index = int(number.group(1)) if number and count > 1 else 0
    if index >= len(groups):
        raise SetupError(f"gpu_device_ids has no group for the instance {instance}; name one for each")
    chosen = ",".join(str(gpu) for gpu in groups[index])
    environment["CUDA_VISIBLE_DEVICES"] = environment["TRTLLM_VISIBLE_DEVICES"] = chosen
    return len(groups[index])


def read_args(engine_dir: Path) -> dict[str, Any]:
    """The LLM arguments of an engine directory.

    Raises:
        SetupError: the file is missing or holds no mapping.
    """
    path = engine_dir / ARGS_FILE
    try:
        args = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SetupError(f"{path}: cannot be read ({error}); build the package again") from error
    if not isinstance(args, dict):
        raise SetupError(f"{path}: holds no mapping of LLM arguments; build the package again")
    return args


def place_draft(args: Mapping[str, Any], engine_dir: Path) -> dict[str, Any]:
    """The arguments with the draft model in the engine directory, where they name it by its place there.

    Raises:
        SetupError: the package lacks it.
    """
    drafting = args.get("speculative_config")
    if not isinstance(drafting, Mapping):
        return dict(args)
    placed = {}
    for name in ("speculative_model", "speculative_model_dir"):
        if drafting.get(name) != DRAFT:
            continue
        if not (engine_dir / DRAFT / "config.json").is_file():
            raise SetupError(f"{engine_dir / DRAFT}: holds no draft model; build the package again")
        placed[name] = str(engine_dir / DRAFT)
    return {**args, "speculative_config": {**drafting, **placed}}


def read_model(engine_dir: Path) -> Model:
    """The vocabulary's size and the end-of-text tokens; generation_config.json wins, as in the embedded engine.

    Raises:
        SetupError: a file is missing or names no vocabulary.
    """
    config = _json(engine_dir / "config.json")
    text = config | (config.get("text_config") or {})  # of a model that reads more than text
    size = text.get("vocab_size")
    if not isinstance(size, int):
        raise SetupError(f"{engine_dir / 'config.json'}: names no vocab_size; take the checkpoint's own config.json")
    generation = engine_dir / "generation_config.json"
    ends = _json(generation).get("eos_token_id") if generation.is_file() else None
    if ends is None:
        ends = text.get("eos_token_id")
    ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
    return Model(size, tuple(sorted(set(ends))))


def start_llm(args: Mapping[str, Any]) -> Any:
    """The LLM object on the leader; None on another rank, after it has worked for the leader until the end.

    Raises:
        SetupError: TensorRT-LLM is not installed, or refuses the arguments.
    """
    try:
        import tensorrt_llm
        from tensorrt_llm._utils import global_mpi_rank, global_mpi_size
    except ModuleNotFoundError as error:
        raise SetupError(
            f"TensorRT-LLM cannot be imported ({error}); serve this package in a Triton TensorRT-LLM container"
        ) from error
    if global_mpi_rank() != 0:
        _work_for_leader()
        return None
    from tensorrt_llm.llmapi.llm_utils import update_llm_args_with_extra_dict

    # Makes typed values of the sub-configurations, as trtllm-serve does with its YAML.
    typed = update_llm_args_with_extra_dict({}, dict(args))
    if global_mpi_size() > 1:
        from mpi4py.MPI import COMM_WORLD
        from tensorrt_llm.llmapi import MpiCommSession

        typed["_mpi_session"] = MpiCommSession(comm=COMM_WORLD, n_workers=COMM_WORLD.Get_size())
    try:
        return tensorrt_llm.LLM(**typed)
    except (ValueError, TypeError) as error:
        raise SetupError(
            f"TensorRT-LLM {tensorrt_llm.__version__} refuses {ARGS_FILE} ({error}); build the package for this version"
        ) from error


def _work_for_leader() -> None:
    from mpi4py.futures import MPICommExecutor
    from mpi4py.MPI import COMM_WORLD

    with MPICommExecutor(COMM_WORLD) as executor:
        if executor is not None:
            raise SetupError(f"rank {COMM_WORLD.Get_rank()} was made the leader of the MPI session; only rank 0 may be")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SetupError(f"{path}: cannot be read ({error}); build the package again") from error
    return found if isinstance(found, dict) else {}
