"""Triton: write a model repository from templates, and check one offline before anybody starts a server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtbuild.adapters import triton_config, triton_engine, triton_ensemble, triton_llmapi, triton_python
from trtbuild.errors import Problem, RecipeError
from trtbuild.render import data_dir, render

# Part of the repository step's key: raise it when the bytes that this module writes change.
REVISION = 2
_LAYOUT = "llm"
_EMBEDDED, _TRTLLM = "embedded", "trtllm"
_RUNTIMES = (_EMBEDDED, _TRTLLM)
_OWN = "trtbuild"
_MODEL_FILES = (_OWN, triton_llmapi.UPSTREAM)
_CANCELLATION_CHECK_PERIOD_MS = 50


@dataclass(frozen=True, slots=True)
class RepositorySpec:
    """Everything that decides a model repository; sizes are in tokens.

    Only for the runtime `trtllm`: `model_py` takes the container's own model files with ``upstream``, which then reads
    `llm_args` and finds the engine at `model_path`; `instance_count` instances each get a group of `gpu_device_ids`,
    such as ``0,1;2,3``; `lora_adapters` are directories in the engine directory, by the name that clients send.
    """

    model_name: str
    runtime: str
    layout: str
    streaming: bool
    max_seq_len: int
    max_input_tokens: int
    max_output_tokens: int
    default_max_tokens: int
    # Relative to the model's directory: the package keeps engine/ beside model_repository/.
    engine_dir: str = "../../engine"
    trust_remote_code: bool = False
    model_py: str = _OWN
    instance_count: int = 1
    gpu_device_ids: str = ""
    lora_adapters: Mapping[str, str] = field(default_factory=dict)
    llm_args: Mapping[str, Any] = field(default_factory=dict)
    model_path: str = "/package/engine"


def render_repository(spec: RepositorySpec, out: Path) -> None:
    """Write the model repository of `spec` under `out`, which may exist but must not hold this model.

    Raises:
        RecipeError: the layout or the runtime has no repository here.
    """
    _refuse_unknown(spec)
    model = out / spec.model_name
    version = model / "1"
    version.mkdir(parents=True)
    if spec.model_py == triton_llmapi.UPSTREAM:
        triton_llmapi.render_stock(
            model, _stock_context(spec), llm_args=spec.llm_args, period_ms=_CANCELLATION_CHECK_PERIOD_MS
        )
        return
    (model / "config.pbtxt").write_text(render("llm/config.pbtxt.j2", _context(spec)), encoding="utf-8")
    for source in sorted((data_dir("model_repo") / spec.layout).glob("*.py")):
        shutil.copyfile(source, version / source.name)


def check_repository(repo: Path, *, engine: Path | None) -> list[Problem]:
    """Every fault of a model repository that can be seen without a server.

    Args:
        repo: the model repository, a directory with one directory per model.
        engine: the engine directory to hold it against; by default the one that each model names.
    """
    if not repo.is_dir():
        return [Problem(str(repo), "there is no model repository here", "build the package again")]
    directories = sorted(path for path in repo.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not directories:
        return [Problem(str(repo), "the model repository holds no model", "build the package again")]
    problems: list[Problem] = []
    models: list[triton_config.Model] = []
    for directory in directories:
        model, faults = triton_config.read_model(directory)
        problems += faults
        if model is None:
            continue
        models.append(model)
        problems += triton_config.check_model(model)
        if model.parameter("model_py") == triton_llmapi.UPSTREAM:
            problems += triton_llmapi.check_stock(model)
            continue
        problems += triton_python.check_code(model)
        problems += triton_engine.check_against_engine(model, engine)
        if model.parameter("layout") == _LAYOUT:
            problems += _check_contract(model)
    return problems + triton_ensemble.check_ensembles(models)


def _refuse_unknown(spec: RepositorySpec) -> None:
    problems = []
    if spec.layout != _LAYOUT:
        problems.append(Problem("serving.layout", f"{spec.layout!r} cannot be written by this version", "use llm"))
    if spec.runtime not in _RUNTIMES:
        hint = f"use {' or '.join(_RUNTIMES)}"
        problems.append(Problem("runtime.kind", f"{spec.runtime!r} has no model repository here", hint))
    if spec.model_py not in _MODEL_FILES:
        hint = f"use {' or '.join(_MODEL_FILES)}"
        problems.append(Problem("serving.model_py", f"{spec.model_py!r} is not known", hint))
    if spec.runtime != _TRTLLM and _trtllm_only(spec):
        message = f"the runtime {spec.runtime} has no {', '.join(_trtllm_only(spec))}"
        problems.append(Problem("serving", message, "leave them out, or use the runtime trtllm"))
    if problems:
        raise RecipeError(problems)


def _context(spec: RepositorySpec) -> dict[str, object]:
    parameters = {
        "layout": spec.layout,
        "runtime": spec.runtime,
        "engine_dir": spec.engine_dir,
        "max_seq_len": spec.max_seq_len,
        "max_input_tokens": spec.max_input_tokens,
        "max_output_tokens": spec.max_output_tokens,
        "default_max_tokens": spec.default_max_tokens,
        "streaming": _boolean(spec.streaming),
        "trust_remote_code": _boolean(spec.trust_remote_code),
        "cancellation_check_period_ms": _CANCELLATION_CHECK_PERIOD_MS,
    } | _trtllm_parameters(spec)
    return {
        "model_name": spec.model_name,
        "decoupled": _boolean(spec.streaming),
        "instance_count": spec.instance_count,
        "parameters": list(parameters.items()),
    }


def _stock_context(spec: RepositorySpec) -> dict[str, Any]:
    parameters = {
        "layout": spec.layout,
        "runtime": spec.runtime,
        "model_py": spec.model_py,
        "streaming": _boolean(spec.streaming),
    } | _trtllm_parameters(spec)
    return {
        "model_name": spec.model_name,
        "decoupled": _boolean(spec.streaming),
        "instance_count": spec.instance_count,
        "model_path": spec.model_path,
        "parameters": list(parameters.items()),
    }


def _trtllm_parameters(spec: RepositorySpec) -> dict[str, object]:
    """What only that runtime reads, where it was asked for."""
    parameters: dict[str, object] = {}
    if spec.gpu_device_ids:
        parameters["gpu_device_ids"] = spec.gpu_device_ids
    if spec.lora_adapters:
        parameters["lora_adapters"] = json.dumps(dict(spec.lora_adapters), sort_keys=True)
    return parameters


def _trtllm_only(spec: RepositorySpec) -> list[str]:
    given = {
        "model_py": spec.model_py != _OWN,
        "instance_count": spec.instance_count != 1,
        "gpu_device_ids": bool(spec.gpu_device_ids),
        "lora_adapters": bool(spec.lora_adapters),
    }
    return [name for name, is_given in given.items() if is_given]


def _boolean(value: bool) -> str:  # noqa: FBT001 - a conversion has one argument
    return "true" if value else "false"


def _check_contract(model: triton_config.Model) -> list[Problem]:
    """Inputs, outputs and parameters against what the template of this layout declares: clients rely on every one."""
    wanted = triton_config.parse(render("llm/config.pbtxt.j2", _context(_ANY_SPEC)))
    problems = []
    for kind in ("input", "output"):
        have = {tensor.name: tensor for tensor in getattr(model.config, kind)}
        for tensor in getattr(wanted, kind):
            found = have.get(tensor.name)
            if found is None:
                problems.append(model.problem(f"{kind} {tensor.name} of the llm layout is missing", "put it back"))
            elif (found.data_type, list(found.dims)) != (tensor.data_type, list(tensor.dims)):
                declared = f"{triton_config.type_name(tensor)} {list(tensor.dims)}"
                problems.append(
                    model.problem(
                        f"{kind} {tensor.name} is {triton_config.type_name(found)} {list(found.dims)}, and the model "
                        f"sends and reads {declared}",
                        f"declare {declared}",
                    )
                )
    missing = sorted(set(wanted.parameters) - set(model.config.parameters))
    return problems + [model.problem(f"parameter {name} is missing", "put it back") for name in missing]


_ANY_SPEC = RepositorySpec(
    model_name="any",
    runtime=_EMBEDDED,
    layout=_LAYOUT,
    streaming=True,
    max_seq_len=2,
    max_input_tokens=1,
    max_output_tokens=1,
    default_max_tokens=1,
)
