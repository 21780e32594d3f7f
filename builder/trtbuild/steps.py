"""What each kind of step does: from its inputs' directories to files in a staging directory.

Every function takes a `Work` and returns the record that the manifest and the evidence keep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtbuild.adapters import (
    container,
    container_checks,
    triton,
    triton_launch,
    triton_launch_llm,
    triton_parameters,
    trtllm,
    trtllm_checkpoint,
    trtllm_draft,
    trtllm_engine,
    trtllm_tokenizer,
)
from trtbuild.checkpoint_files import LocalFiles
from trtbuild.compress_memory import parse_bytes
from trtbuild.draft import DRAFT_ROLE, HEADS_ROLE, MEDUSA_ROLE, other_tokens
from trtbuild.draft_inputs import conversion_request, draft_digest, draft_directory, training_request
from trtbuild.errors import CompatibilityError, ToolError
from trtbuild.foresight import refuse_scaling
from trtbuild.linking import place_tree
from trtbuild.manifest import FileEntry, canonical_json, digest_json, read_json, write_atomic
from trtbuild.plan import Plan, Step
from trtbuild.process import run_worker
from trtbuild.report import Reporter
from trtbuild.store import Artifact, Staging
from trtbuild.trained_for import weights_digest
from trtbuild.training_settings import PROMPTS_ROLE
from trtbuild.trtllm_build import BUILT, DRAFT
from trtbuild.trtllm_engine_lora import ADAPTERS

ENGINE_FILE = "engine.json"
QUALITY_FILE = "quality.json"


@dataclass(frozen=True, slots=True)
class Work:
    """One step about to run.

    Args:
        plan: the whole plan.
        step: the step itself.
        source: the original checkpoint.
        source_files: its files with their digests.
        inputs: every finished artifact, by kind.
        files: the user's files of this step, by role.
        file_digests: the digest of each of them.
        staging: where to write.
    """

    plan: Plan
    step: Step
    source: Path
    source_files: Sequence[FileEntry]
    inputs: Mapping[str, Artifact]
    files: Mapping[str, Path]
    file_digests: Mapping[str, str]
    staging: Staging
    reporter: Reporter


def run_step(work: Work) -> dict[str, Any]:
    """Do the work of one step; returns its record."""
    actions = {
        "compress": _compress,
        "draft": _draft,
        "engine": _engine,
        "repository": _repository,
        "deploy": _deploy,
        "evaluate": _evaluate,
    }
    return actions[work.step.kind](work)


def _compress(work: Work) -> dict[str, Any]:
    parameters = dict(work.step.parameters)
    calibration = dict(parameters.pop("calibration", {"column": None, "count": 1, "length": 16, "seed": 0}))
    calibration.setdefault("data", _optional(work.files.get("data")))
    parameters.setdefault("device", "cpu")
    request = parameters | {
        "source": str(work.source),
        "tokenizer": str(work.files.get("tokenizer", work.source)),
        "output": str(work.staging.content),
        "work": str(work.staging.unfinished),
        "key": work.staging.path.name,
        "max_memory": _memory_limit(work.plan),
        "sparsity_method": parameters["sparsity_method"] or "sparsegpt",
        "calibration": calibration,
    }
    record = _in_child("trtbuild.compress", request, work)
    found = record["result"]["calibration"]
    if found is not None:
        work.reporter.note(f"compress: calibrated on {found['summary']}")
    return record


def _memory_limit(plan: Plan) -> int | None:
    """The recipe's bound in bytes; it decides where things lie while they are compressed, and no byte of the result."""
    given = plan.value("compress.max_memory")
    return None if given is None else parse_bytes(given)


def _draft(work: Work) -> dict[str, Any]:
    """Heads or a draft, trained for the checkpoint as it will be served."""
    request = training_request(work.step.parameters, work.files[PROMPTS_ROLE], work.inputs, work.staging)
    return _in_child("trtbuild.training", request | {"weights": weights_digest(work.source_files)}, work)


def _engine(work: Work) -> dict[str, Any]:
    if work.step.parameters["runtime"] == "trtllm":
        return _trtllm_engine(work)
    if work.step.parameters["runtime"] == "trtllm-engine":
        return _converted_engine(work)
    checkpoint, draft = work.inputs["compress"].content, draft_directory(work.inputs, work.files, DRAFT_ROLE)
    place_tree(checkpoint, work.staging.content)
    if draft is not None:
        speculation = work.step.parameters["speculative"]
        problem = other_tokens(checkpoint, draft)
        if problem is not None:
            raise CompatibilityError(str(problem))
        trtllm_draft.place(draft, work.staging.content / speculation["draft"], speculation["method"])
    write_atomic(work.staging.content / ENGINE_FILE, canonical_json(dict(work.step.parameters)))
    return {}


