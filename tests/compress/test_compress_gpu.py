"""The linear layers and the loader on an NVIDIA GPU, against the same on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import save_checkpoint
from trtbuild.compress.columns import Grid
from trtbuild.compress.solve import Task, solve
from trtbuild.runtime.checkpoint import load_model
from trtbuild.runtime.linear import CodedLinear, Form, Fp8Linear
from trtbuild.runtime.numerics import NUMERICS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU, or PyTorch without CUDA"),
]
IDS = torch.arange(40).reshape(1, 40) * 7 % 320


def fp8_layer(shape: tuple[int, int], device: str, dtype: torch.dtype, form: Form, *, bias: bool) -> Fp8Linear:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator) * 0.05
    scale = weight.abs().max() / 448
    return Fp8Linear(
        weight=(weight / scale).to(torch.float8_e4m3fn).to(device),
        weight_scale=scale.to(device),
        input_scale=torch.tensor(0.006, device=device),
        bias=torch.randn(shape[0], generator=generator).to(device, dtype) if bias else None,
        dtype=dtype,
        form=form,
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("shape", "tensor_cores"), [((64, 128), True), ((1536, 576), True), ((24, 40), False)])
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_fp8_layers(tokens: int, shape: tuple[int, int], tensor_cores: bool, dtype: torch.dtype, bias: bool) -> None:
    x = torch.randn(1, tokens, shape[1], generator=torch.Generator().manual_seed(2)).to(dtype)
    wanted = fp8_layer(shape, "cpu", torch.float64, "expanded", bias=bias)(x.double())
    layer = fp8_layer(shape, "cuda", dtype, "packed", bias=bias)
    narrow = dtype == torch.bfloat16
    assert layer.tensor_cores == (tensor_cores and narrow and torch.cuda.get_device_capability() >= (8, 9))
    rounding = 2.0**-7 if narrow else 2.0**-16
    for form in (layer, fp8_layer(shape, "cuda", dtype, "expanded", bias=bias)):
        y = form(x.to("cuda"))
        assert y.dtype == dtype
        assert y.shape == (1, tokens, shape[0])
        assert (y.cpu().double() - wanted).abs().max() < rounding * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_solvers(dtype: torch.dtype) -> None:
    """Pruning and rounding give about the same error as on a CPU, and the same bytes twice."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(96, 256, generator=generator).to(dtype)
    inputs = (torch.randn(600, 256, generator=generator) @ torch.randn(256, 256, generator=generator)).to(dtype)

    def solved(device: str) -> tuple[torch.Tensor, float]:
        layer = torch.nn.Linear(256, 96, bias=False, device=device, dtype=dtype)
        layer.weight.data.copy_(weight)

        def grid_of(module: torch.nn.Module) -> Grid:
            values: torch.Tensor = module.weight.data
            return Grid(values.float().reshape(96, 8, 32).abs().amax(dim=2), 32)

        task = Task(prune=True, grid_of=grid_of)
        found = solve({"layer": layer}, lambda: layer(inputs.to(device)), task)
        return layer.weight.data.cpu(), found.errors["layer"]

    expected, found = solved("cpu"), solved("cuda")
    assert found[1] == pytest.approx(expected[1], rel=0.05)
    assert bool(((found[0].reshape(-1, 4) != 0).sum(dim=1) <= 2).all())
    assert torch.equal(solved("cuda")[0], found[0])


def test_int4_layers() -> None:
    generator = torch.Generator().manual_seed(3)
    packed = torch.randint(0, 256, (32, 128), generator=generator, dtype=torch.uint8)
    scale = torch.rand(64, 4, generator=generator) * 0.01 + 0.001
    smooth = torch.rand(128, generator=generator) + 0.5
    x = torch.randn(5, 128, generator=generator)
    forms: dict[str, torch.Tensor] = {}
    for device, form in (("cpu", "expanded"), ("cuda", "expanded"), ("cuda", "packed")):
        stored = {"weight": packed, "weight_scale": scale, "pre_quant_scale": smooth}
        layer = CodedLinear(
            numerics=NUMERICS["W4A16_AWQ"], stored={name: value.to(device) for name, value in stored.items()},
            bias=None, dtype=torch.float64, form=form,
        )  # fmt: skip
        forms[device + form] = layer(x.to(device, torch.float64)).cpu()
    for y in forms.values():
        assert torch.allclose(y, forms["cpuexpanded"], atol=1e-12)


@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "qwen3_moe"])
def test_models_land_on_the_gpu(name: str, tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", name, tokenizer=False)
    logits: dict[str, Any] = {}
    for device in ("cpu", "cuda"):
        loaded = load_model(
            source, device=torch.device(device), dtype=torch.float64, weights="auto", attn_implementation="eager"
        )
        tensors = [*loaded.model.parameters(), *loaded.model.buffers()]
        assert {tensor.device.type for tensor in tensors} == {device}
        with torch.no_grad():
            logits[device] = loaded.model(IDS.to(device)).logits.cpu()
    # Rotary tables are float32 in every class, and their sines differ in the last bit between the devices.
    assert (logits["cpu"] - logits["cuda"]).abs().max() < 1e-4
