"""SparseGPT and GPTQ against the papers' algorithms, written out slowly in float64, and in whole models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_requests import make_request, silent
from safetensors.torch import save_file
from test_stream_equality import bits, load
from torch import nn

from tiny import save_checkpoint
from trtbuild.compress import stream
from trtbuild.compress.columns import Grid, inverse_factor, prune_by_magnitude, sweep
from trtbuild.compress.hessians import collect
from trtbuild.compress.least_squares import refit
from trtbuild.compress.run import run
from trtbuild.compress.skeleton import NotStreamableError
from trtbuild.compress.solve import Task, solve
from trtbuild.errors import ToolError
from trtbuild.format_support import needs_gpu
from trtbuild.runtime.checkpoint import load_model
from trtbuild.weight_formats import WEIGHT_FORMATS

DAMPING = 0.01


def layer_of(outputs: int, inputs: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random (weight, Hessian of correlated inputs, the same damped), float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    eye = torch.eye(inputs, dtype=torch.float64)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) * 0.3 + eye
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mixing
    hessian = 2 * x.T @ x / tokens
    return weight, hessian, hessian + DAMPING * hessian.diagonal().mean() * eye


def rounded(value: float, largest: float) -> float:
    """The nearest of sixteen numbers with 7 codes above zero."""
    code = max(-8, min(7, round(value * 7 / largest)))
    return code * largest / 7


def reference(
    weight: torch.Tensor, hessian: torch.Tensor, *, prune: bool, ranges: torch.Tensor | None = None, size: int = 1
) -> torch.Tensor:
    """One output and one column after another, the inverse of what remains of the Hessian computed anew each time."""
    done = weight.clone()
    columns = weight.shape[1]
    inverses = [torch.linalg.inv(hessian[c:, c:]) for c in range(columns)]
    for row in done:
        number = int((row.data_ptr() - done.data_ptr()) / done.element_size() / columns)
        pruned: set[int] = set()
        for c in range(columns):
            if prune and c % 4 == 0:
                costs = sorted((float(row[d] ** 2 / inverses[d][0, 0]), d) for d in range(c, c + 4))
                pruned = {d for _, d in costs[:2]}
            final = float(row[c])
            if ranges is not None:
                final = rounded(final, float(ranges[number, c // size]))
            if c in pruned:
                final = 0.0
            change = (float(row[c]) - final) / inverses[c][0, 0]
            row[c:] -= change * inverses[c][0]
            row[c] = final
    return done


def error_of(changed: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    change = changed.double() - weight
    return float(((change @ hessian) * change).sum())


def ranges_of(weight: torch.Tensor, size: int) -> torch.Tensor:
    return weight.reshape(weight.shape[0], -1, size).abs().amax(dim=2)


@pytest.mark.parametrize("method", ["sparsegpt", "gptq", "joint"])
@pytest.mark.parametrize("inputs", [16, 132, 192])
def test_the_sweep_is_the_papers(inputs: int, method: str) -> None:
    weight, plain, hessian = layer_of(6, inputs, 3 * inputs)
    size = 4 if inputs == 132 else 16
    ranges = None if method == "sparsegpt" else ranges_of(weight, size)
    wanted = reference(weight, hessian, prune=method != "gptq", ranges=ranges, size=size)
    found, grid = weight.clone(), None if ranges is None else Grid(ranges, size)
    cost = sweep(found, inverse_factor(plain.clone()), prune=method != "gptq", grid=grid)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert torch.equal(found == 0, wanted == 0)
    assert cost == pytest.approx(error_of(found, weight, hessian), rel=1e-9)
    single = weight.float()
    half = None if ranges is None else Grid(ranges.float(), size)
    sweep(single, inverse_factor(plain.float()), prune=method != "gptq", grid=half)
    assert error_of(single, weight, hessian) < 1.05 * error_of(wanted, weight, hessian)
    if method != "gptq":
        assert bool(((single.reshape(-1, 4) != 0).sum(dim=1) <= 2).all())


def test_every_step_lowers_the_error() -> None:
    """The mask alone, or magnitude, then the sweep, then the refit."""
    weight, _, hessian = layer_of(32, 96, 400)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    smallest, swept = weight.clone(), weight.clone()
    prune_by_magnitude(smallest)
    sweep(swept, factor, prune=True)
    masked = weight * (swept != 0)
    fitted = swept.clone()
    refit(fitted, weight, hessian)
    errors = [error_of(found, weight, hessian) for found in (smallest, masked, swept, fitted)]
    assert min(errors[:2]) > 1.5 * errors[2] > 1.5 * errors[3]
    assert torch.equal(fitted == 0, swept == 0)


def test_the_refit_solves_the_normal_equations() -> None:
    weight, _, hessian = layer_of(5, 24, 200)
    found = weight.clone()
    prune_by_magnitude(found)
    mask = found != 0
    refit(found, weight, hessian)
    for row, kept, original in zip(found, mask, weight, strict=True):
        wanted = torch.linalg.solve(hessian[kept][:, kept], (hessian @ original)[kept])
        torch.testing.assert_close(row[kept], wanted, rtol=1e-6, atol=1e-8)
    again = found.clone()
    refit(again, weight, hessian)
    torch.testing.assert_close(again, found, rtol=1e-6, atol=1e-8)
    nothing = torch.zeros_like(weight)
    refit(nothing, weight, hessian)
    assert not nothing.any()


def test_zeros_can_be_held() -> None:
    weight, _, hessian = layer_of(8, 64, 200)
    prune_by_magnitude(weight)
    factor, ranges = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True), ranges_of(weight, 32)
    broken, held = weight.clone(), weight.clone()
    sweep(broken, factor, grid=Grid(ranges, 32))
    assert bool((broken[weight == 0] != 0).any())  # GPTQ alone fills them
    sweep(held, factor, grid=Grid(ranges, 32), hold=True)
    assert not bool((held[weight == 0] != 0).any())


def test_hessians_that_are_not_positive_definite() -> None:
    ones = torch.ones(8, 8)
    factor = inverse_factor(ones.clone())  # rank one
    assert bool(torch.isfinite(factor).all())
    negative = -torch.eye(8)
    with pytest.raises(ToolError, match="the Hessian of a layer's inputs cannot be inverted"):
        inverse_factor(negative)
    with pytest.raises(ToolError, match="cannot be inverted"):
        inverse_factor(ones * torch.nan)


class Block(nn.Module):
    """Two layers with one input, one behind them, and one that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 8, bias=False), nn.Linear(16, 8, bias=False)
        self.c, self.idle = nn.Linear(8, 4), nn.Linear(8, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.a(x) * self.b(x))


