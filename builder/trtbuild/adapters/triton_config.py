"""One model's config.pbtxt: parse it with the official message and check what a parse does not see."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.errors import Problem

CONFIG = "config.pbtxt"
# What may be written in a repository of ours: Triton names a missing one only when it starts.
_BACKENDS = ("python", "tensorrtllm")
_PLACEHOLDER = re.compile(r"\$\{[^}]*\}?|\{\{.*?(\}\}|$)|\{%.*?(%\}|$)")
_ENSEMBLE = "ensemble"
# Runtimes that Triton must not place.
_CHOOSES_DEVICE = {
    "embedded": "the embedded engine chooses its device by engine.json",
    "trtllm": "TensorRT-LLM takes the GPUs of gpu_device_ids, or all",
}


@dataclass(frozen=True, slots=True)
class Model:
    """A model directory and its parsed configuration (a `ModelConfig` message of tritonclient)."""

    directory: Path
    config: Any

    @property
    def name(self) -> str:
        """The directory's name, which is the model's name for Triton."""
        return self.directory.name

    @property
    def is_ensemble(self) -> bool:
        """Whether this model only connects others."""
        return self.config.platform == _ENSEMBLE or bool(self.config.HasField("ensemble_scheduling"))

    def parameter(self, name: str) -> str | None:
        """The value of one entry under ``parameters``, None where it is absent."""
        return str(self.config.parameters[name].string_value) if name in self.config.parameters else None

    def versions(self) -> list[Path]:
        """The version directories, oldest first."""
        found = [path for path in self.directory.iterdir() if path.is_dir() and path.name.isdecimal()]
        return sorted(found, key=lambda path: int(path.name))

    def problem(self, message: str, hint: str) -> Problem:
        """A fault in this model's configuration."""
        return Problem(f"{self.name}/{CONFIG}", message, hint)


def parse(text: str) -> Any:
    """The `ModelConfig` message of `text`.

    Raises:
        google.protobuf.text_format.ParseError: with line and column.
    """
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse(text, model_config_pb2.ModelConfig())


def type_name(tensor: Any) -> str:
    """The data type of an input or output as config.pbtxt writes it."""
    from tritonclient.grpc import model_config_pb2

    return str(model_config_pb2.DataType.Name(tensor.data_type))


def read_model(directory: Path) -> tuple[Model | None, list[Problem]]:
    """The model in `directory`, and what is wrong with the text of its configuration."""
    from google.protobuf.text_format import ParseError

    path = directory / CONFIG
    where = f"{directory.name}/{CONFIG}"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None, [Problem(where, "the file is missing", "every directory of a model repository is a model")]
    except (OSError, UnicodeDecodeError) as error:
        return None, [Problem(where, f"cannot be read ({error})", "write it as UTF-8 text")]
    problems = [
        Problem(where, f"line {number} has the unfilled placeholder {found.group(0)}", "render the template completely")
        for number, line in enumerate(text.splitlines(), start=1)
        if (found := _PLACEHOLDER.search(line.split("#", 1)[0]))
    ]
    try:
        return Model(directory, parse(text)), problems
    except ParseError as error:
        message = f"line {error} (protobuf text format)"
        return None, [*problems, Problem(where, message, "fields and values are those of Triton's ModelConfig message")]


def check_model(model: Model) -> list[Problem]:
    """Name, version directory, backend, instance group and limits of one model."""
    return [*_name(model), *_version(model), *_backend(model), *_instances(model), *_decoupled(model)]


def _name(model: Model) -> list[Problem]:
    if model.config.name in ("", model.name):
        return []
    message = f"the name {model.config.name!r} differs from the directory {model.name!r}, and Triton refuses that"
    return [model.problem(message, "make them equal")]


def _version(model: Model) -> list[Problem]:
    present = {int(path.name) for path in model.versions()}
    if not present:
        return [model.problem("there is no version directory", f"the files belong into {model.name}/1/")]
    missing = sorted(set(model.config.version_policy.specific.versions) - present)
    return [
        model.problem(f"version_policy asks for version {number}, which has no directory", "ask for one that is there")
        for number in missing
    ]


def _backend(model: Model) -> list[Problem]:
    if model.is_ensemble:
        return []
    backend = model.config.backend
    if backend in _BACKENDS:
        return []
    if not backend:
        return [model.problem("no backend is named", f"write one of: {', '.join(_BACKENDS)}")]
    close = difflib.get_close_matches(backend, _BACKENDS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"allowed are {', '.join(_BACKENDS)}"
    return [model.problem(f"the backend {backend!r} is not known", hint)]


def _instances(model: Model) -> list[Problem]:
    from tritonclient.grpc import model_config_pb2

    problems = []
    for group in model.config.instance_group:
        if group.kind != model_config_pb2.ModelInstanceGroup.KIND_GPU:
            continue
        chooses = _CHOOSES_DEVICE.get(model.parameter("runtime") or "")
        if chooses is not None:
            hint = f"use KIND_CPU: {chooses}"
            problems.append(model.problem("the instance group has kind KIND_GPU", hint))
        elif not _has_gpu():
            problems.append(model.problem("the instance group has kind KIND_GPU and this host has no GPU", "KIND_CPU"))
        repeated = len(set(group.gpus)) != len(group.gpus)
        if repeated or any(gpu < 0 for gpu in group.gpus):
            problems.append(
                model.problem(f"the GPU ids {list(group.gpus)} are not distinct numbers from 0", "fix them")
            )
    return problems


def _has_gpu() -> bool:
    """Whether the NVIDIA driver shows a device (the driver makes these nodes)."""
    return any(re.fullmatch(r"nvidia\d+", path.name) for path in Path("/dev").iterdir())


def _decoupled(model: Model) -> list[Problem]:
    decoupled = bool(model.config.model_transaction_policy.decoupled)
    problems = []
    streaming = model.parameter("streaming")
    if streaming is not None and streaming != str(decoupled).lower():
        message = f"parameter streaming is {streaming!r}, and model_transaction_policy says decoupled: {decoupled}"
        problems.append(model.problem(message, "a model streams if and only if it is decoupled: make them equal"))
    if decoupled and model.config.HasField("sequence_batching"):
        problems.append(model.problem("a decoupled model cannot have sequence_batching", "remove it"))
    return problems
