"""Ensembles: do the steps exist, and do the tensors between them agree in name and type?"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from trtbuild.adapters.triton_config import Model, type_name
from trtbuild.errors import Problem

_FEW, _NEAR = 8, 3  # tensors that a sentence names


def check_ensembles(models: Sequence[Model]) -> list[Problem]:
    """Every fault between an ensemble and the models of the same repository."""
    by_name = {model.name: model for model in models}
    return [problem for model in models if model.is_ensemble for problem in _check(model, by_name)]


def _check(ensemble: Model, models: Mapping[str, Model]) -> list[Problem]:
    steps = ensemble.config.ensemble_scheduling.step
    if not steps:
        return [ensemble.problem("the ensemble has no step", "add ensemble_scheduling { step [...] }")]
    problems: list[Problem] = []
    # Type of every tensor of the ensemble, and who said so.
    types: dict[str, tuple[str, str]] = {
        tensor.name: (type_name(tensor), "the ensemble's input") for tensor in ensemble.config.input
    }
    produced = set(types)
    for step in steps:
        produced |= set(step.output_map.values())
    for step in steps:
        model = models.get(step.model_name)
        if model is None:
            known = ", ".join(sorted(set(models) - {ensemble.name})) or "none"
            message = f"a step uses the model {step.model_name!r}, which is not in this repository"
            problems.append(ensemble.problem(message, f"the others are: {known}"))
            continue
        problems += _step(ensemble, model, step, types)
        problems += _sources(ensemble, step, produced)
    for tensor in ensemble.config.output:
        problems += _agree(ensemble, tensor.name, type_name(tensor), "the ensemble's output", types)
        if tensor.name not in produced:
            problems.append(ensemble.problem(f"no step produces the output {tensor.name}", "map one in output_map"))
    return problems


def _step(ensemble: Model, model: Model, step: Any, types: dict[str, tuple[str, str]]) -> list[Problem]:
    problems: list[Problem] = []
    for kind, mapping in (("input", step.input_map), ("output", step.output_map)):
        tensors = {tensor.name: tensor for tensor in getattr(model.config, kind)}
        for name, tensor_name in mapping.items():
            if name not in tensors:
                message = f"maps {tensor_name} to the {kind} {name}, which the model {model.name} does not have"
                problems.append(ensemble.problem(message, _nearest(name, list(tensors))))
                continue
            who = f"{kind} {name} of {model.name}"
            problems += _agree(ensemble, tensor_name, type_name(tensors[name]), who, types)
        if kind == "input":
            for tensor in model.config.input:
                if not tensor.optional and tensor.name not in mapping:
                    message = f"the step {model.name} gets no input {tensor.name}, which is not optional"
                    problems.append(ensemble.problem(message, "map it in input_map"))
    return problems


def _nearest(name: str, tensors: list[str]) -> str:
    """The tensors that are spelled like this one; all of them where they are few."""
    if len(tensors) <= _FEW:
        return f"it has: {', '.join(tensors) or 'none'}"
    near = difflib.get_close_matches(name, tensors, n=_NEAR, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"none of its {len(tensors)} is spelled like it: they are in its config.pbtxt"


def _sources(ensemble: Model, step: Any, produced: set[str]) -> list[Problem]:
    return [
        ensemble.problem(
            f"the step {step.model_name} reads {name}, which is no input of the ensemble, and no step produces it",
            "check the names in input_map and output_map",
        )
        for name in step.input_map.values()
        if name not in produced
    ]


def _agree(ensemble: Model, tensor: str, kind: str, who: str, types: dict[str, tuple[str, str]]) -> list[Problem]:
    known, first = types.setdefault(tensor, (kind, who))
    if known == kind:
        return []
    message = f"the tensor {tensor} is {known} as {first} and {kind} as {who}"
    return [ensemble.problem(message, "declare one type on both sides")]
