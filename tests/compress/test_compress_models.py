"""Experts, reproducibility, and the distance between ModelOpt's model in memory and the files."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compress_requests import CALIBRATION, make_request, silent
from format_reference import read_checkpoint, reference_logits, weight_of

from tiny import save_checkpoint, save_tokenizer
from trtbuild.compress.calibrate import calibration_loop
from trtbuild.compress.export import export
from trtbuild.compress.quantize import format_passes, quantize
from trtbuild.compress.request import Meter, parse_request
from trtbuild.compress.run import run
from trtbuild.compress.selection import select
from trtbuild.compress.source import load_source, read_tensors
from trtbuild.compress.textdata import CalibrationSpec, load_samples
from trtbuild.errors import CompatibilityError
from trtbuild.runtime.checkpoint import load_model
from trtbuild.runtime.experts import DiskNames, UnfusedExperts, unfuse_experts

IDS = torch.arange(48).reshape(1, 48) * 11 % 320
FEW_TOKENS = CALIBRATION | {"count": 1, "length": 4}


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize(
    "changes", [{"format": "fp8", "kv_cache": "fp8", "sparsity": "2:4"}, {"format": "int4_awq", "group_size": 32}]
)
def test_the_same_request_gives_the_same_bytes(
    changes: dict[str, Any], sources: Any, compress: Any, tmp_path: Path
) -> None:
    first, _ = compress("mixtral", **changes)
    request = make_request(sources("mixtral"), tmp_path / "again", **changes)
    (tmp_path / "request.json").write_text(json.dumps(request))
    # Another process and another order of hashing, but as many threads: AWQ's sums are split among them.
    threads = str(torch.get_num_threads())
    environment = os.environ | {"PYTHONPATH": "builder", "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": threads}
    done = subprocess.run(
        [sys.executable, "-m", "trtbuild.compress", str(tmp_path / "request.json")],
        capture_output=True, text=True, check=True, env=environment, timeout=300,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[-1]["result"]["quantized_projections"] == 48
    progress = [line["progress"] for line in lines if "progress" in line]
    assert all(before[0] <= after[0] for before, after in itertools.pairwise(progress[:-1]))
    assert digests(tmp_path / "again") == digests(first)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "fp8"},
        {"format": "int4_awq", "group_size": 32},
        {"format": "fp8", "sparsity": "2:4"},
        {"sparsity": "2:4"},
    ],
    ids=["fp8", "int4", "sparse-fp8", "sparse"],
)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_without_calibration_tokens(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    experts = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}[name]
    source = save_checkpoint(tmp_path / "source", name, overrides={experts: 16})
    output = tmp_path / "out"
    result = run(make_request(source, output, calibration=FEW_TOKENS, **changes), silent)
    # Four tokens reach at most eight of sixteen experts in each of three layers.
    (note,) = result["notes"]
    assert int(note.split()[0]) >= 24
    assert "experts saw too few calibration tokens (an even share is 0): model.layers." in note
    seen = result["calibration"]["tokens_per_expert"]
    assert [sum(counts) for counts in seen.values()] == [8] * 3  # four tokens to two experts, once however many passes
    tensors = read_checkpoint(output)
    for stored, tensor in tensors.items():
        assert np.isfinite(tensor.values).all(), stored
        if stored.endswith("_scale"):
            assert (tensor.values > 0).all(), stored
        elif ".experts." in stored:
            assert (tensor.bits != 0).mean() > 0.3, stored  # pruning by an empty Hessian would leave nothing
    if result["sparsity"]:
        assert result["sparsity"]["share"] == 1.0
    loaded = load_model(
        output, device=torch.device("cpu"), dtype=torch.float64, weights="auto", attn_implementation="eager"
    )
    with torch.no_grad():
        assert (loaded.model(IDS).logits - reference_logits(output, IDS)).abs().max() < 1e-9


MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
OTHERS: dict[str, tuple[dict[str, Any], int]] = {
    # ModelOpt's AWQ export knows the experts of a few classes only; ours are handed to it. Projections per model.
    "olmoe": ({"num_experts": 4, "num_experts_per_tok": 2}, 2 * (4 + 4 * 3)),
    "phimoe": ({"num_local_experts": 4, "num_experts_per_tok": 2}, 2 * (4 + 4 * 3)),
    # Its files hold the experts of a layer in one tensor too.
    "granitemoe": ({"num_local_experts": 4, "num_experts_per_tok": 2}, 2 * (4 + 4 * 3)),
    "qwen2_moe": (MOE | {"num_experts": 4, "shared_expert_intermediate_size": 64}, 2 * (4 + 4 * 3 + 3)),
    "ernie4_5_moe": ({"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64}, (4 + 3) + (4 + 4 * 3 + 3)),
    "gpt_neox": ({}, 2 * 4),
    "starcoder2": ({}, 2 * 6),
}  # fmt: skip


def save_other(path: Path, model_type: str, settings: dict[str, Any]) -> Path:
    """A random checkpoint of a model type that `tiny` does not have."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False, "pad_token_id": 2,
        "eos_token_id": 2, "bos_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **common | settings)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    save_tokenizer(path)
    return path


