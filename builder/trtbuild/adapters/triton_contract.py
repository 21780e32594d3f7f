"""A model's configuration against what its layout declares: every name, type and shape that clients rely on."""

from __future__ import annotations

from typing import Any

from trtbuild.adapters.triton_config import Model, type_name
from trtbuild.errors import Problem


def differences(model: Model, wanted: Any, layout: str) -> list[Problem]:
    """What `model` lacks or declares otherwise than `wanted`, a `ModelConfig` message of the layout."""
    problems = []
    for kind in ("input", "output"):
        have = {tensor.name: tensor for tensor in getattr(model.config, kind)}
        for tensor in getattr(wanted, kind):
            found = have.get(tensor.name)
            if found is None:
                message = f"{kind} {tensor.name} of the {layout} layout is missing"
                problems.append(model.problem(message, "put it back"))
            elif _shape(found) != _shape(tensor):
                declared = _described(tensor)
                message = f"{kind} {tensor.name} is {_described(found)}, and the model sends and reads {declared}"
                problems.append(model.problem(message, f"declare {declared}"))
            elif kind == "input" and tensor.optional and not found.optional:
                message = f"input {tensor.name} is not optional, and clients of the {layout} layout leave it out"
                problems.append(model.problem(message, "write optional: true"))
    missing = sorted(set(wanted.parameters) - set(model.config.parameters))
    return problems + [model.problem(f"parameter {name} is missing", "put it back") for name in missing]


def _shape(tensor: Any) -> tuple[Any, ...]:
    reshape = list(tensor.reshape.shape) if tensor.HasField("reshape") else None
    return tensor.data_type, list(tensor.dims), reshape


def _described(tensor: Any) -> str:
    reshape = f" reshaped to {list(tensor.reshape.shape)}" if tensor.HasField("reshape") else ""
    return f"{type_name(tensor)} {list(tensor.dims)}{reshape}"
