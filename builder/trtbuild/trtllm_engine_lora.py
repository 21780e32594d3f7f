"""LoRA adapters of TensorRT engines: modules, sizes, what the server reads, what is refused.

Adapters reach an engine as two arrays, in the engine's own type (NVIDIA/TensorRT-LLM docs/source/advanced/lora.md
@05316d33; cpp/tensorrt_llm/runtime/loraUtils.cpp @77d24b5f, loraValidateRequestTensors). The server reads them at start
from `lora_prefetch_dir` (batch_manager/peftCacheManager.cpp, prefetchLoraWeights) through a reader of ``.npy`` files
that knows no bfloat16 (runtime/utils/numpyUtils.cpp @05316d33): an engine with adapters computes in float16.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trtbuild.compat import facts as table
from trtbuild.errors import Problem
from trtbuild.model import ModelFacts
from trtbuild.setting_values import Settings
from trtbuild.trtllm_build import Lora
from trtbuild.trtllm_common import adapter_names, adapter_refusals

DTYPE = "float16"  # of what is not quantized
ADAPTERS = "adapters"  # in the engine directory: one directory for each adapter, named by its task id
_ITEM_BYTES = 2
_USUAL_RANK, _USUAL_HOST_BYTES = 8, 1 << 30  # upstream's defaults
_FIELDS = ("max_lora_rank", "lora_target_modules")
_SHARED = ("attn_k", "attn_v")
_LLAMA = ("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM")


@dataclass(frozen=True, slots=True)
class Module:
    """One adapted projection: TensorRT-LLM's number, and the name below a layer that the base model has for it."""

    number: int
    name: str


# NVIDIA/TensorRT-LLM tensorrt_llm/lora_manager.py @30e6fb55: LORA_MODULE_IDS, get_default_trtllm_modules_to_hf_modules.
MODULES: Mapping[str, Module] = {
    "attn_q": Module(1, "self_attn.q_proj"),
    "attn_k": Module(2, "self_attn.k_proj"),
    "attn_v": Module(3, "self_attn.v_proj"),
    "attn_dense": Module(4, "self_attn.o_proj"),
    "mlp_h_to_4h": Module(5, "mlp.gate_proj"),
    "mlp_4h_to_h": Module(6, "mlp.down_proj"),
    "mlp_gate": Module(7, "mlp.up_proj"),
}


def has_lora(settings: Settings) -> bool:
    """Whether the engine takes adapters: the recipe's own, or those that clients send."""
    given = any(settings.given(f"runtime.lora_config.{name}") for name in _FIELDS)
    return bool(settings.recipe.model.adapters) or given


def take_lora(settings: Settings) -> None:
    """The values of adapters, where there are any."""
    if not has_lora(settings):
        return
    if settings.recipe.model.adapters:
        settings.take("model.adapters")
    for name in _FIELDS:
        settings.take(f"runtime.lora_config.{name}")


def lora(settings: Settings) -> Lora | None:
    """What the engine is built for; the modules are named, so that no adapter decides them or brings its own head."""
    if not has_lora(settings):
        return None
    config = settings.recipe.runtime.lora_config
    return Lora(modules=config.lora_target_modules, max_rank=config.max_lora_rank or _USUAL_RANK)


def module_sizes(facts: ModelFacts) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each module of the whole model.

    As `LoraModule::createLoraModules` computes them (cpp/tensorrt_llm/runtime/loraModule.cpp @2a9abd95).
    """
    hidden, inner = facts.hidden_size, facts.intermediate_size or 0
    queries, shared = facts.num_attention_heads * facts.head_dim, facts.num_key_value_heads * facts.head_dim
    sizes = {"attn_q": (hidden, queries), "attn_k": (hidden, shared), "attn_v": (hidden, shared)}
    if queries == hidden:  # upstream takes both for the same
        sizes["attn_dense"] = (hidden, hidden)
    if not facts.num_experts and inner:
        sizes |= {"mlp_h_to_4h": (hidden, inner), "mlp_4h_to_h": (inner, hidden), "mlp_gate": (hidden, inner)}
    return sizes


def task_ids(settings: Settings) -> dict[str, str]:
    """Names of adapters by the number that clients send as `lora_task_id`: from 1, in the recipe's order."""
    names = adapter_names(settings.recipe)
    return {str(number): name for number, name in enumerate(names, 1)}