def test_layers_with_one_input_share_a_hessian() -> None:
    block = Block()
    samples = [torch.randn(1, tokens, 16) for tokens in (5, 7)]

    def through() -> None:
        with torch.no_grad():
            for sample in samples:
                block(sample)

    layers = {name: block.get_submodule(name) for name in ("a", "b", "c", "idle")}
    found = collect(layers, through)
    assert [(hessian.layers, hessian.tokens) for hessian in found] == [(["a", "b"], 12), (["c"], 12)]
    x = torch.cat(samples, dim=1)[0].double()
    assert found[0].matrix is not None
    torch.testing.assert_close(found[0].matrix.double(), 2 * x.T @ x / 12, rtol=1e-5, atol=1e-6)
    output = (x @ block.b.weight.detach().double().T).square().sum()
    assert float(found[0].outputs["b"]) == pytest.approx(float(output), rel=1e-5)
    assert not block.a._forward_hooks


def test_dead_inputs_and_layers_without_tokens() -> None:
    block = Block()
    sample = torch.randn(1, 40, 16)
    sample[..., [4, 9]] = 0
    idle = block.idle.weight.detach().clone()
    solved = solve({"a": block.a, "idle": block.idle}, lambda: block(sample), Task(prune=True))
    assert solved.idle == ["idle"]
    assert solved.errors.keys() == {"a"}
    assert 0 < solved.errors["a"] < 1
    assert not bool(block.a.weight[:, [4, 9]].any())  # they cost nothing, so they are the first to go
    for weight in (block.a.weight, block.idle.weight):
        assert bool(((weight.reshape(-1, 4) != 0).sum(dim=1) == 2).all())
    kept = block.idle.weight != 0
    assert torch.equal(block.idle.weight[kept], idle[kept])
    largest = [weight.abs().reshape(-1, 4).sort(dim=1)[0][:, 2:] for weight in (idle, block.idle.weight)]
    assert torch.equal(*largest)


WHOLE: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"format": "int4_gptq", "group_size": 32, "sparsity": "2:4"}),
    ("mixtral", {"sparsity": "2:4", "format": "fp8"}),
]


