"""Random weights in the shape of Llama 3.1 8B, made on the GPU in seconds, in the forms that a checkpoint has."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from trtbuild.runtime import Engine, EngineConfig
from trtbuild.runtime.attention import ATTENTION_NAME, register
from trtbuild.runtime.checkpoint import LoadedModel
from trtbuild.runtime.checkpoint_files import QuantizationFacts
from trtbuild.runtime.checkpoint_fill import restore_buffers
from trtbuild.runtime.intake import Intake
from trtbuild.runtime.linear import CodedLinear, Fp8Linear, share_inputs
from trtbuild.runtime.model import ModelRunner
from trtbuild.runtime.numerics import NUMERICS

FORMATS = ("bf16", "fp8", "int4")
SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
_INPUT_SCALE = 0.02
GROUP = 128


def random_model(form: str, **shape: int) -> LoadedModel:
    """The model of `form`, one of FORMATS, on the GPU."""
    register()
    config = LlamaConfig(**(SHAPE | shape))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=ATTENTION_NAME)
    device = torch.device("cuda")
    torch.manual_seed(0)
    for name, module in list(model.named_modules()):
        if form != "bf16" and isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, _fp8(module, device) if form == "fp8" else _int4(module, device))
            continue
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            value = value.normal_(0.0, 0.02) if parameter.dim() > 1 else value.fill_(1.0)
            module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    restore_buffers(model, device)
    share_inputs(model)
    facts = QuantizationFacts({"bf16": None, "fp8": "FP8", "int4": "W4A16_AWQ"}[form])
    return LoadedModel(model=model.eval(), config=config, quantization=facts, kv_scales=None, notes=[])


def _fp8(module: nn.Linear, device: torch.device) -> nn.Module:
    weight = torch.empty(module.weight.shape, dtype=torch.bfloat16, device=device).normal_(0.0, 60.0)
    return Fp8Linear(
        weight=weight.clamp_(-448, 448).to(torch.float8_e4m3fn),
        weight_scale=torch.tensor(0.02 / 60, device=device),
        input_scale=torch.tensor(_INPUT_SCALE, device=device),
        bias=None,
        dtype=torch.bfloat16,
        form="packed",
    )


def _int4(module: nn.Linear, device: torch.device) -> nn.Module:
    outputs, inputs = module.weight.shape
    scales = torch.empty((outputs, inputs // GROUP), dtype=torch.bfloat16, device=device).uniform_(2e-3, 6e-3)
    weight = torch.randint(0, 256, (outputs // 2, inputs), dtype=torch.uint8, device=device)
    return CodedLinear(
        numerics=NUMERICS["W4A16_AWQ"],
        stored={"weight": weight, "weight_scale": scales},
        bias=None,
        dtype=torch.bfloat16,
        form="packed",
    )


def random_engine(form: str, config: EngineConfig, **shape: int) -> Engine:
    """An engine over `random_model`."""
    runner = ModelRunner(random_model(form, **shape), config)
    intake = Intake(
        config=config,
        vocab_size=runner.vocab_size,
        capacity=runner.num_blocks * runner.block_size,
        chunk_limit=runner.chunk_limit,
        end_ids=frozenset(),
    )
    return Engine(runner, config, intake)


def weight_bytes(engine: Engine) -> int:
    """The bytes of all matrices that a step reads."""
    weights: Any = engine._runner.fast.decoder.weights
    total = weights.head.nbytes
    for layer in weights.layers:
        for matrix in (layer.qkv, layer.output, layer.gate_up, layer.down):
            total += matrix.weight.nbytes + (0 if matrix.group_scales is None else matrix.group_scales.nbytes)
    return total