def _trtllm_engine(work: Work) -> dict[str, Any]:
    """The checkpoint, after the rules by which TensorRT-LLM takes one, with its arguments."""
    parameters, checkpoint = work.step.parameters, work.inputs["compress"].content
    layout = trtllm_checkpoint.Layout.of(parameters["values"], gpu=work.plan.value("target.gpu"))
    checks = trtllm_checkpoint.check(LocalFiles(checkpoint), parameters["version"], layout)
    wrong = [problem for check in checks for problem in check.problems]
    if wrong:
        raise CompatibilityError(
            f"TensorRT-LLM {parameters['version']} would not take the checkpoint {checkpoint}:\n" + "\n".join(wrong)
        )
    adapters = {name: path for name, path in work.files.items() if name != DRAFT_ROLE}
    draft = draft_directory(work.inputs, work.files, DRAFT_ROLE)
    if "speculation" in parameters:
        found = trtllm_draft.check(draft, checkpoint, parameters["speculation"], parameters["version"], layout)
        trtllm_draft.refuse(draft, found, parameters["version"])
        checks += found
    trtllm.write_engine(parameters, checkpoint, adapters, work.staging.content, draft=draft)
    return {"result": {"checks": [check.name for check in checks]}}


def _converted_engine(work: Work) -> dict[str, Any]:
    """The checkpoint in TensorRT-LLM's format, and the script that builds the engine from it."""
    parameters, checkpoint = work.step.parameters, work.inputs["compress"].content
    request = {
        "source": str(checkpoint),
        "output": str(work.staging.content / trtllm_engine.CHECKPOINT),
        "tp_size": parameters["spec"]["tp_size"],
        "pp_size": parameters["spec"]["pp_size"],
        "dtype": parameters["dtype"],
    }
    checkpoint_digest = work.file_digests.get(HEADS_ROLE, work.inputs["compress"].digest)
    if HEADS_ROLE in work.files:
        record = trtllm_engine.copy_checkpoint(parameters, work.files[HEADS_ROLE], work.staging.content)
    else:
        record = _in_child("trtbuild.convert", request | conversion_request(parameters, work.inputs, work.files), work)
        # Where the model came from a hub, the plan was made without its rotary embedding.
        refuse_scaling(parameters["version"], read_json(Path(request["output"]) / "config.json"))
    if "medusa" in parameters:
        heads = draft_digest(work.inputs, work.file_digests, MEDUSA_ROLE)
        checkpoint_digest = digest_json([checkpoint_digest, heads])
    revision = str(work.step.tools["revision"])
    key = trtllm_engine.build_key(parameters, checkpoint_digest, revision)
    trtllm_engine.write_engine(parameters, checkpoint, work.staging.content, key)
    if "tokenizer_info" in parameters:
        info = trtllm_tokenizer.tokenizer_info(checkpoint)
        write_atomic(work.staging.content / parameters["tokenizer_info"], canonical_json(info))
    adapters = parameters.get("lora", {}).get("adapters", {})
    if adapters:
        request = {
            "lora": parameters["lora"],
            "adapters": {task: str(work.files[name]) for task, name in adapters.items()},
            "output": str(work.staging.content / ADAPTERS),
        }
        record["adapters"] = _in_child("trtbuild.convert.lora", request, work)
    if "draft" in parameters:
        out, draft = work.staging.content / DRAFT, work.files[DRAFT_ROLE]
        problem = other_tokens(checkpoint, draft)
        if problem is not None:
            raise CompatibilityError(str(problem))
        request |= {"source": str(draft), "output": str(out / trtllm_engine.CHECKPOINT)}
        record["draft"] = _in_child("trtbuild.convert", request, work)
        key = trtllm_engine.build_key(parameters["draft"], work.file_digests[DRAFT_ROLE], revision)
        trtllm_engine.write_engine(parameters["draft"], None, out, key)
    return record


def repository_spec(step: Step) -> triton.RepositorySpec:
    """What the step `repository` renders."""
    parameters = dict(step.parameters)
    if "engine" in parameters:
        parameters |= {name: _server_parameters(parameters[name]) for name in ("engine", "draft") if name in parameters}
    if "llm_args" in parameters:
        parameters["llm_args"] = trtllm.llm_arguments(parameters["llm_args"])
    return triton.RepositorySpec(**parameters)


