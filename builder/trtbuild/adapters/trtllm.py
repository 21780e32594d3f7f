"""TensorRT-LLM's LLM API: from a planned engine step to the engine directory that a server loads.

An engine directory is the checkpoint with ``llm_args.yaml`` (the arguments of `tensorrt_llm.LLM` besides the place of
model and tokenizer, which the server knows), ``engine.json`` (what this is, for people and checks), LoRA adapters
as ``adapters/NAME``, and the draft model as ``draft``. The arguments name the draft by its place in the directory.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml.error import YAMLError

from trtbuild.adapters import trtllm_draft
from trtbuild.errors import ArtifactError, CompatibilityError, Problem
from trtbuild.linking import place_tree
from trtbuild.llm_keys import LLM_ARGUMENT
from trtbuild.llm_schema import load_schema
from trtbuild.llm_speculation import DRAFT_ARGUMENTS, DRAFT_PLACE, SECTION, written
from trtbuild.llm_validate import validate
from trtbuild.manifest import canonical_json, write_atomic
from trtbuild.yaml_text import parse_yaml, yaml_key, yaml_scalar

ARGS_FILE, ENGINE_FILE, ADAPTERS = "llm_args.yaml", "engine.json", "adapters"
_LIMITS = ("max_batch_size", "max_num_tokens", "max_seq_len")
_GRAPHS = "runtime.cuda_graph_config.enabled"


def llm_arguments(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The LLM arguments of a planned engine step, as TensorRT-LLM names and nests them.

    Args:
        parameters: of the step: ``values`` by recipe path, and ``extra``, which adds to them.
    """
    arguments: dict[str, Any] = {"backend": "pytorch"} if _takes(parameters, "backend") else {}
    for path, value in parameters["values"].items():
        if path == _GRAPHS:
            if not value:
                arguments["cuda_graph_config"] = None
        elif path == "compress.kv_cache":
            _put(arguments, LLM_ARGUMENT[path], "auto" if value == "none" else value)
        else:
            _put(arguments, LLM_ARGUMENT[path], list(value) if isinstance(value, tuple) else value)
    drafting = parameters.get("speculation")
    if drafting is not None:
        arguments[SECTION] = written(drafting["config"], drafting["draft_argument"])
    _merge(arguments, parameters["extra"])
    return arguments


def _takes(parameters: Mapping[str, Any], argument: str) -> bool:
    return load_schema(parameters["schema"]["name"]).has(argument)


def _put(document: dict[str, Any], path: str, value: Any) -> None:
    *sections, last = path.split(".")
    for section in sections:
        document = document.setdefault(section, {})
    document[last] = value


def _merge(document: dict[str, Any], extra: Mapping[str, Any]) -> None:
    """Add `extra`, section by section; the planner has refused what both say."""
    for key, value in extra.items():
        if isinstance(value, Mapping) and isinstance(document.get(key), dict):
            _merge(document[key], value)
        else:
            document[key] = value


def check_arguments(arguments: Mapping[str, Any], schema: str) -> list[Problem]:
    """What the LLM API of this schema would refuse in an ``llm_args.yaml``."""
    places = sorted({"model", "tokenizer"} & set(arguments))
    problems = [Problem(name, f"is the server's to say, not that of {ARGS_FILE}", "remove it") for name in places]
    return problems + validate(dict(arguments) | {"model": "."}, load_schema(schema))


def read_arguments(directory: Path) -> dict[str, Any]:
    """The ``llm_args.yaml`` of an engine directory.

    Raises:
        ArtifactError: it is missing or holds no mapping.
    """
    path = directory / ARGS_FILE
    try:
        arguments = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error})", "build the package again") from None
    if not isinstance(arguments, dict):
        raise ArtifactError(f"{path}: holds no mapping of LLM arguments", "build the package again")
    return arguments


