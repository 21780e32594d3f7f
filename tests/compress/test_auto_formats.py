"""Formats chosen by measurement: ModelOpt's own choice, the same every time, within the budget, with its table."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from compress_requests import make_request, silent

from trtbuild.choice_picture import draw
from trtbuild.compress import auto as search
from trtbuild.compress.run import run
from trtbuild.errors import HostError, RecipeError


def wish(bits: float, *formats: str, method: str = "gradient") -> dict[str, Any]:
    return {
        "group_size": 32,
        "auto": {"formats": formats or ("fp8", "int4_awq"), "target_bits": bits, "method": method},
    }


def chosen(table: dict[str, Any]) -> dict[str, str]:
    return {layer: group["chosen"] for group in table["groups"] for layer in group["layers"]}


@pytest.mark.parametrize("method", ["gradient", "kl_div"])
def test_the_choice_is_the_best_of_the_table(method: str, sources: Any, tmp_path: Path) -> None:
    result = run(make_request(sources("qwen3"), tmp_path / "out", **wish(6.0, method=method)), silent)
    table = result["choice"]
    found = chosen(table)
    assert len(found) == 21
    assert len(set(found.values())) > 1
    weights = np.array([group["weights"] for group in table["groups"]])
    bits, scores = (np.array([[item[name] for item in group["choices"]] for group in table["groups"]])
                    for name in ("bits", "sensitivity"))  # fmt: skip
    taken = [[item["format"] for item in group["choices"]].index(group["chosen"]) for group in table["groups"]]
    rows = np.arange(len(taken))
    assert table["planned_bits"] == pytest.approx((bits[rows, taken] * weights).sum() / weights.sum(), abs=1e-5)
    assert table["planned_bits"] <= 6.0
    if method == "gradient":  # the least sum of all choices that fit, tried one by one
        every = np.array(list(itertools.product(range(3), repeat=len(rows))), dtype=np.int8)
        fits = (bits[rows, every] * weights).sum(axis=1) <= 6.0 * weights.sum()
        least = scores[rows, every[fits]].sum(axis=1).min()
        assert scores[rows, taken].sum() == pytest.approx(least, rel=1e-4)
    # The files hold what was planned, a smoothing scale for some inputs and single numbers.
    assert table["planned_bits"] <= result["bits_per_weight"] < table["planned_bits"] + 0.4
    config = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert config["quant_algo"] == "MIXED_PRECISION"
    names = {"FP8": "fp8", "W4A16_AWQ": "int4_awq"}
    written = {name: names[entry["quant_algo"]] for name, entry in config["quantized_layers"].items()}
    assert written == {name: value for name, value in found.items() if value != "none"}


def test_the_same_twice_and_less_for_a_smaller_budget(sources: Any, tmp_path: Path) -> None:
    results = [run(make_request(sources("mixtral"), tmp_path / name, **wish(bits)), silent)
               for name, bits in (("first", 7.0), ("second", 7.0), ("small", 5.5))]  # fmt: skip
    assert json.dumps(results[0]["choice"]) == json.dumps(results[1]["choice"])
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    assert results[2]["bits_per_weight"] < results[0]["bits_per_weight"]
    groups = results[0]["choice"]["groups"]
    experts = [group for group in groups if ".experts." in group["layers"][0]]
    assert [len(group["layers"]) for group in experts] == [12, 12, 12]  # all experts of a block decide as one
    for group in groups:
        assert [item["format"] for item in group["choices"]] == ["int4_awq", "fp8", "none"]
        assert [item["bits"] for item in group["choices"]] == [5.0, 8.0, 16.0]
        scores = [item["sensitivity"] for item in group["choices"]]
        assert scores == sorted(scores, reverse=True)
        assert scores[-1] == 0.0


def test_layers_with_one_input_share_a_format(sources: Any, tmp_path: Path) -> None:
    """Phi computes attention and feed-forward from one norm; ModelOpt's exporter refuses to give them two formats."""
    table = run(make_request(sources("phi"), tmp_path / "out", **wish(6.5)), silent)["choice"]
    group = next(group for group in table["groups"] if "model.layers.0.mlp.fc1" in group["layers"])
    assert "model.layers.0.self_attn.q_proj" in group["layers"]


def test_a_killed_run_does_not_measure_again(sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if what == "layer 2 of 3 is done":
            raise KeyboardInterrupt

    work = tmp_path / "work"
    request = make_request(sources("qwen3"), tmp_path / "out", **wish(6.0), work=str(work), key="k")
    with pytest.raises(KeyboardInterrupt):
        run(request, stop)
    monkeypatch.setattr(search, "_search", None)
    result = run(request, silent)
    assert result["notes"] == ["an earlier run had finished 2 of 3 layers"]
    with pytest.raises(TypeError):  # another budget is another question
        run(make_request(sources("qwen3"), tmp_path / "more", **wish(7.0), work=str(work), key="k"), silent)


def test_what_cannot_be_measured(sources: Any, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="compress.auto_formats: nvfp4 is scored by running the model in it"):
        run(make_request(sources("qwen3"), tmp_path / "out", **wish(6.0, "nvfp4", "fp8")), silent)
    request = make_request(sources("qwen3"), tmp_path / "out", **wish(6.0)) | {"max_memory": 900_000_000}
    with pytest.raises(RecipeError, match="format: auto holds the whole model in memory, which takes .*; use at least"):
        run(request, silent)
    with pytest.raises(RecipeError, match="compress.group_size: 48 does not divide"):
        run(make_request(sources("qwen3"), tmp_path / "out", **wish(6.0) | {"group_size": 48}), silent)


def test_the_picture() -> None:
    choices = [
        {"format": "int4_awq", "bits": 5, "sensitivity": 0.2},
        {"format": "none", "bits": 16, "sensitivity": 0.0},
    ]
    table = {
        "method": "gradient",
        "target_bits": 5.0,
        "groups": [
            {"layers": ["model.a<b>.q_proj", "model.a<b>.k_proj"], "chosen": "int4_awq", "choices": choices},
            {"layers": ["model.c"], "chosen": "none", "choices": choices},
        ],
    }
    root = ET.fromstring(draw(table, 5.1))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "a<b>.{k_proj,q_proj}" in texts
    assert texts[0] == "Sensitivity of layers by format (gradient); 5 bits wanted, 5.1 in the files"
    filled = [element for element in root.iter("{http://www.w3.org/2000/svg}circle") if element.get("fill") != "white"]
    assert len(filled) == 2 + 2  # the legend, and one for each row
