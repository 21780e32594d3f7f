"""Medusa heads beside a converted model: every tensor of every rank, and the config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deconvert import read_safetensors
from safetensors.torch import save_file

from tiny import save_checkpoint
from trtbuild.convert.run import run
from trtbuild.errors import CompatibilityError

VOCAB, PADDED = 321, 322


def silent(done: int, total: int, what: str) -> None:
    assert 0 <= done <= total
    assert what


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose vocabulary does not divide."""
    return save_checkpoint(tmp_path_factory.mktemp("source") / "llama", overrides={"vocab_size": VOCAB})


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Two heads of two layers."""
    torch.manual_seed(0)
    tensors = {f"{head}.2.weight": torch.randn(VOCAB, 64) for head in range(2)}
    for head in range(2):
        for layer in range(2):
            tensors[f"{head}.{layer}.linear.weight"] = torch.randn(64, 64)
            tensors[f"{head}.{layer}.linear.bias"] = torch.randn(64)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    place = tmp_path_factory.mktemp("heads")
    save_file(tensors, place / "medusa_lm_head.safetensors")
    (place / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 2}))
    return place, tensors


def converted(source: Path, output: Path, heads: Path | None, **changes: Any) -> dict[str, Any]:
    more = {} if heads is None else {"medusa": str(heads), "max_draft_len": 5}
    return run({"source": str(source), "output": str(output), "dtype": "bfloat16"} | more | changes, silent)


@pytest.mark.parametrize("tp", [1, 2])
def test_every_rank_has_its_rows(
    source: Path, heads: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, tp: int
) -> None:
    place, stored = heads
    converted(source, tmp_path / "with", place, tp_size=tp)
    converted(source, tmp_path / "without", None, tp_size=tp)
    for rank in range(tp):
        ours = read_safetensors(tmp_path / "with" / f"rank{rank}.safetensors")
        plain = read_safetensors(tmp_path / "without" / f"rank{rank}.safetensors")
        found = {name: ours.pop(name) for name in list(ours) if name.startswith("medusa_heads.")}
        assert ours.keys() == plain.keys()
        assert all(torch.equal(ours[name], plain[name]) for name in ours)
        expected = {}
        for head in range(2):
            for layer in range(2):
                for kind in ("weight", "bias"):
                    whole = stored[f"{head}.{layer}.linear.{kind}"]
                    expected[f"medusa_heads.{head}.medusa_layers.{layer}.linear.{kind}"] = whole.chunk(tp)[rank]
            padding = torch.zeros((PADDED if tp == 2 else VOCAB) - VOCAB, 64, dtype=torch.bfloat16)
            whole = torch.cat((stored[f"{head}.2.weight"], padding))
            expected[f"medusa_heads.{head}.lm_head.weight"] = whole.chunk(tp)[rank]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_the_config_is_of_medusa_s_class(
    source: Path, heads: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    result = converted(source, tmp_path / "with", heads[0])
    converted(source, tmp_path / "without", None)
    ours, plain = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("with", "without"))
    assert {name: value for name, value in ours.items() if plain.get(name) != value} == {
        "architecture": "MedusaForCausalLM", "model_type": "llama", "max_draft_len": 5, "num_medusa_heads": 2,
        "num_medusa_layers": 2,
    }  # fmt: skip
    assert result["architecture"] == "MedusaForCausalLM"


def test_heads_are_not_quantized(heads: tuple[Path, dict[str, torch.Tensor]], source: Path, tmp_path: Path) -> None:
    from synthetic import quantized

    fp8 = quantized(source, tmp_path / "fp8", "FP8", None)
    converted(fp8, tmp_path / "out", heads[0])
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert quantization["quant_algo"] == "FP8"
    assert quantization["exclude_modules"][-1] == "*medusa_heads*"
    found = read_safetensors(tmp_path / "out" / "rank0.safetensors")
    assert found["medusa_heads.1.lm_head.weight"].dtype == torch.bfloat16
    assert found["transformer.layers.0.mlp.fc.weight"].dtype == torch.float8_e4m3fn


def test_heads_of_another_model_are_refused(
    heads: tuple[Path, dict[str, torch.Tensor]], tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(CompatibilityError, match="are for a vocabulary of 321, and the model's vocab_size is 320"):
        converted(tiny_llama, tmp_path / "out", heads[0])
    assert not (tmp_path / "out" / "config.json").exists()
