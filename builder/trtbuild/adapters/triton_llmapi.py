"""Repositories for TensorRT-LLM's LLM API: the stock form with the container's model files, checks of LLM arguments.

The stock form follows NVIDIA/TensorRT-LLM triton_backend/all_models/llmapi/tensorrt_llm/ (1/model.py @044a90d2 reads
`triton_config` by direct index; 1/model.yaml @c8c6df08).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trtbuild.adapters.triton_config import Model
from trtbuild.errors import Problem
from trtbuild.llm_speculation import DRAFT_ARGUMENTS, DRAFT_PLACE, SECTION
from trtbuild.render import render

ARGS_FILE = "llm_args.yaml"
STOCK_FILE = "model.yaml"
UPSTREAM = "upstream"
# Where the Triton TensorRT-LLM containers have the model files (triton-inference-server/tensorrtllm_backend
# dockerfile/Dockerfile.triton.trt_llm_backend @0046c234).
CONTAINER_FILES = "/app/all_models/llmapi/tensorrt_llm/1"
_TRITON_CONFIG = "triton_config"
# How many GPUs one instance spans.
_PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size")
_DEFAULT_MAX_NUM_TOKENS = 8192
_AGAIN = "build the package again"


def render_stock(directory: Path, context: Mapping[str, Any], *, llm_args: Mapping[str, Any], period_ms: int) -> None:
    """Write config.pbtxt, 1/model.yaml and the note on the container's files into a model's directory."""
    decoupled = context["decoupled"] == "true"
    triton = {"max_batch_size": 0, "decoupled": decoupled, "cancellation_check_period_ms": period_ms}
    named = {"model": context["model_path"], "tokenizer": context["model_path"]}
    arguments = {name: value for name, value in llm_args.items() if name not in named}
    if SECTION in arguments:
        arguments[SECTION] = _placed(arguments[SECTION], str(context["model_path"]))
    text = yaml.safe_dump({_TRITON_CONFIG: triton, **named, **arguments}, sort_keys=False, allow_unicode=True)
    (directory / "config.pbtxt").write_text(render("llmapi/config.pbtxt.j2", context), encoding="utf-8")
    note = render("llmapi/README.md.j2", {**context, "source": CONTAINER_FILES})
    (directory / "README.md").write_text(note, encoding="utf-8")
    version = directory / "1"
    head = "# LLM arguments, and triton_config for the container's model.py. Written by trtbuild.\n"
    (version / STOCK_FILE).write_text(head + text, encoding="utf-8")


def _placed(drafting: Mapping[str, Any], model: str) -> dict[str, Any]:
    """``speculative_config`` with the whole path of a draft that the arguments name by its place in the engine."""
    inside = [name for name in DRAFT_ARGUMENTS if drafting.get(name) == DRAFT_PLACE]
    return {**drafting, **dict.fromkeys(inside, f"{model}/{DRAFT_PLACE}")}


def read_args(path: Path, where: str) -> tuple[dict[str, Any], list[Problem]]:
    """The mapping in a YAML file of LLM arguments, and what is wrong with the file."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, [Problem(where, "the file is missing", _AGAIN)]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return {}, [Problem(where, f"cannot be read ({' '.join(str(error).split())})", _AGAIN)]
    if not isinstance(found, dict):
        return {}, [Problem(where, "holds no mapping of LLM arguments", _AGAIN)]
    return found, []


def check_args(model: Model, args: Mapping[str, Any]) -> list[Problem]:
    """GPU groups and instances against the parallel sizes, and the longest prompt against one step."""
    return [*_groups(model, args), *_longest_prompt(model, args)]


def check_own(args: Mapping[str, Any]) -> list[Problem]:
    """LLM arguments that the served model cannot work with."""
    problems = []
    if args.get("num_postprocess_workers"):
        message = "num_postprocess_workers sends whole answers as text, and this model needs their tokens"
        problems.append(Problem(f"engine/{ARGS_FILE}", message, "set it to 0: text is made in the served model"))
    # Every request of an engine runs with one beam width (docs/source/features/sampling.md @05ce57bc).
    if args.get("max_beam_width") not in (None, 1):
        message = f"max_beam_width is {args['max_beam_width']}, and this model asks for one beam"
        problems.append(Problem(f"engine/{ARGS_FILE}", message, "set it to 1, or leave it out"))
    return problems


def check_adapters(model: Model, args: Mapping[str, Any], engine: Path) -> list[Problem]:
    """The LoRA adapters that parameter lora_adapters names, against the engine directory."""
    text = model.parameter("lora_adapters") or "{}"
    try:
        adapters = json.loads(text)
    except ValueError as error:
        return [model.problem(f"parameter lora_adapters is no JSON ({error})", 'write {"name": "directory"}')]
    if not isinstance(adapters, dict) or not all(isinstance(place, str) for place in adapters.values()):
        return [model.problem("parameter lora_adapters is no object of directories", 'write {"name": "directory"}')]
    problems = [
        model.problem(f"the LoRA adapter {name!r} has no adapter_config.json in engine/{place}", _AGAIN)
        for name, place in adapters.items()
        if not (engine / place / "adapter_config.json").is_file()
    ]
    if adapters and not (args.get("enable_lora") or args.get("lora_config")):
        message = f"parameter lora_adapters names {', '.join(adapters)}, and {ARGS_FILE} does not switch LoRA on"
        problems.append(model.problem(message, "set enable_lora or lora_config"))
    return problems


