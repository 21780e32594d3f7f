"""Our layers on the exported files against ModelOpt's fake quantization of the whole model in memory.

Formats that ModelOpt 0.47 can compute on a CPU and whose export changes nothing. (Exporting AWQ averages smoothing
scales and folds them into norms: another model than the one in memory.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compress_requests import CALIBRATION, make_request
from test_stream_equality import modelopt_config

from trtbuild.compress.request import parse_request
from trtbuild.compress.source import load_source
from trtbuild.compress.textdata import CalibrationSpec, load_samples
from trtbuild.runtime.checkpoint import load_model

IDS = torch.arange(40).reshape(1, 40) * 7 % 320


def in_memory(source: Path, output: Path, changes: dict[str, Any]) -> torch.Tensor:
    """The logits of ModelOpt's quantized model."""
    import modelopt.torch.quantization as mtq

    model = load_source(parse_request(make_request(source, output)), torch.device("cpu"))
    samples = load_samples(CalibrationSpec(**CALIBRATION), source).input_ids  # type: ignore[arg-type]

    def loop(running: Any) -> None:
        with torch.no_grad():
            for sample in samples:
                running(input_ids=torch.tensor([sample]), use_cache=False)

    mtq.quantize(model, modelopt_config(changes), loop)
    with torch.no_grad():
        return model.float()(IDS, use_cache=False).logits


@pytest.mark.parametrize("name", ["fp8", "fp8_per_channel_per_token", "int8_sq", "int8_weight_only"])
def test_the_same_logits(name: str, sources: Any, compress: Any, tmp_path: Path) -> None:
    directory, _ = compress("llama", format=name)
    wanted = in_memory(sources("llama"), tmp_path / "unused", {"format": name})
    loaded = load_model(
        directory, device=torch.device("cpu"), dtype=torch.float32, weights="auto", attn_implementation="eager"
    )
    plain = load_model(
        sources("llama"), device=torch.device("cpu"), dtype=torch.float32, weights="auto", attn_implementation="eager"
    )
    with torch.no_grad():
        found, original = loaded.model(IDS).logits, plain.model(IDS).logits
    # An input between two codes falls to either side, and files hold smoothing scales in bf16; the format costs more.
    apart, cost = (found - wanted).abs().mean(), (wanted - original).abs().mean()
    assert apart < (0.35 if name == "int8_sq" else 0.1) * cost