@pytest.mark.parametrize(("name", "changes"), WHOLE, ids=["joint", "experts"])
def test_the_whole_model_gives_the_same(
    name: str, changes: dict[str, Any], sources: Any, compress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any) -> None:
        raise NotStreamableError("for the test")

    streamed, expected = compress(name, **changes)
    monkeypatch.setattr(stream.Stream, "prepare", refuse)
    result = run(make_request(sources(name), tmp_path / "out", **changes), silent)
    assert result["notes"] == ["the whole model was held in memory: for the test"]
    assert result["sparsity"] == expected["sparsity"]
    assert result["output_error"] == pytest.approx(expected["output_error"])
    whole, parts = load(tmp_path / "out"), load(streamed)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(bits(whole[tensor]), bits(parts[tensor])) for tensor in whole)
    assert json.loads((tmp_path / "out" / "hf_quant_config.json").read_text()) == json.loads(
        (streamed / "hf_quant_config.json").read_text()
    )


@pytest.mark.parametrize("method", ["sparsegpt", "magnitude"])
@pytest.mark.parametrize("name", [name for name in WEIGHT_FORMATS if not needs_gpu(name)])
def test_no_format_breaks_the_pattern(name: str, method: str, wide: Path, tmp_path: Path) -> None:
    """Zero is a code of every format, scales are of groups or columns without zero points, and GPTQ holds zeros."""
    group = 32 if WEIGHT_FORMATS[name].searched else None
    changes = {"sparsity": "2:4", "sparsity_method": method, "format": name, "group_size": group}
    result = run(make_request(wide, tmp_path / "out", **changes), silent)
    assert result["sparsity"]["share"] == 1.0
    assert result["sparsity"]["groups"] > 1000
    found = result["output_error"]
    assert (found is None) == (method == "magnitude" and name != "int4_gptq")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer whose sides 128 divides."""
    sides = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 64, "num_hidden_layers": 1}
    return save_checkpoint(tmp_path_factory.mktemp("wide") / "source", "qwen3", overrides=sides)


def test_later_layers_see_what_pruned_ones_give(
    sources: Any, compress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer of a model whose first is left dense comes out otherwise than behind a pruned one."""
    pruned, _ = compress("qwen3", sparsity="2:4")
    request = make_request(sources("qwen3"), tmp_path / "out", sparsity="2:4", exclude=["model.layers.0.*"])
    run(request, silent)
    first, last = "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
    one, other, source = load(pruned), load(tmp_path / "out"), load(sources("qwen3"))
    assert torch.equal(other[first], source[first])
    assert not torch.equal(one[last], other[last])


def test_experts_without_tokens_are_named_and_pruned_by_magnitude(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "mixtral", overrides={"num_local_experts": 8})
    tensors = load(source)
    routers = [name for name in tensors if name.endswith("gate.weight")]
    for name in routers:  # the first two experts get everything
        tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for changes in ({"format": "none"}, {"format": "int4_gptq", "group_size": 32}):
        output = tmp_path / changes["format"]
        result = run(make_request(source, output, sparsity="2:4", **changes), silent)
        assert result["sparsity"]["share"] == 1.0
        (note,) = result["notes"]
        few, all_of_them = 6 * len(routers), 8 * len(routers)
        assert note.startswith(f"{few} of {all_of_them} experts saw too few calibration tokens")
        assert "model.layers.0.mlp.experts.0 (0 tokens)" in note


def test_the_embedded_engine_computes_with_gptqs_weights(sources: Any, compress: Any) -> None:
    """The stored form is that of AWQ, with a smoothing of ones where TensorRT-LLM does not load a layer without."""
    directory, result = compress("qwen3", format="int4_gptq", group_size=32)
    config = json.loads((directory / "hf_quant_config.json").read_text())["quantization"]
    assert {key: config[key] for key in ("quant_algo", "group_size", "has_zero_point", "pre_quant_scale")} == {
        "quant_algo": "W4A16_AWQ", "group_size": 32, "has_zero_point": False, "pre_quant_scale": True,
    }  # fmt: skip
    tensors = load(directory)
    smooth = {name.split(".")[-2] for name in tensors if name.endswith("pre_quant_scale")}
    assert smooth == {"o_proj", "down_proj"}
    device = torch.device("cpu")
    ours, plain = (
        load_model(path, device=device, dtype=torch.float32, weights="auto", attn_implementation="sdpa").model
        for path in (directory, sources("qwen3"))
    )
    for name, codes in tensors.items():
        if codes.dtype == torch.uint8:
            nibbles = torch.stack((codes & 15, codes >> 4), dim=1).reshape(-1, codes.shape[1]).float()
            signed = nibbles - 16 * (nibbles > 7)
            scales = tensors[name.replace(".weight", ".weight_scale")].repeat_interleave(32, dim=1)
            plain.get_parameter(name).copy_(signed * scales)
    ids = torch.arange(40).reshape(1, 40) * 7 % 320
    found, wanted = (model(input_ids=ids, use_cache=False).logits for model in (ours, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert result["output_error"]["worst"] < 0.02
