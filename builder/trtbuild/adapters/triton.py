"""Triton: write a model repository from templates, and check one offline before anybody starts a server."""

from __future__ import annotations

from pathlib import Path

from trtbuild.adapters import (
    triton_config,
    triton_engine,
    triton_ensemble,
    triton_five,
    triton_llm,
    triton_llmapi,
    triton_python,
)
from trtbuild.adapters.triton_spec import RepositorySpec
from trtbuild.errors import Problem, RecipeError

__all__ = ["RepositorySpec", "check_repository", "model_names", "render_repository"]

# A file in the place of the directory for byte code, where Python would leave some and take some for the source.
# Triton's python stub isolates its Python from the environment: PYTHONDONTWRITEBYTECODE does not reach it.
_NO_BYTE_CODE = "__pycache__"
_WRITERS = {
    triton_llm.LAYOUT: triton_llm.write,
    triton_five.LAYOUT: triton_five.write,
    triton_five.TOKENS: triton_five.write,
}
_RUNTIMES = {
    triton_llm.LAYOUT: ("embedded", "trtllm"),
    triton_five.LAYOUT: ("embedded", "trtllm-engine"),
    triton_five.TOKENS: ("trtllm-engine",),
}


def render_repository(spec: RepositorySpec, out: Path) -> None:
    """Write the model repository of `spec` under `out`, which may exist but must not hold its models.

    Raises:
        RecipeError: the layout or the runtime has no repository here.
    """
    _refuse_unknown(spec)
    _WRITERS[spec.layout](spec, out)
    for version in {path.parent for path in out.rglob("*.py")}:
        (version / _NO_BYTE_CODE).touch()


def model_names(layout: str, model_name: str, *, drafts: bool = False) -> tuple[str, ...]:
    """The models that a repository of this layout consists of, with a draft model's where it `drafts`."""
    return (model_name,) if layout == triton_llm.LAYOUT else triton_five.model_names(layout, drafts=drafts)


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
        if model.parameter("layout") == triton_llm.LAYOUT:
            problems += triton_llm.check(model)
    return problems + triton_five.check(models) + triton_ensemble.check_ensembles(models)


def _refuse_unknown(spec: RepositorySpec) -> None:
    runtimes = _RUNTIMES.get(spec.layout)
    if runtimes is None:
        hint = f"use one of {', '.join(_WRITERS)}"
        raise RecipeError([Problem("serving.layout", f"{spec.layout!r} cannot be written by this version", hint)])
    if spec.runtime not in runtimes:
        message = f"{spec.runtime!r} has no model repository of layout {spec.layout} here"
        raise RecipeError([Problem("runtime.kind", message, f"use one of {', '.join(runtimes)}")])
    if (spec.engine is None) != (spec.runtime != "trtllm-engine"):
        message = f"{spec.runtime!r} and the parameters of a TensorRT engine do not belong together"
        raise RecipeError([Problem("runtime.kind", message, "give EngineParameters for trtllm-engine, and only there")])
    problems = triton_llm.refusals(spec)
    if problems:
        raise RecipeError(problems)
