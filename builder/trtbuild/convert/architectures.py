"""The architectures that the converter knows, one row each: names, norms, experts, and which config keys they take.

`family` says whose config class of TensorRT-LLM reads the result, and so which keys `checkpoint_config` writes.
The rows' facts come from NVIDIA/TensorRT-LLM: MODEL_MAP of tensorrt_llm/models/__init__.py, and the files named in
`source` at the commits given there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trtbuild.errors import CompatibilityError


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Where a mixture-of-experts layer keeps its parts; names are below the layer's prefix."""

    prefix: str
    router: str
    gate: str
    up: str
    down: str
    shared: str | None = None
    shared_gate: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One row.

    Args:
        family: "llama", "qwen", "gemma" or "phi3".
        norms: the layer's norms, unified name -> TensorRT-LLM name.
        norm_plus_one: the stored norm weights are offsets from 1; TensorRT-LLM wants the sum.
        qk_norm: queries and keys are normalized per head.
        fused: query, key and value lie in ``qkv_proj``, gate and up in ``gate_up_proj``.
        qkv_bias: these three always have a bias; other biases follow the config.
        pipeline: TensorRT-LLM can split this model over pipeline stages.
    """

    name: str
    model_type: str
    family: str
    source: str
    norms: Mapping[str, str]
    norm_plus_one: bool = False
    qk_norm: bool = False
    fused: bool = False
    qkv_bias: bool = False
    pipeline: bool = True
    experts: Experts | None = None


_TWO_NORMS = {"input_layernorm": "input_layernorm", "post_attention_layernorm": "post_layernorm"}
_FOUR_NORMS = _TWO_NORMS | {
    "pre_feedforward_layernorm": "pre_feedforward_layernorm",
    "post_feedforward_layernorm": "post_feedforward_layernorm",
}
_MIXTRAL = Experts(prefix="block_sparse_moe.experts", router="block_sparse_moe.gate", gate="w1", up="w3", down="w2")
_QWEN_MOE = Experts(prefix="mlp.experts", router="mlp.gate", gate="gate_proj", up="up_proj", down="down_proj")
_QWEN2_MOE = Experts(
    prefix="mlp.experts", router="mlp.gate", gate="gate_proj", up="up_proj", down="down_proj",
    shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate",
)  # fmt: skip

_LLAMA = "tensorrt_llm/models/llama/config.py @04100fd0a709"
_QWEN = "tensorrt_llm/models/qwen/config.py @0428c1882888, qwen/model.py @04a2cacbfd3b"
_GEMMA = "tensorrt_llm/models/gemma/convert.py @65b31db1b401, gemma/model.py @5dedf53b14d9"
# Phi3Model makes the embedding, the last norm and the head on every rank: no pipeline stages.
_PHI3 = "tensorrt_llm/models/phi3/config.py @033f406702a7, phi3/convert.py @43bf1a65115d, phi3/model.py @1479eaf5b72c"

ARCHITECTURES: Mapping[str, Architecture] = {
    row.name: row
    for row in (
        Architecture(name="LlamaForCausalLM", model_type="llama", family="llama", norms=_TWO_NORMS, source=_LLAMA),
        Architecture(name="MistralForCausalLM", model_type="mistral", family="llama", norms=_TWO_NORMS, source=_LLAMA),
        Architecture(
            name="MixtralForCausalLM", model_type="mixtral", family="llama", norms=_TWO_NORMS, experts=_MIXTRAL,
            source=_LLAMA,
        ),
        Architecture(
            name="Qwen2ForCausalLM", model_type="qwen2", family="qwen", norms=_TWO_NORMS, qkv_bias=True, source=_QWEN
        ),
        Architecture(
            name="Qwen2MoeForCausalLM", model_type="qwen2_moe", family="qwen", norms=_TWO_NORMS, qkv_bias=True,
            experts=_QWEN2_MOE, source=_QWEN,
        ),
        Architecture(
            name="Qwen3ForCausalLM", model_type="qwen3", family="qwen", norms=_TWO_NORMS, qk_norm=True, source=_QWEN
        ),
        Architecture(
            name="Qwen3MoeForCausalLM", model_type="qwen3_moe", family="qwen", norms=_TWO_NORMS, qk_norm=True,
            experts=_QWEN_MOE, source=_QWEN,
        ),
        Architecture(
            name="Gemma2ForCausalLM", model_type="gemma2", family="gemma", norms=_FOUR_NORMS, norm_plus_one=True,
            source=_GEMMA,
        ),
        Architecture(
            name="Gemma3ForCausalLM", model_type="gemma3_text", family="gemma", norms=_FOUR_NORMS, norm_plus_one=True,
            qk_norm=True, source=_GEMMA,
        ),
        Architecture(
            name="Phi3ForCausalLM", model_type="phi3", family="phi3", norms=_TWO_NORMS, fused=True, pipeline=False,
            source=_PHI3,
        ),
    )
}  # fmt: skip


def find_architecture(name: str, model_type: str) -> Architecture:
    """The row of a checkpoint's architecture.

    Raises:
        CompatibilityError: there is none, or the model type does not belong to it.
    """
    row = ARCHITECTURES.get(name)
    if row is None or row.model_type != model_type:
        known = ", ".join(sorted(ARCHITECTURES))
        raise CompatibilityError(
            f"{name} ({model_type}) has no conversion to a TensorRT-LLM checkpoint; convertible are {known}",
            "choose the runtime trtllm or embedded for this model",
        )
    return row
