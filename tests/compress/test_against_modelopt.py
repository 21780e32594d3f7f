"""Our layers on the exported files against ModelOpt's fake quantization of the whole model in memory.

Formats that ModelOpt 0.47 can compute on a CPU and whose export changes nothing. (Exporting AWQ averages smoothing
scales and folds them into norms: another model than the one in memory.) Layer by layer, each on the input that
ModelOpt's layer had: an input that lies between two codes falls to either side, and a small random model makes much
of that behind its first layers.
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


def in_memory(source: Path, output: Path, changes: dict[str, Any]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of each linear layer of ModelOpt's quantized model."""
    import modelopt.torch.quantization as mtq

    model = load_source(parse_request(make_request(source, output)), torch.device("cpu"))
    samples = load_samples(CalibrationSpec(**CALIBRATION), source).input_ids  # type: ignore[arg-type]

    def loop(running: Any) -> None:
        with torch.no_grad():
            for sample in samples:
                running(input_ids=torch.tensor([sample]), use_cache=False)

    mtq.quantize(model, modelopt_config(changes), loop)
    seen = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(lambda _, given, y, name=name: seen.update({name: (given[0], y)}))
    with torch.no_grad():
        model(IDS, use_cache=False)
    return seen


# How far outputs may lie apart, on average over a layer. Smoothing scales are bf16 in files and float32 in memory.
BOUNDS = {"fp8": 2e-3, "fp8_per_channel_per_token": 2e-3, "int8_weight_only": 1e-3, "int8_sq": 1e-2}


@pytest.mark.parametrize("name", BOUNDS)
def test_the_same_layers(name: str, sources: Any, compress: Any, tmp_path: Path) -> None:
    directory, _ = compress("llama", format=name)
    seen = in_memory(sources("llama"), tmp_path / "unused", {"format": name})
    plain, coded = (
        load_model(
            path, device=torch.device("cpu"), dtype=torch.float32, weights="auto", attn_implementation="eager"
        ).model
        for path in (sources("llama"), directory)
    )
    assert len(seen) == 21
    for layer, (x, wanted) in seen.items():
        with torch.no_grad():
            found, original = coded.get_submodule(layer)(x), plain.get_submodule(layer)(x)
        size = wanted.abs().mean()
        assert (found - wanted).abs().mean() < BOUNDS[name] * size, layer
        assert (original - wanted).abs().mean() > 3e-3 * size  # what the format costs
