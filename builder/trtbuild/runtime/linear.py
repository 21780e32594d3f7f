"""Linear layers that compute with the numerics of the stored format, on any device.

Formats are those of ModelOpt's unified Hugging Face checkpoint
(NVIDIA/Model-Optimizer: modelopt/torch/export/quant_utils.py @0.47.0).
Shapes: T tokens (any leading dimensions), I inputs, O outputs, G = I / group size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional

Form = Literal["expanded", "packed"]

E4M3_MAX = 448.0
_SCALED_MM_MULTIPLE = 16  # torch._scaled_mm takes matrices whose sides are multiples of 16
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_FP8_CAPABILITY = (8, 9)  # the first NVIDIA GPUs with FP8 tensor cores: Ada


def to_e4m3(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the E4M3 codes of `x / scale`: saturated to +-448, rounded to nearest, ties to even."""
    # A bfloat16 quotient would be rounded twice.
    quotient = x.to(torch.promote_types(x.dtype, torch.float32)) / scale
    return quotient.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Return int8 codes [O, I] in -8..7 from bytes [O/2, I]: row r holds outputs 2r (low nibble) and 2r+1 (high)."""
    signed = packed.view(torch.int8)
    low = (signed << 4) >> 4
    high = signed >> 4
    return torch.stack((low, high), dim=1).reshape(packed.shape[0] * 2, packed.shape[1])


def expand_int4(packed: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights [O, I] of packed codes [O/2, I] and scales [O, G]: code times the scale of its group."""
    codes = unpack_int4(packed)
    rows, columns = codes.shape
    groups = codes.reshape(rows, weight_scale.shape[1], -1).to(dtype)
    return groups.mul_(weight_scale.to(dtype).unsqueeze(-1)).reshape(rows, columns)


class InputCodes:
    """The codes of one input tensor, for the layers that all read it: computed by the first, dropped by the last."""

    def __init__(self, readers: int) -> None:
        self._readers = readers
        self._left = 0
        self._x: torch.Tensor | None = None
        self._codes: torch.Tensor | None = None

    def of(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return `to_e4m3(x, scale)`."""
        codes = self._codes
        if codes is None or self._x is not x:
            codes = to_e4m3(x, scale)
            self._x, self._codes, self._left = x, codes, self._readers
        self._left -= 1
        if self._left == 0:
            self._x = self._codes = None
        return codes


class Fp8Linear(nn.Module):
    """E4M3 weights and activations with one scale each, accumulated in at least float32.

    y = (codes(x / input_scale) @ codes(W)^T) * weight_scale * input_scale + bias
    """

    def __init__(
        self,
        *,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        input_scale: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        form: Form,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        self.form = form
        # Expanded weights are the codes themselves in the compute type (E4M3 values are exact in all of them), so that
        # the products are those of FP8 arithmetic; the scales are applied to the sums.
        self.register_buffer("weight", weight.to(dtype) if form == "expanded" else weight)
        # At least float32, so that a scale keeps its value under bfloat16 compute; 0-d, so that results keep `dtype`.
        wide = torch.promote_types(dtype, torch.float32)
        self.register_buffer("weight_scale", weight_scale.to(wide).reshape(()))
        self.register_buffer("input_scale", input_scale.to(wide).reshape(()))
        self.register_buffer("bias", bias)
        # Tensor cores add up in fewer bits than float32 has; whoever computes in float32 wants those bits.
        narrow = dtype in (torch.bfloat16, torch.float16)
        self.tensor_cores = form == "packed" and narrow and _has_fp8_tensor_cores(weight)
        self.input_codes = InputCodes(readers=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [T, O] in the compute type for `x` [T, I]."""
        codes = self.input_codes.of(x, self.input_scale)
        if self.tensor_cores:
            return self._scaled_mm(codes)
        y = functional.linear(codes.to(self.dtype), self.weight.to(self.dtype))
        y = y * (self.weight_scale * self.input_scale)
        return y if self.bias is None else y + self.bias

    def _scaled_mm(self, codes: torch.Tensor) -> torch.Tensor:
        flat = codes.reshape(-1, self.in_features)
        y = torch._scaled_mm(  # noqa: SLF001  the only door to FP8 tensor cores
            flat, self.weight.t(), scale_a=self.input_scale, scale_b=self.weight_scale, out_dtype=self.dtype
        )
        y = y.reshape(*codes.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        return f"{self.in_features}, {self.out_features}, form={self.form}, bias={self.bias is not None}"


class Int4Linear(nn.Module):
    """Signed 4-bit weights with one scale per output and input group (AWQ); activations in the compute type.

    y = (x * pre_quant_scale) @ (codes(W) * weight_scale)^T + bias
    """

    def __init__(
        self,
        *,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        pre_quant_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        form: Form,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape[0] * 2, weight.shape[1]
        self.dtype = dtype
        self.form = form
        expanded = form == "expanded"
        self.register_buffer("weight", expand_int4(weight, weight_scale, dtype) if expanded else weight)
        self.register_buffer("weight_scale", None if expanded else weight_scale)
        self.register_buffer("pre_quant_scale", None if pre_quant_scale is None else pre_quant_scale.to(dtype))
        self.register_buffer("bias", bias)

    def weights(self) -> torch.Tensor:
        """The weights [O, I] in the compute type."""
        return self.weight if self.form == "expanded" else expand_int4(self.weight, self.weight_scale, self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [T, O] in the compute type for `x` [T, I]."""
        weight = self.weights()
        if self.pre_quant_scale is not None:
            x = x * self.pre_quant_scale
        return functional.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        return f"{self.in_features}, {self.out_features}, form={self.form}, bias={self.bias is not None}"


def share_inputs(model: nn.Module) -> None:
    """Let q, k and v, and gate and up, of one block quantize their common input once."""
    for module in model.modules():
        for names in _SAME_INPUT:
            layers = [getattr(module, name, None) for name in names]
            readers = [layer for layer in layers if isinstance(layer, Fp8Linear)]
            if len(readers) == len(names) and len({float(layer.input_scale) for layer in readers}) == 1:
                shared = InputCodes(len(readers))
                for layer in readers:
                    layer.input_codes = shared


def _has_fp8_tensor_cores(weight: torch.Tensor) -> bool:
    if weight.device.type != "cuda" or any(side % _SCALED_MM_MULTIPLE for side in weight.shape):
        return False
    return torch.cuda.get_device_capability(weight.device) >= _FP8_CAPABILITY
