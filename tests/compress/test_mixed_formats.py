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
from compress_requests import CALIBRATION, make_request
from test_stream_equality import check_equal, modelopt_config

from trtbuild.compress.request import parse_request
from trtbuild.compress.source import load_source
from trtbuild.compress.textdata import CalibrationSpec, load_samples

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
