"""What each kind of step does: from its inputs' directories to files in a staging directory.

Every function takes a `Work` and returns the record that the manifest and the evidence keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.adapters import (
    container,
    triton,
    triton_launch,
    triton_parameters,
    trtllm,
    trtllm_checkpoint,
    trtllm_engine,
    trtllm_tokenizer,
)
from trtbuild.checkpoint_files import LocalFiles
from trtbuild.draft import DRAFT_ROLE, HEADS_ROLE, other_tokens
from trtbuild.errors import CompatibilityError, ToolError
from trtbuild.linking import place_tree
from trtbuild.manifest import canonical_json, write_atomic
from trtbuild.plan import Plan, Step
from trtbuild.process import run_worker
from trtbuild.report import Reporter
from trtbuild.store import Artifact, Staging
from trtbuild.trtllm_build import DRAFT
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
        inputs: every finished artifact, by kind.
        files: the user's files of this step, by role.
        staging: where to write.
    """

    plan: Plan
    step: Step
    source: Path
    inputs: Mapping[str, Artifact]
    files: Mapping[str, Path]
    staging: Staging
    reporter: Reporter


def run_step(work: Work) -> dict[str, Any]:
    """Do the work of one step; returns its record."""
    actions = {
        "compress": _compress,
        "engine": _engine,
        "repository": _repository,
        "deploy": _deploy,
        "evaluate": _evaluate,
    }
    return actions[work.step.kind](work)


def _compress(work: Work) -> dict[str, Any]:
    parameters = dict(work.step.parameters)
    calibration = dict(parameters.pop("calibration", {"column": None, "count": 1, "length": 16, "seed": 0}))
    calibration["data"] = _optional(work.files.get("data"))
    parameters.setdefault("device", "cpu")
    request = parameters | {
        "source": str(work.source),
        "tokenizer": str(work.files.get("tokenizer", work.source)),
        "output": str(work.staging.content),
        "sparsity_method": parameters["sparsity_method"] or "sparsegpt",
        "calibration": calibration,
    }
    return _in_child("trtbuild.compress", request, work)


def _engine(work: Work) -> dict[str, Any]:
    if work.step.parameters["runtime"] == "trtllm":
        return _trtllm_engine(work)
    if work.step.parameters["runtime"] == "trtllm-engine":
        return _converted_engine(work)
    place_tree(work.inputs["compress"].content, work.staging.content)
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
    trtllm.write_engine(parameters, checkpoint, work.files, work.staging.content)
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
    if HEADS_ROLE in work.files:
        record = trtllm_engine.copy_checkpoint(parameters, work.files[HEADS_ROLE], work.staging.content)
    else:
        record = _in_child("trtbuild.convert", request, work)
    trtllm_engine.write_engine(parameters, checkpoint, work.staging.content)
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
        trtllm_engine.write_engine(parameters["draft"], None, out)
    return record


def _repository(work: Work) -> dict[str, Any]:
    parameters = dict(work.step.parameters)
    if "engine" in parameters:
        parameters |= {name: _server_parameters(parameters[name]) for name in ("engine", "draft") if name in parameters}
    if "llm_args" in parameters:
        parameters["llm_args"] = trtllm.llm_arguments(parameters["llm_args"])
    spec = triton.RepositorySpec(**parameters)
    triton.render_repository(spec, work.staging.content)
    return {}


def _server_parameters(engine: Mapping[str, Any]) -> triton_parameters.EngineParameters:
    more = {name: _tuples(value) for name, value in engine["more"].items()}
    return triton_parameters.from_runtime(engine["runtime"], engine["gpt_model_path"], **more)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _deploy(work: Work) -> dict[str, Any]:
    if "engine" in work.step.parameters:
        return _launch(work)
    container.write_deploy(deploy_spec(work.step, work.inputs["engine"].digest), work.staging.content)
    return {}


def _launch(work: Work) -> dict[str, Any]:
    """The script that starts the server of a TensorRT engine in its container."""
    engine, draft = work.step.parameters["engine"], work.step.parameters.get("draft")
    spec = triton_launch.LaunchSpec(
        engine=_server_parameters(engine), world_size=engine["world_size"], container=engine["image"],
        # Two engines with several ranks each are more than a leader can start.
        mode="orchestrator" if draft and engine["world_size"] > 1 else "leader",
        draft=_server_parameters(draft) if draft else None,
    )  # fmt: skip
    work.staging.content.mkdir(parents=True, exist_ok=True)
    if "launch" in work.step.parameters["files"]:
        script = work.staging.content / "launch.sh"
        script.write_text(triton_launch.render_launch(spec), encoding="utf-8", newline="\n")
        script.chmod(0o755)
    return {}


def deploy_spec(step: Step, engine_digest: str) -> container.DeploySpec:
    """What the deployment files are made from."""
    parameters = {name: value for name, value in step.parameters.items() if name not in ("engine", "draft")}
    return container.DeploySpec(**parameters, engine_digest=engine_digest)


def _evaluate(work: Work) -> dict[str, Any]:
    parameters = dict(work.step.parameters)
    calibration = {"data": _optional(work.files.get("calibration")), "column": parameters.pop("calibration_column")}
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
