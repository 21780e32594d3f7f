"""How TensorRT-LLM divides a model over GPUs: what the parallel sizes of a recipe must divide."""

from __future__ import annotations

from collections.abc import Iterable

from trtbuild.errors import Problem
from trtbuild.model import ModelFacts
from trtbuild.setting_values import Settings
from trtbuild.support import group_sizes


def parallel_refusals(settings: Settings, facts: ModelFacts) -> Iterable[Problem]:
    """Why the model cannot be divided as the recipe says; see the module."""
    runtime = settings.recipe.runtime
    tensor, pipeline, experts = (
        runtime.tensor_parallel_size,
        runtime.pipeline_parallel_size,
        runtime.moe_expert_parallel_size,
    )
    if pipeline > facts.num_layers:
        message = f"{pipeline} is more than the model's {facts.num_layers} layers"
        yield Problem("runtime.pipeline_parallel_size", message, f"use at most {facts.num_layers}")
    if tensor > 1 and not runtime.enable_attention_dp:
        yield from _tensor_parallel(settings, facts, tensor)
    if experts is None:
        return
    at = "runtime.moe_expert_parallel_size"
    if not facts.num_experts:
        yield Problem(at, f"{experts} is set, but {facts.architecture} has no experts", "remove it")
    elif tensor % experts:
        yield Problem(at, f"{experts} does not divide tensor_parallel_size {tensor}", "use a divisor of it")
    elif facts.num_experts % experts:
        yield Problem(at, f"{experts} does not divide the model's {facts.num_experts} experts", "use a divisor of both")


def _tensor_parallel(settings: Settings, facts: ModelFacts, size: int) -> Iterable[Problem]:
    """Every rank gets whole attention heads, whole columns of the MLP, and whole INT4 groups."""
    at, heads, shared = "runtime.tensor_parallel_size", facts.num_attention_heads, facts.num_key_value_heads
    fitting = [number for number in range(1, heads + 1) if divides_heads(facts, number)]
    hint = f"use one of {', '.join(map(str, fitting))}"
    if heads % size:
        yield Problem(at, f"{size} does not divide the model's {heads} attention heads", hint)
        return
    if shared % size and size % shared:
        yield Problem(at, f"{size} and the model's {shared} key-value heads: neither divides the other", hint)
        return
    inner = facts.intermediate_size
    if inner is not None and inner % size:
        yield Problem(at, f"{size} does not divide the intermediate size {inner}", hint)
        return
    group = settings["compress.group_size"]
    if group is None:
        return
    for what, inputs in (("attention output", heads * facts.head_dim), ("intermediate", inner)):
        if inputs is not None and (inputs // size) % group:
            message = f"each of {size} ranks gets {inputs // size} {what} inputs, no whole number of groups of {group}"
            smaller = any(allowed < group for allowed in group_sizes("W4A16_AWQ"))
            hint = "use a smaller compress.group_size or tensor_parallel_size"
            yield Problem(at, message, hint if smaller else "use a smaller tensor_parallel_size, or another format")


def divides_heads(facts: ModelFacts, size: int) -> bool:
    """Whether each of `size` ranks gets whole heads and whole columns of the MLP."""
    shared, inner = facts.num_key_value_heads, facts.intermediate_size or 0
    return not (facts.num_attention_heads % size or inner % size or (shared % size and size % shared))
