"""Layers in several formats: streamed, they are what ModelOpt makes of the whole model in memory, bit for bit.

The reference is ModelOpt's own way to mix formats: `mtq.auto_quantize` in which every layer has one format to choose
from, then `export_hf_checkpoint`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_requests import CALIBRATION, make_request, silent
from test_stream_equality import check_equal, in_memory, load, modelopt_config

from trtbuild.compress.request import parse_request
from trtbuild.compress.run import run
from trtbuild.compress.source import load_source
from trtbuild.compress.textdata import CalibrationSpec, load_samples
from trtbuild.errors import CompatibilityError, RecipeError
from trtbuild.runtime.checkpoint import load_model

MLP_IN_INT4 = {"format": "fp8", "group_size": 32, "overrides": [["*.mlp.*", "int4_awq"]]}
# (model, request, format of each pattern as ModelOpt is told, patterns left in bf16)
CASES: list[tuple[str, dict[str, Any], dict[str, str], list[str]]] = [
    (
        "qwen3",
        {"format": "fp8", "group_size": 32,
         "overrides": [["*.mlp.*", "int4_awq"], ["*.1.mlp.down_proj", "none"], ["*.2.self_attn.*", "none"]]},
        {"*.self_attn.*": "fp8", "*.mlp.*": "int4_awq"},
        ["*.1.mlp.down_proj", "*.2.self_attn.*"],
    ),
    (
        "mixtral",
        {"format": "int4_awq", "group_size": 32, "overrides": [["*experts*", "fp8"]]},
        {"*.self_attn.*": "int4_awq", "*experts*": "fp8"},
        [],
    ),
    (
        "gemma3",
        {"group_size": 32, "overrides": [["*.0.*", "int8_sq"], ["*.1.*", "w4a8_awq"], ["*.2.*", "nvfp4"],
                                         ["*.3.self_attn.*", "int4_awq"]]},
        {"*.0.*": "int8_sq", "*.1.*": "w4a8_awq", "*.2.*": "nvfp4", "*.3.self_attn.*": "int4_awq"},
        ["*.3.mlp.*"],
    ),
]  # fmt: skip


def mixed_in_memory(
    source: Path, output: Path, formats: dict[str, str], plain: Sequence[str], group: int, patch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Compress with ModelOpt alone, the whole model at once; return its search state."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.export import unified_export_hf as exporter

    patch.setattr(
        exporter,
        "get_experts_list",
        lambda block, kind: [
            [getattr(expert, name) for expert in block.experts] for name in ("gate_proj", "down_proj", "up_proj")
        ],
    )
    model = load_source(parse_request(make_request(source, output)), torch.device("cpu"))
    samples = load_samples(CalibrationSpec(**CALIBRATION), source).input_ids  # type: ignore[arg-type]
    grouped = {
        name: {"format": name, "group_size": group} if "4" in name else {"format": name} for name in formats.values()
    }
    grouped["nvfp4"] = {"format": "nvfp4"}
    configs = {name: modelopt_config(changes) for name, changes in grouped.items()}
    model, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": 16.0},
        quantization_formats=list(configs.values())[:1],
        data_loader=[torch.tensor([sample]) for sample in samples],
        forward_step=lambda model, ids: model(input_ids=ids, use_cache=False).logits,
        forward_backward_step=lambda model, ids: None,  # nothing to choose, and NVFP4 does not run on a CPU
        disabled_layers=[*plain, "*lm_head*", "*.gate"],
        num_calib_steps=4 * len(samples),  # AWQ takes a quarter of them
        num_score_steps=1,
        module_search_spaces=[
            {"module_name_patterns": [pattern], "quantization_formats": [configs[name]], "allow_no_quant": False}
            for pattern, name in formats.items()
        ],
    )
    with torch.no_grad():
        export_hf_checkpoint(model, dtype=torch.float32, export_dir=output)
    return state


@pytest.mark.parametrize(("name", "changes", "formats", "plain"), CASES, ids=[case[0] for case in CASES])
def test_the_same_as_auto_quantize_in_memory(
    name: str, changes: dict[str, Any], formats: dict[str, str], plain: list[str],
    sources: Any, compress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    directory, result = compress(name, **changes)
    assert result["notes"] == []
    mixed_in_memory(sources(name), tmp_path / "memory", formats, plain, changes["group_size"], monkeypatch)
    check_equal(directory, tmp_path / "memory")
    ours, theirs = (
        json.loads((path / "hf_quant_config.json").read_text()) for path in (directory, tmp_path / "memory")
    )
    assert ours["quantization"]["quant_algo"] == "MIXED_PRECISION"
    assert ours["quantization"]["quantized_layers"] == theirs["quantization"]["quantized_layers"]
    left = ours["quantization"]["exclude_modules"]
    assert not any(
        fnmatchcase(layer, pattern) for layer in ours["quantization"]["quantized_layers"] for pattern in left
    )


def test_keys_and_values_are_calibrated_on_the_original_model(
    sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside mixed weights the KV cache gets what it gets alone, and the weights what they get without it."""
    plain, cached = tmp_path / "plain", tmp_path / "cached"
    run(make_request(sources("qwen3"), plain, **MLP_IN_INT4), silent)
    run(make_request(sources("qwen3"), cached, **MLP_IN_INT4, kv_cache="fp8"), silent)
    in_memory(sources("qwen3"), tmp_path / "memory", {"kv_cache": "fp8"}, monkeypatch)
    found, weights, alone = load(cached), load(plain), load(tmp_path / "memory")
    scales = {name for name in found if name.endswith((".k_scale", ".v_scale"))}
    assert len(scales) == 6
    assert all(torch.equal(found[name], alone[name]) for name in scales)
    assert found.keys() - scales == weights.keys()
    assert all(
        torch.equal(found[name].view(torch.uint8), weights[name].view(torch.uint8))
        for name in weights
        if weights[name].dim()
    )


