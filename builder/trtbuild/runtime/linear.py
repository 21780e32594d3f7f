"""Linear layers that compute with the numerics of the stored format, on any device.

FP8 with one scale for a tensor has a class of its own: tensor cores of Ada and newer compute it, the fast path joins
its layers, and other engines' joined scales are put into it. All other formats are rows of `numerics`.
Shapes: T tokens (any leading dimensions), I inputs, O outputs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from trtbuild.runtime.codes import to_e4m3
from trtbuild.runtime.numerics import Numerics, Tensors

Form = Literal["expanded", "packed"]

_SCALED_MM_MULTIPLE = 16  # torch._scaled_mm takes matrices whose sides are multiples of 16
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_FP8_CAPABILITY = (8, 9)  # the first NVIDIA GPUs with FP8 tensor cores: Ada


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


class CodedLinear(nn.Module):
    """A layer of any format in `NUMERICS`, as its row says.

    y = (input(x * pre_quant_scale) @ matrix^T) * outer * factor + bias
    """

    def __init__(
        self, *, numerics: Numerics, stored: Tensors, bias: torch.Tensor | None, dtype: torch.dtype, form: Form
    ) -> None:
        super().__init__()
        weight = stored["weight"]
        self.out_features, self.in_features = weight.shape[0] * numerics.rows, weight.shape[1] * numerics.columns
        self.numerics = numerics
        self.dtype = dtype
        self.form = form
        at_least = torch.promote_types(dtype, torch.float32)
        # One-element scales are 0-d, so that results keep `dtype`.
        scales = {name: _plain(stored[name], at_least) for name in numerics.scales}
        parts = scales | {"weight": weight}
        expanded = form == "expanded"
        self.register_buffer("weight", numerics.matrix(parts, dtype) if expanded else weight)
        for name, scale in scales.items():
            self.register_buffer(name, None if expanded else scale)
        self.register_buffer("outer", numerics.outer(parts) if numerics.outer is not None else None)
        input_scale = stored["input_scale"] if numerics.input_scale else torch.ones((), device=weight.device)
        self.register_buffer("input_scale", _plain(input_scale, at_least))
        smooth = stored.get("pre_quant_scale")
        self.register_buffer("pre_quant_scale", None if smooth is None else smooth.to(dtype))
        self.register_buffer("bias", bias)

    def weights(self) -> torch.Tensor:
        """The matrix [O, I] that inputs are multiplied by, in the compute type."""
        return self.weight if self.form == "expanded" else self.numerics.matrix(self._stored(), self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [T, O] in the compute type for `x` [T, I]."""
        if self.pre_quant_scale is not None:
            x = x * self.pre_quant_scale
        scale = self.outer
        if self.numerics.input is not None:
            x, factor = self.numerics.input(x, self.input_scale)
            if factor is not None:
                scale = factor if scale is None else scale * factor
        weight = self.weights()
        if scale is None:
            return functional.linear(x.to(self.dtype), weight, self.bias)
        y = (functional.linear(x.to(self.dtype), weight) * scale).to(self.dtype)
        return y if self.bias is None else y + self.bias

    def _stored(self) -> Tensors:
        return {name: getattr(self, name) for name in ("weight", *self.numerics.scales)}

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        return f"{self.in_features}, {self.out_features}, form={self.form}, bias={self.bias is not None}"


def _plain(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scale` as it is multiplied with: float32 scales in the compute type if that has more bits, others as stored."""
    scale = scale.reshape(()) if scale.numel() == 1 and scale.dim() < 2 else scale
    return scale.to(dtype) if scale.dtype == torch.float32 else scale


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