def check_engine(directory: Path, engine: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with an engine directory: its arguments, and where they contradict ``engine.json``."""
    problems = check_arguments(arguments, engine["llm_args"]["name"])
    for name in _LIMITS:
        if arguments.get(name) != engine[name]:
            message = f"{arguments.get(name)} in {ARGS_FILE}, {engine[name]} in {ENGINE_FILE}"
            problems.append(Problem(name, message, "build the package again"))
    world = math.prod(arguments.get(f"{name}_parallel_size", 1) for name in ("tensor", "pipeline", "context"))
    if world != engine["world_size"]:
        message = f"{engine['world_size']} in {ENGINE_FILE}, the parallel sizes of {ARGS_FILE} need {world}"
        problems.append(Problem("world_size", message, "build the package again"))
    for name, place in engine["adapters"].items():
        if not (directory / place / "adapter_config.json").is_file():
            problems.append(Problem(f"adapters.{name}", f"{place} holds no adapter", "build the package again"))
    return [*problems, *_check_drafting(directory, engine.get("speculation"), arguments.get(SECTION))]


def _check_drafting(directory: Path, engine: Any, arguments: Any) -> list[Problem]:
    """The draft's place in the arguments and on the disk against ``engine.json``."""
    said = arguments if isinstance(arguments, Mapping) else {}
    named = next((said[name] for name in DRAFT_ARGUMENTS if name in said), None)
    draft = engine["draft"] if engine else None
    if named != draft and (engine or named == DRAFT_PLACE):
        message = f"the draft is {named or 'not named'} in {ARGS_FILE}, {draft or 'not named'} in {ENGINE_FILE}"
        return [Problem(SECTION, message, "build the package again")]
    if draft is not None and not (directory / draft / "config.json").is_file():
        return [Problem(SECTION, f"{draft} holds no draft model", "build the package again")]
    return []


def engine_json(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of ``engine.json``."""
    values = parameters["values"]
    return {
        "schema_version": 1,
        **{name: parameters[name] for name in ("runtime", "version", "container", "world_size")},
        "llm_args": dict(parameters["schema"]),
        **{name: values[f"runtime.{name}"] for name in _LIMITS},
        "trust_remote_code": values.get("model.trust_remote_code", False),
        "adapters": {name: f"{ADAPTERS}/{name}" for name in parameters["adapters"]},
    } | _drafting(parameters.get("speculation"))


def _drafting(speculation: Mapping[str, Any] | None) -> dict[str, Any]:
    if speculation is None:
        return {}
    draft = DRAFT_PLACE if speculation["draft_argument"] else None
    return {"speculation": {"method": speculation["method"], "draft": draft}}


def check_adapter(name: str, directory: Path, values: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with one LoRA adapter in PEFT's form, against the limits of `values`."""
    at = f"model.adapters {name}"
    try:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        rank, kind = int(config["r"]), config.get("peft_type")
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"adapter_config.json of {directory} cannot be read ({type(error).__name__}: {error})"
        return [Problem(at, message, "give an adapter as PEFT saves it")]
    problems = []
    if kind != "LORA":
        problems.append(Problem(at, f"is of type {kind}, not LORA", "give a LoRA adapter"))
    most = values.get("runtime.lora_config.max_lora_rank")
    if most is not None and rank > most:
        hint = f"set runtime.lora_config.max_lora_rank: {rank}"
        problems.append(Problem(at, f"has rank {rank}, more than max_lora_rank {most}", hint))
    if not (directory / "adapter_model.safetensors").is_file():
        message = f"{directory} has no adapter_model.safetensors"
        problems.append(Problem(at, message, "save it as safetensors: pickles can run code"))
    return problems


def write_engine(
    parameters: Mapping[str, Any],
    checkpoint: Path,
    adapters: Mapping[str, Path],
    out: Path,
    *,
    draft: Path | None = None,
) -> dict[str, Any]:
    """Write an engine directory.

    Args:
        parameters: of the planned step.
        checkpoint: the compressed checkpoint.
        adapters: directories of LoRA adapters by name.
        out: the directory to fill.
        draft: directory of the draft model.

    Returns:
        The contents of ``engine.json``.

    Raises:
        CompatibilityError: the arguments are not those of the planned release, or an adapter does not fit.
    """
    arguments = llm_arguments(parameters)
    problems = check_arguments(arguments, parameters["schema"]["name"])
    for name, directory in adapters.items():
        problems += check_adapter(name, directory, parameters["values"])
    if problems:
        raise CompatibilityError("\n".join(str(problem) for problem in problems))
    place_tree(checkpoint, out)
    for name, directory in adapters.items():
        _copy_adapter(directory, out / ADAPTERS / name)
    if draft is not None:
        trtllm_draft.place(draft, out / DRAFT_PLACE, parameters["speculation"]["method"])
    write_atomic(out / ARGS_FILE, args_text(arguments, parameters))
    described = engine_json(parameters)
    write_atomic(out / ENGINE_FILE, canonical_json(described))
    return described


def _copy_adapter(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.is_file():
            shutil.copyfile(path, target / path.name)


def args_text(arguments: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    """The arguments as YAML that readers of YAML 1.1 and 1.2 understand alike: every text is quoted."""
    schema = parameters["schema"]
    proven = "read from this release" if schema["proven"] else "not proven identical to this release"
    head = (
        f"# Arguments of tensorrt_llm.LLM, TensorRT-LLM {parameters['version']}, PyTorch backend.\n"
        f"# Checked against the argument schema {schema['name']} (commit {schema['commit'][:8]}, {proven}).\n"
    )
    return head + "".join(_lines(arguments, ""))


def _lines(section: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for key, value in sorted(section.items()):
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{yaml_key(key)}:\n", *_lines(value, f"{indent}  ")]
        else:
            lines.append(f"{indent}{yaml_key(key)}: {yaml_scalar(value)}\n")
    return lines