def test_the_engine_computes_each_layer_in_its_format(compress: Any) -> None:
    directory, result = compress("qwen3", **MLP_IN_INT4)
    loaded = load_model(
        directory, device=torch.device("cpu"), dtype=torch.float32, weights="packed", attn_implementation="sdpa"
    )
    kinds = {type(loaded.model.get_submodule(f"model.layers.0.{name}")).__name__
             for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")}  # fmt: skip
    assert kinds == {"Fp8Linear", "CodedLinear"}
    assert loaded.quantization.algorithm == "MIXED_PRECISION"
    # 21 projections, of 8 and of 4 + 32/32 bits, less than a tenth of a bit for smoothing and single numbers
    attention, mlp = 4 * 64 * 96, 3 * 64 * 128
    assert 0 < result["bits_per_weight"] - (8 * attention + 5 * mlp) / (attention + mlp) < 0.4


def test_pruned_layers_of_several_formats(sources: Any, tmp_path: Path) -> None:
    """An override with none leaves a layer in bf16, and pruned like the others."""
    overrides = [["*.mlp.*", "int4_awq"], ["*.mlp.down_proj", "none"]]
    request = make_request(
        sources("qwen3"), tmp_path / "out", **MLP_IN_INT4 | {"overrides": overrides}, sparsity="2:4",
        sparsity_method="magnitude",
    )  # fmt: skip
    result = run(request, silent)
    assert (result["quantized_projections"], result["sparsity"]["share"]) == (18, 1.0)
    down = load(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"]
    assert down.dtype == torch.bfloat16
    assert int((down.reshape(-1, 4) != 0).sum(dim=1).max()) == 2


NO_LAYER = "matches no layer that is compressed"
BAD_OVERRIDES: dict[str, tuple[list[list[str]], str]] = {
    "no such layer": ([["*.mpl.*", "int4_awq"]], rf"compress.overrides: '\*.mpl.\*' {NO_LAYER}"),
    "never compressed": ([["lm_head", "int4_awq"]], f"compress.overrides: 'lm_head' {NO_LAYER}"),
    "half of what is joined": (
        [["*.0.self_attn.k_proj", "int4_awq"]],
        "self_attn.q_proj is fp8, .*k_proj is int4_awq",
    ),
    "one left in bf16": ([["*.up_proj", "none"]], r"engines load them as one, but .*and 2 more such groups"),
    "nothing left": ([["*", "int4_awq"]], "compress.format: fp8: overrides name every layer"),
    "hidden": (
        [["*.mlp.*", "int8_sq"], ["*.mlp.*", "int4_awq"]],
        "compress.overrides: int8_sq: later patterns match every layer",
    ),
    "no such format": ([["*.mlp.*", "int3"]], "compress.overrides: 'int3' is not one of none, fp8"),
}


@pytest.mark.parametrize(("overrides", "message"), BAD_OVERRIDES.values(), ids=BAD_OVERRIDES)
def test_bad_overrides(overrides: list[list[str]], message: str, sources: Any, tmp_path: Path) -> None:
    request = make_request(sources("qwen3"), tmp_path / "out", **MLP_IN_INT4 | {"overrides": overrides})
    with pytest.raises(RecipeError, match=message):
        run(request, silent)
    assert not list((tmp_path / "out").glob("*"))


def test_experts_share_a_format(sources: Any, tmp_path: Path) -> None:
    changes = {"format": "fp8", "group_size": 32, "overrides": [["*.experts.0.*", "int4_awq"]]}
    with pytest.raises(RecipeError, match=r"experts.*is fp8.*all experts of a layer one format"):
        run(make_request(sources("mixtral"), tmp_path / "out", **changes), silent)


def test_one_input_for_attention_and_feed_forward(sources: Any, tmp_path: Path) -> None:
    """Phi computes both from one norm, whose weight takes up one smoothing only."""
    changes = {"format": "int4_awq", "group_size": 32, "overrides": [["*.mlp.fc1", "fp8"]]}
    with pytest.raises(CompatibilityError, match="layers that take the same input have several formats"):
        run(make_request(sources("phi"), tmp_path / "out", **changes), silent)
