"""Linear layers that engines load as one matrix or one module, and that therefore need one format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from trtbuild.runtime.experts import UnfusedExperts

# Projections that engines fuse into one matrix and that therefore need one format and one input scale.
FUSED_BY_ENGINES: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def format_groups(model: nn.Module, layers: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
    """The layers of each group, by the group's name: joined projections, and all experts of a block.

    A mixture of experts is one module in engines, with one format for all of its projections (vllm-project/vllm,
    vllm/model_executor/layers/quantization/modelopt.py, ModelOptMixedPrecisionConfig; NVIDIA/TensorRT-LLM,
    tensorrt_llm/_torch/models/modeling_utils.py, apply_layerwise_quant_config).

    Args:
        model: Experts unfused.
        layers: Names in the model.
    """
    containers = [f"{name}." for name, module in model.named_modules() if isinstance(module, UnfusedExperts)]
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(_group(layer, containers), []).append(layer)
    return {name: tuple(members) for name, members in groups.items()}


def _group(layer: str, containers: Iterable[str]) -> str:
    container = next((prefix for prefix in containers if layer.startswith(prefix)), None)
    if container is not None:
        return container.removesuffix(".")
    parent, _, leaf = layer.rpartition(".")
    joined = next((names for names in FUSED_BY_ENGINES if leaf in names), None)
    return layer if joined is None else f"{parent}.{{{','.join(joined)}}}"