def _repository(work: Work) -> dict[str, Any]:
    triton.render_repository(repository_spec(work.step), work.staging.content)
    return {}


def _server_parameters(engine: Mapping[str, Any]) -> triton_parameters.EngineParameters:
    more = {name: _tuples(value) for name, value in engine["more"].items()}
    return triton_parameters.from_runtime(engine["runtime"], engine["gpt_model_path"], **more)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _deploy(work: Work) -> dict[str, Any]:
    engine = work.inputs["engine"]
    spec = replace(deploy_spec(work.step, engine.digest), launch=_launch_text(work.step.parameters.get("launch")))
    if spec.runtime == "trtllm-engine":
        paths = [entry.path for entry in engine.files]
        top = [path for path in paths if "/" not in path and path != trtllm_engine.SCRIPT]
        spec = replace(spec, engine_files=top, engine_trees=_served_trees(work.step, paths))
    container.write_deploy(spec, work.staging.content)
    return {}


def _served_trees(step: Step, paths: Sequence[str]) -> list[str]:
    """The directories of an engine directory that a server reads; built engines come into it later."""
    drafts = [f"{DRAFT}/{BUILT}"] if "draft" in step.parameters.get("launch", {}) else []
    return [BUILT, *drafts, *([ADAPTERS] if any(path.startswith(f"{ADAPTERS}/") for path in paths) else [])]


def deploy_spec(step: Step, engine_digest: str) -> container.DeploySpec:
    """What the deployment files are made from, but for the launch script of a sound plan."""
    parameters = {name: value for name, value in step.parameters.items() if name != "launch"}
    return container.DeploySpec(**parameters, engine_digest=engine_digest)


def launch_ranks(step: Step) -> container_checks.Ranks | None:
    """What the launch script of a runtime of TensorRT-LLM checks; None for the embedded engine's."""
    launch = step.parameters.get("launch")
    if launch is None:
        return None
    names = ("tensor", "pipeline") if "mode" in launch else ("tensor", "pipeline", "context")
    sizes = tuple((launch["runtime"] if "mode" in launch else launch)[f"{name}_parallel_size"] for name in names)
    world = math.prod(sizes)
    return container_checks.Ranks((world, *sizes) if "mode" in launch else sizes, world)


def _launch_text(launch: Mapping[str, Any] | None) -> str:
    """The script that starts the server of TensorRT-LLM in its container; none is the embedded engine's."""
    if launch is None:
        return ""
    if "mode" not in launch:
        return triton_launch_llm.render_launch(triton_launch_llm.LaunchSpec(**launch))
    spec = triton_launch.LaunchSpec(
        engine=_server_parameters(launch),
        draft=_server_parameters(launch["draft"]) if "draft" in launch else None,
        described=True,
        **{name: launch[name] for name in ("world_size", "container", "mode")},
    )
    return triton_launch.render_launch(spec)


def _evaluate(work: Work) -> dict[str, Any]:
    parameters = dict(work.step.parameters)
    calibration = {
        "data": _optional(work.files.get("calibration")),
        "column": parameters.pop("calibration_column"),
        "split": parameters.pop("calibration_split", None),
    }
    request = parameters | {
        "source": str(work.source),
        "engine": str(work.inputs["compress"].content),
        "data": _optional(work.files.get("data")),
        "calibration": calibration,
    }
    record = _in_child("trtbuild.evaluate", request, work)
    write_atomic(work.staging.content / QUALITY_FILE, canonical_json(record["result"]))
    return record


def _in_child(module: str, request: Mapping[str, Any], work: Work) -> dict[str, Any]:
    outcome = run_worker(module, request, log=work.staging.log, on_progress=work.reporter.progress)
    usage = {"seconds": outcome.seconds, "peak_memory_bytes": outcome.peak_memory_bytes}
    return {"result": dict(outcome.result), "usage": usage}


def _optional(path: Path | None) -> str | None:
    return None if path is None else str(path)


def check_repository(repository: Path, engine: Path) -> None:
    """Refuse a rendered repository that would not load.

    Raises:
        ToolError: naming every fault.
    """
    problems = triton.check_repository(repository, engine=engine)
    if problems:
        raise ToolError("the rendered model repository is faulty:\n" + "\n".join(str(problem) for problem in problems))