def lora_parameters(settings: Settings, facts: ModelFacts) -> dict[str, Any]:
    """What the engine step makes of the recipe's adapters, and the checks of them."""
    if not has_lora(settings):
        return {}
    config, sizes = settings.recipe.runtime.lora_config, module_sizes(facts)
    return {
        "dtype": DTYPE,
        "lora": {
            "adapters": task_ids(settings),
            "max_rank": config.max_lora_rank or _USUAL_RANK,
            "layers": facts.num_layers,
            "modules": {
                name: {"number": MODULES[name].number, "name": MODULES[name].name, "sizes": list(sizes[name])}
                for name in config.lora_target_modules
                if name in sizes
            },
        },
    }


def cache_parameters(settings: Settings, facts: ModelFacts, package: str) -> dict[str, Any]:
    """What the server reads: pages that fit the adapters, room for all of them, and where they lie."""
    if not has_lora(settings):
        return {}
    rank = settings.recipe.runtime.lora_config.max_lora_rank or _USUAL_RANK
    more: dict[str, Any] = {
        "lora_cache_optimal_adapter_size": min(_USUAL_RANK, rank),
        "lora_cache_max_adapter_size": rank,
        "lora_cache_host_memory_bytes": max(_USUAL_HOST_BYTES, 2 * _adapter_bytes(settings, facts)),
    }
    return more | ({"lora_prefetch_dir": f"{package}/engine/{ADAPTERS}"} if settings.recipe.model.adapters else {})


def _adapter_bytes(settings: Settings, facts: ModelFacts) -> int:
    """An upper bound of what all adapters take on the host, to the next MiB."""
    config, sizes = settings.recipe.runtime.lora_config, module_sizes(facts)
    widths = sum(sum(sizes[name]) for name in config.lora_target_modules if name in sizes)
    each = facts.num_layers * widths * (config.max_lora_rank or _USUAL_RANK) * _ITEM_BYTES
    return math.ceil(each * len(settings.recipe.model.adapters) / (1 << 20)) << 20


def lora_refusals(settings: Settings, facts: ModelFacts) -> Iterable[Problem]:
    """Modules that this model does not have, cannot be divided, or that the C++ runtime does not take."""
    if not has_lora(settings):
        return
    recipe, sizes = settings.recipe, module_sizes(facts)
    yield from adapter_refusals(recipe, always=True)
    if recipe.speculative.method != "none":
        message = f"{recipe.speculative.method}: upstream says of speculation with LoRA adapters that it is untested"
        yield Problem("speculative.method", message, "use none, or remove model.adapters and runtime.lora_config")
    at, tensor = "runtime.lora_config.lora_target_modules", recipe.runtime.tensor_parallel_size
    if facts.architecture in table("architectures")["engine"]["one_stage"]:
        message = (
            f"{facts.architecture} joins its projections, and this version of trtbuild divides no adapter of those"
        )
        yield Problem("model.adapters", message, "remove them, or use runtime.kind: trtllm")
        return
    for name in recipe.runtime.lora_config.lora_target_modules:
        if name not in MODULES:
            yield Problem(at, f"{name}: adapters of engines change {', '.join(MODULES)}", "name some of these")
        elif name not in sizes and name == "attn_dense":
            message = f"{name}: the C++ runtime takes its inputs for the hidden size {facts.hidden_size}, which they"
            yield Problem(at, f"{message} are not", "leave it out")
        elif name not in sizes:
            yield Problem(at, f"{name}: the C++ runtime adapts no experts yet", "leave it out")
        elif name in _SHARED and tensor > facts.num_key_value_heads:
            heads = facts.num_key_value_heads
            message = (
                f"{name}: {tensor} ranks repeat the model's {heads} key-value heads, and adapters are not repeated"
            )
            yield Problem(at, message, f"use tensor_parallel_size {heads} or less, or leave it out")


def lora_warnings(settings: Settings, facts: ModelFacts) -> list[str]:
    """What is allowed and may still surprise."""
    if not has_lora(settings):
        return []
    message = (
        "with adapters, everything that is not quantized is float16 in the engine: TensorRT-LLM takes them in the "
        "engine's type, and reads no bfloat16 from files"
    )
    warnings = [message]
    if facts.architecture not in _LLAMA:
        warnings.append(f"upstream's guides show adapters on engines of Llama; none was seen for {facts.architecture}")
    return warnings