def check_stock(model: Model) -> list[Problem]:
    """A stock repository: model.yaml on its own, and against config.pbtxt."""
    problems: list[Problem] = []
    for version in model.versions():
        where = f"{model.name}/{version.name}/{STOCK_FILE}"
        args, faults = read_args(version / STOCK_FILE, where)
        problems += faults
        if faults:
            continue
        problems += _triton_config(model, args.get(_TRITON_CONFIG), where)
        if not isinstance(args.get("model"), str):
            problems.append(Problem(where, "model is missing", "name the engine's directory in the container"))
        problems += _draft(args, where)
        problems += check_args(model, args)
    return problems


def _draft(args: Mapping[str, Any], where: str) -> list[Problem]:
    """The container's model.py does not know where the engine lies: the draft's place must be a whole path."""
    drafting = args.get(SECTION)
    named = next((drafting[name] for name in DRAFT_ARGUMENTS if name in drafting), None) if drafting else None
    if named != DRAFT_PLACE:
        return []
    message = f"{SECTION} names the draft as {named}, which the container looks for in its working directory"
    return [Problem(where, message, "name the whole path: the model's directory and the draft's in it")]


def _triton_config(model: Model, found: Any, where: str) -> list[Problem]:
    if not isinstance(found, dict):
        hint = "write max_batch_size and decoupled under it"
        return [Problem(where, f"{_TRITON_CONFIG} is missing, and the container's model.py reads it at once", hint)]
    batch, decoupled = model.config.max_batch_size, bool(model.config.model_transaction_policy.decoupled)
    problems = []
    for name, kind, ours in (("max_batch_size", int, batch), ("decoupled", bool, decoupled)):
        value = found.get(name)
        if type(value) is not kind:
            message = f"{_TRITON_CONFIG}.{name} is {value!r}, and the container's model.py needs it"
            problems.append(Problem(where, message, f"write {str(ours).lower()}, as in config.pbtxt"))
        elif value != ours:
            message = f"{_TRITON_CONFIG}.{name} is {str(value).lower()}, and config.pbtxt says {str(ours).lower()}"
            problems.append(Problem(where, message, "make them equal: which one holds depends on the server's flags"))
    period = found.get("cancellation_check_period_ms", 100)
    if type(period) is not int or period < 1:
        message = f"{_TRITON_CONFIG}.cancellation_check_period_ms is {period!r}"
        problems.append(Problem(where, message, "a whole number above 0"))
    return problems


def _groups(model: Model, args: Mapping[str, Any]) -> list[Problem]:
    instances = sum(group.count or 1 for group in model.config.instance_group) or 1
    text = model.parameter("gpu_device_ids") or ""
    if not text:
        if instances == 1:
            return []
        message = f"there are {instances} instances, and parameter gpu_device_ids names no GPUs for them"
        return [model.problem(message, "name a group of GPUs for each, such as 0,1;2,3")]
    try:
        groups = [[int(number) for number in group.split(",")] for group in text.split(";")]
    except ValueError:
        return [model.problem(f"parameter gpu_device_ids is {text!r}", "write GPU numbers such as 0,1;2,3")]
    problems = []
    if len(groups) != instances:
        message = f"there are {instances} instances, and gpu_device_ids {text!r} has {len(groups)} groups"
        problems.append(model.problem(message, "make them equal: a group of GPUs for each instance"))
    world, sizes = _world_size(args)
    for group in groups:
        shown = ",".join(map(str, group))
        if len(set(group)) != len(group) or min(group) < 0:
            problems.append(model.problem(f"the GPUs {shown} of one group are not distinct numbers from 0", "fix them"))
        if len(group) != world:
            message = f"the group {shown} of gpu_device_ids has {len(group)} GPUs, and the LLM arguments need {world}"
            problems.append(model.problem(f"{message} ({sizes})", f"name {world} in each group"))
    return problems


def _world_size(args: Mapping[str, Any]) -> tuple[int, str]:
    world, shown = 1, []
    for name in _PARALLEL:
        size = args.get(name, 1)
        if isinstance(size, int):
            world *= size
            shown.append(f"{name} {size}")
    return world, ", ".join(shown)


def _longest_prompt(model: Model, args: Mapping[str, Any]) -> list[Problem]:
    """Without chunked prefill the LLM API refuses a prompt of more than max_num_tokens (llmapi/llm.py @4c05a748)."""
    step = args.get("max_num_tokens") or _DEFAULT_MAX_NUM_TOKENS
    longest = model.parameter("max_input_tokens") or ""
    if args.get("enable_chunked_prefill") or not isinstance(step, int) or not longest.isdecimal():
        return []
    if int(longest) <= step:
        return []
    message = f"max_input_tokens is {longest}, and one step takes max_num_tokens {step} while chunked prefill is off"
    return [model.problem(message, f"at most {step}, or switch enable_chunked_prefill on")]
