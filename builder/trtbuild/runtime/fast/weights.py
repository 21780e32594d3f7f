"""The weights of a decoder as the fast path reads them: q, k and v in one matrix, gate and up in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from trtbuild.runtime.attention import LayerCall
from trtbuild.runtime.codes import unpack_int4
from trtbuild.runtime.fast.packing import pack, unpack
from trtbuild.runtime.fast.shapes import Heads, Rotation
from trtbuild.runtime.linear import CodedLinear, Fp8Linear


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear layer: weight [N, K] in bfloat16, or E4M3 codes with their scales (0-d float32), or 4-bit codes.

    Those are `packing.pack`'s bytes with `group_scales` [K / S, N]; their input is to be multiplied by `pre` [K].
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    weight_scale: torch.Tensor | None = None
    factor: torch.Tensor | None = None  # input_scale * weight_scale
    group_scales: torch.Tensor | None = None
    pre: torch.Tensor | None = None

    @property
    def outputs(self) -> int:
        """N."""
        return self.weight.shape[0] if self.group_scales is None else self.weight.shape[1]


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer; norms are weights [hidden]."""

    attention_norm: torch.Tensor
    qkv: Matrix
    heads: Heads
    output: Matrix
    mlp_norm: torch.Tensor
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True, slots=True)
class Weights:
    """A whole decoder."""

    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: torch.Tensor
    rotation: Rotation
    eps: float


def fuse(model: nn.Module, calls: Sequence[LayerCall], max_positions: int) -> Weights:
    """The weights of `model`, a class of `choice.CLASSES`, whose own layers become views of the fused matrices.

    So the general path still runs on the same model, and nothing is held twice.
    """
    root: Any = model
    layers = tuple(
        _layer(layer, call, root.config) for layer, call in zip(root.model.layers, calls, strict=True)
    )  # fmt: skip
    return Weights(
        embedding=root.model.embed_tokens.weight.detach(),
        layers=layers,
        norm=root.model.norm.weight.detach(),
        head=root.lm_head.weight.detach(),
        rotation=_rotation(root.model.rotary_emb, max_positions, root.lm_head.weight.device),
        eps=float(root.config.rms_norm_eps),
    )


def _layer(layer: Any, call: LayerCall, config: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    heads = Heads(
        queries=call.query_heads,
        keys=call.key_shape[0],
        size=call.key_shape[1],
        scaling=float(attention.scaling),
        window=call.window or 0,
        query_norm=None if query_norm is None else query_norm.weight.detach(),
        key_norm=None if key_norm is None else key_norm.weight.detach(),
        eps=float(config.rms_norm_eps),
    )
    attention_norm, qkv = _fold(layer.input_layernorm, _join([attention.q_proj, attention.k_proj, attention.v_proj]))
    mlp_norm, gate_up = _fold(layer.post_attention_layernorm, _join([mlp.gate_proj, mlp.up_proj]))
    return Layer(
        attention_norm=attention_norm,
        qkv=qkv,
        heads=heads,
        output=_join([attention.o_proj]),
        mlp_norm=mlp_norm,
        gate_up=gate_up,
        down=_join([mlp.down_proj]),
    )


def _join(modules: list[Any]) -> Matrix:
    """One matrix of `modules`, whose weights become views of it; `choice` made sure that they go together."""
    if isinstance(modules[0], CodedLinear):
        return _join_int4(modules)
    weight = modules[0].weight.detach()
    if len(modules) > 1:
        weight = torch.cat([module.weight.detach() for module in modules])
        row = 0
        for module in modules:
            part = weight[row : row + module.out_features]
            module.weight = part if isinstance(module, Fp8Linear) else nn.Parameter(part, requires_grad=False)
            row += module.out_features
    bias = _join_biases(modules, weight)
    first = modules[0]
    if not isinstance(first, Fp8Linear):
        return Matrix(weight, bias)
    return Matrix(weight, bias, first.input_scale, first.weight_scale, first.input_scale * first.weight_scale)


def _join_biases(modules: list[Any], like: torch.Tensor) -> torch.Tensor | None:
    biases = [module.bias for module in modules]
    if all(one is None for one in biases):
        return None
    return torch.cat(
        [
            like.new_zeros(module.out_features, dtype=torch.bfloat16) if one is None else one.detach()
            for module, one in zip(modules, biases, strict=True)
        ]
    )


def _join_int4(modules: list[Any]) -> Matrix:
    """As `_join`, packed anew: the general path expands its parts from there."""
    group = modules[0].in_features // modules[0].weight_scale.shape[1]
    packed = torch.cat([pack(unpack_int4(module.weight), group) for module in modules], dim=1)
    scales = torch.cat([module.weight_scale.t() for module in modules], dim=1).to(torch.bfloat16).contiguous()
    row = 0
    for module in modules:
        part = slice(row, row + module.out_features)
        module.weights = partial(_expand, packed[:, part], scales[:, part], module.dtype)
        module.weight = module.weight_scale = None
        row += module.out_features
    return Matrix(
        packed, _join_biases(modules, packed), group_scales=scales, pre=modules[0].pre_quant_scale
    )  # fmt: skip


def _expand(packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    codes = unpack(packed)
    groups = codes.view(codes.shape[0], packed.shape[0], -1).to(dtype)
    return groups.mul_(scales.t().to(dtype).unsqueeze(-1)).view(codes.shape)


def _fold(norm: Any, matrix: Matrix) -> tuple[torch.Tensor, Matrix]:
    """The weight of the norm before `matrix`, with `pre` in it, and the matrix without."""
    weight = norm.weight.detach()
    if matrix.pre is None:
        return weight, matrix
    return weight.float() * matrix.pre.float(), replace(matrix, pre=None)


def _rotation(rotary: Any, positions: int, device: torch.device) -> Rotation:
    """The class's own cosines and sines; those of the second half of a head repeat those of the first."""
    with torch.inference_mode():
        places = torch.arange(positions, device=device)[None]
        cos, sin = rotary(torch.zeros(1, dtype=torch.float32, device=device), places)
    half = cos.shape[-1] // 2
    return Rotation(cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous())
