"""An adapter's two arrays, read back by a reader made from the format's description; adapters that do not fit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from trtbuild.convert.lora.adapter import Adapter, Limits, read_adapter
from trtbuild.convert.lora.write import check_arrays, run
from trtbuild.errors import CompatibilityError

HIDDEN, QUERIES, SHARED, INNER, LAYERS = 8, 8, 4, 12, 3
LORA: dict[str, Any] = {
    "adapters": {"1": "polite"},
    "max_rank": 4,
    "layers": LAYERS,
    "modules": {
        "attn_q": {"number": 1, "name": "self_attn.q_proj", "sizes": [HIDDEN, QUERIES]},
        "attn_k": {"number": 2, "name": "self_attn.k_proj", "sizes": [HIDDEN, SHARED]},
        "attn_dense": {"number": 4, "name": "self_attn.o_proj", "sizes": [HIDDEN, HIDDEN]},
        "mlp_h_to_4h": {"number": 5, "name": "mlp.gate_proj", "sizes": [HIDDEN, INNER]},
        "mlp_4h_to_h": {"number": 6, "name": "mlp.down_proj", "sizes": [INNER, HIDDEN]},
    },
}
NUMBERS = {module["name"]: (module["number"], *module["sizes"]) for module in LORA["modules"].values()}


def save_adapter(
    path: Path, modules: dict[str, int], *, layers: tuple[int, ...] = (0, 1, 2), dtype: Any = torch.float32,
    change: Callable[[dict[str, Any]], None] = lambda _: None, **config: Any,
) -> Path:  # fmt: skip
    """An adapter as PEFT saves it; `modules` are ranks by name below a layer."""
    path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in layers:
        for name, rank in modules.items():
            _, inputs, outputs = NUMBERS.get(name, (0, HIDDEN, HIDDEN))
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator).to(dtype)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator).to(dtype)
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": 2, "lora_alpha": 16, "bias": "none", "use_rslora": False} | config
    (path / "adapter_config.json").write_text(json.dumps(described))
    return path


def converted(source: Path, output: Path) -> tuple[Any, Any]:
    run({"lora": LORA, "adapters": {"1": str(source)}, "output": str(output)}, lambda *_: None)
    return np.load(output / "1" / "model.lora_weights.npy"), np.load(output / "1" / "model.lora_config.npy")


def deltas(weights: Any, config: Any) -> dict[tuple[int, int], Any]:
    """What each row adds to its module's weight [outputs, inputs], by (module, layer)."""
    sizes = {number: (inputs, outputs) for number, inputs, outputs in NUMBERS.values()}
    found = {}
    for row, (module, layer, rank) in zip(weights.astype(np.float64), config.tolist(), strict=True):
        inputs, outputs = sizes[module]
        a, b, rest = np.split(row, [rank * inputs, rank * (inputs + outputs)])
        assert not rest.any()
        found[module, layer] = b.reshape(outputs, rank) @ a.reshape(rank, inputs)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rslora", [False, True])
def test_every_value_arrives(tmp_path: Path, dtype: Any, rslora: bool) -> None:
    ranks = {"self_attn.q_proj": 2, "self_attn.k_proj": 4, "mlp.gate_proj": 1, "mlp.down_proj": 3}
    source = save_adapter(tmp_path / "polite", ranks, dtype=dtype, use_rslora=rslora)
    weights, config = converted(source, tmp_path / "out")
    assert (weights.dtype, config.dtype) == (np.float16, np.int32)
    assert weights.shape == (12, 3 * (INNER + HIDDEN))
    assert config.tolist() == [
        [NUMBERS[name][0], layer, rank] for layer in range(LAYERS) for name, rank in ranks.items()
    ]
    found, stored = deltas(weights, config), load_file(source / "adapter_model.safetensors")
    for (module, layer), delta in found.items():
        name = next(name for name, (number, *_) in NUMBERS.items() if number == module)
        prefix = f"base_model.model.model.layers.{layer}.{name}"
        a, b = (stored[f"{prefix}.lora_{part}.weight"].double().numpy() for part in "AB")
        scale = 16 / (math.sqrt(ranks[name]) if rslora else ranks[name])
        assert np.allclose(delta, scale * b @ a, rtol=2e-2, atol=2e-2 * scale)
    assert check_arrays(tmp_path / "out", LORA) == []


def test_layers_that_are_not_adapted_have_no_row(tmp_path: Path) -> None:
    _, config = converted(save_adapter(tmp_path / "polite", {"self_attn.q_proj": 2}, layers=(2, 0)), tmp_path / "out")
    assert config.tolist() == [[1, 0, 2], [1, 2, 2]]


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.__delitem__(name)


PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("modules", "more", "sentence"),
    [
        (
            {"self_attn.v_proj": 2},
            {},
            "adapts self_attn.v_proj, which runtime.lora_config.lora_target_modules does not",
        ),
        (
            {"self_attn.q_proj": 5},
            {},
            "layers.0.self_attn.q_proj has rank 5, more than max_lora_rank 4; set runtime.lo",
        ),
        (
            {"self_attn.q_proj": 2},
            {"layers": (3,)},
            "layers.3.self_attn.q_proj is no layer of the base model, which ha",
        ),
        ({"self_attn.q_proj": 2}, {"change": drop(f"{PREFIX}.lora_B.weight")}, "self_attn.q_proj has lora_A alone"),
        (
            {"self_attn.q_proj": 2},
            {"change": lambda it: it.update({f"{PREFIX}.lora_A.weight": torch.ones(2, 9)})},
            "has shapes [2, 9] and [8, 2], and the base model's are [rank, 8] and [8, rank]; give an adapter",
        ),
        (
            {"self_attn.q_proj": 2},
            {"change": lambda it: it.update({f"{PREFIX}.lora_A.weight": torch.ones(2, 8, dtype=torch.int8)})},
            "is of type I8; save it as one of F16, BF16, F32",
        ),
        (
            {"self_attn.q_proj": 2},
            {"change": lambda it: it.update({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 8)})},
            "has tensors that belong to no projection of a layer, base_model.model.lm_head.lora_A.weight for one",
        ),
        ({"self_attn.q_proj": 2}, {"use_dora": True}, "scales the base weights (DoRA) (use_dora: True), which engines"),
        ({"self_attn.q_proj": 2}, {"modules_to_save": ["lm_head"]}, "brings modules of its own (modules_to_save: ['lm"),
        ({"self_attn.q_proj": 2}, {"alpha_pattern": {"q": 3}}, "scales modules differently"),
        ({"self_attn.q_proj": 2}, {"peft_type": "IA3"}, "is of type IA3, not LORA; give a LoRA adapter"),
        ({"self_attn.q_proj": 2}, {"lora_alpha": None}, "adapter_config.json has lora_alpha: None, which is no number"),
        ({}, {}, "adapts nothing; give another adapter"),
    ],
)
def test_adapters_that_do_not_fit(tmp_path: Path, modules: dict[str, int], more: dict[str, Any], sentence: str) -> None:
    source = save_adapter(tmp_path / "polite", modules, **more)
    found = read_adapter("polite", source, Limits.of(LORA))
    assert isinstance(found, list)
    assert sentence in "\n".join(map(str, found))
    with pytest.raises(CompatibilityError):
        converted(source, tmp_path / "out")


def test_files_that_are_none(tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "polite", {"self_attn.q_proj": 2})
    assert isinstance(read_adapter("polite", source, Limits.of(LORA)), Adapter)
    weights = source / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "truncated" in str(read_adapter("polite", source, Limits.of(LORA)))
    weights.unlink()
    assert "has no adapter_model.safetensors; save it as safetensors" in str(
        [str(one) for one in read_adapter("polite", source, Limits.of(LORA))]  # type: ignore[union-attr]
    )


def test_a_value_beyond_float16_is_refused(tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "polite", {"self_attn.q_proj": 2}, lora_alpha=1e6)
    with pytest.raises(
        CompatibilityError, match=r"layers.0 attn_q has a value beyond 65504, the limit of float16; sca"
    ):
        converted(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda weights, config: (weights, config[:-1]), "2 rows of config for 3 rows of weights"),
        (
            lambda weights, config: (weights, np.add(config, [[2, 0, 0]])),
            "module 3 is none that the engine was built for",
        ),
        (lambda weights, config: (weights, np.add(config, [[0, 9, 0]])), "layer 9 is none of 3"),
        (
            lambda weights, config: (weights, np.add(config, [[0, 0, 9]])),
            "rank 11 of attn_q exceeds the engine's 4, or the",
        ),
        (
            lambda weights, config: (weights[:, :8], config),
            "rank 2 of attn_q exceeds the engine's 4, or the row's 8 val",
        ),
        (lambda weights, config: (weights.astype(np.float32), config), "its arrays are float32 and int32, not float16"),
    ],
)
def test_arrays_that_the_engine_would_refuse(tmp_path: Path, change: Any, sentence: str) -> None:
    arrays = converted(save_adapter(tmp_path / "polite", {"self_attn.q_proj": 2}), tmp_path / "out")
    weights, config = change(*arrays)
    np.save(tmp_path / "out" / "1" / "model.lora_weights.npy", weights)
    np.save(tmp_path / "out" / "1" / "model.lora_config.npy", config.astype(np.int32))
    assert sentence in "\n".join(check_arrays(tmp_path / "out", LORA))