@pytest.mark.parametrize("changes", [{"format": "fp8"}, {"format": "int4_awq", "group_size": 32}], ids=["fp8", "int4"])
@pytest.mark.parametrize("model_type", OTHERS)
def test_other_architectures_are_quantized_whole(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    settings, projections = OTHERS[model_type]
    source = save_other(tmp_path / "source", model_type, settings)
    result = run(make_request(source, tmp_path / "out", **changes), silent)
    assert result["quantized_projections"] == projections
    logits = []
    for directory in (source, tmp_path / "out"):
        loaded = load_model(
            directory, device=torch.device("cpu"), dtype=torch.float32, weights="auto", attn_implementation="sdpa"
        )
        with torch.no_grad():
            logits.append(loaded.model(IDS).logits)
    assert 0 < (logits[0] - logits[1]).abs().mean() < 0.2 * logits[0].abs().mean()


def test_architecture_without_linear_layers(tmp_path: Path) -> None:
    source = save_other(tmp_path / "source", "gpt2", {"n_inner": 128})
    with pytest.raises(CompatibilityError, match="GPT2LMHeadModel has no linear layers that a format"):
        run(make_request(source, tmp_path / "out", format="fp8"), silent)


def test_unfused_experts_compute_what_the_fused_class_does(sources: Any) -> None:
    for name in ("mixtral", "qwen3_moe"):
        loaded = load_model(
            sources(name), device=torch.device("cpu"), dtype=torch.float64, weights="auto", attn_implementation="eager"
        )
        with torch.no_grad():
            fused = loaded.model(IDS).logits
            names = unfuse_experts(loaded.model)
            assert names == [f"model.layers.{index}.mlp.experts" for index in range(3)]
            assert isinstance(loaded.model.get_submodule(names[0]), UnfusedExperts)
            assert (loaded.model(IDS).logits - fused).abs().max() < 1e-12


def test_names_of_experts_in_files(sources: Any) -> None:
    loaded = load_model(
        sources("mixtral"), device=torch.device("cpu"), dtype=torch.float32, weights="auto", attn_implementation="eager"
    )
    names = DiskNames(loaded.model)
    prefix = "model.layers.2.block_sparse_moe"
    assert names.in_model(f"{prefix}.experts.3.w3.weight") == "model.layers.2.mlp.experts.3.up_proj.weight"
    assert names.in_model(f"{prefix}.experts.3.w2.input_scale") == "model.layers.2.mlp.experts.3.down_proj.input_scale"
    assert names.in_model(f"{prefix}.gate.weight") == "model.layers.2.mlp.gate.weight"
    assert names.in_model("model.layers.2.self_attn.k_proj.k_scale") == "model.layers.2.self_attn.k_proj.k_scale"


def test_experts_that_compute_something_else_are_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gpt_oss", vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=256,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(CompatibilityError, match="experts of class GptOssExperts cannot be split"):
        unfuse_experts(model)


Weights = dict[str, tuple[np.ndarray, np.ndarray]]


def in_memory_and_exported(source: Path, output: Path, **changes: Any) -> tuple[torch.Tensor, torch.Tensor, Weights]:
    """Logits of ModelOpt's fake-quantized model, logits of the files, and its weights, as they are and quantized."""
    request = parse_request(make_request(source, output, **changes))
    model = load_source(request, torch.device("cpu"))
    selection = select(model, read_tensors(source), request)
    samples = load_samples(CalibrationSpec(**CALIBRATION), source)  # type: ignore[arg-type]
    meter = Meter(silent, 10_000)
    loop = calibration_loop(samples.input_ids, meter, format_passes(request.format, request.kv_cache))
    quantize(model, selection, request, loop, layers=3)
    with torch.no_grad():
        weights = {}
        for name in selection.compressed:
            layer = model.get_submodule(name)
            weights[name] = layer.weight.double().numpy().copy(), layer.weight_quantizer(layer.weight).double().numpy()
        memory = model(IDS).logits
    export(model, selection, request)
    loaded = load_model(
        output, device=torch.device("cpu"), dtype=torch.float32, weights="auto", attn_implementation="sdpa"
    )
    with torch.no_grad():
        return memory, loaded.model(IDS).logits, weights


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_fp8_files_are_the_model_in_memory(sources: Any, tmp_path: Path) -> None:
    """The numbers are the same but for values midway between two codes, which may round to either of them.

    In memory ModelOpt multiplies by 448 / amax where the export divides by amax / 448, and the sums that make the
    inputs are taken in another order.
    """
    memory, files, weights = in_memory_and_exported(sources("qwen3"), tmp_path / "out", format="fp8")
    original = load_model(
        sources("qwen3"), device=torch.device("cpu"), dtype=torch.float32, weights="auto", attn_implementation="sdpa"
    )
    with torch.no_grad():
        lost = divergence(original.model(IDS).logits, memory)
    tensors = read_checkpoint(tmp_path / "out")
    assert len(weights) == 21
    for layer, (_, quantized) in weights.items():
        moved = np.abs(weight_of(tensors, layer, "FP8") - quantized) > 1e-6 * np.abs(quantized)
        assert moved.mean() < 0.02
        assert (np.abs(weight_of(tensors, layer, "FP8") - quantized) <= 0.126 * np.abs(quantized))[moved].all()
    assert divergence(memory, files) < 0.25 * lost


def test_awq_files_are_rounded_again(sources: Any, tmp_path: Path) -> None:
    """q, k and v (gate and up) get the mean of their smoothing scales at export and are rounded anew; o and down not.

    So the files are another model than the one that ModelOpt holds, about as far from it as from the original.
    """
    memory, files, weights = in_memory_and_exported(
        sources("qwen3"), tmp_path / "out", format="int4_awq", group_size=32
    )
    original = load_model(
        sources("qwen3"), device=torch.device("cpu"), dtype=torch.float32, weights="auto", attn_implementation="sdpa"
    )
    with torch.no_grad():
        reference = original.model(IDS).logits
    lost, moved = divergence(reference, memory), divergence(memory, files)
    assert 0.02 * lost < moved < 2 * lost
    assert divergence(reference, files) < 2 * lost
    tensors = read_checkpoint(tmp_path / "out")
    steps = {}
    for leaf in ("self_attn.o_proj", "self_attn.q_proj"):
        layer = f"model.layers.0.{leaf}"
        smoothed, _ = weights[layer]  # by ModelOpt, before its export
        scale = np.repeat(tensors[f"{layer}.weight_scale"].values, 32, axis=1)
        steps[leaf] = np.abs(weight_of(tensors, layer, "W4A16_AWQ") - smoothed) / scale
    assert steps["self_attn.o_proj"].max() <= 0.5 + 1e-3
    assert steps["self_attn.q_proj"].max() > 0.6
