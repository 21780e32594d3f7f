"""The FP8 cache against a reference that quantizes and dequantizes keys and values, and the layout of the pools."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoModelForCausalLM

from runtime.conftest import engine_config
from trtbuild.runtime import Engine, SamplingParams, model
from trtbuild.runtime.kv_cache import decode_e4m3, encode_e4m3

# Powers of two and others; one so small that keys saturate.
SCALES = {0: (0.01, 0.02), 1: (0.0005, 0.003), 2: (0.125, 0.25)}


def test_codes_are_e4m3_rounded_to_nearest_even_and_saturating() -> None:
    values = torch.tensor([0.0, 1.0, 448.0, 449.0, 1e6, -1e6, 17.0, 19.0, 2.0**-9, 2.0**-10, 1.5 * 2.0**-9])
    found = decode_e4m3(encode_e4m3(values, 1.0), torch.float32)
    # 17 and 19 lie half way between multiples of 2; subnormals are multiples of 2^-9.
    expected = torch.tensor([0.0, 1.0, 448.0, 448.0, 448.0, -448.0, 16.0, 20.0, 2.0**-9, 0.0, 2.0**-8])
    assert torch.equal(found, expected)
    assert torch.equal(decode_e4m3(encode_e4m3(values * 0.5, 0.5), torch.float32), expected)


@pytest.fixture(scope="module")
def scaled(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with FP8 KV scales, as ModelOpt exports them."""
    path = tmp_path_factory.mktemp("fp8") / "engine"
    shutil.copytree(checkpoint("llama"), path)
    tensors = load_file(path / "model.safetensors")
    for layer, (key, value) in SCALES.items():
        tensors[f"model.layers.{layer}.self_attn.k_proj.k_scale"] = torch.tensor(key)
        tensors[f"model.layers.{layer}.self_attn.v_proj.v_scale"] = torch.tensor(value)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (path / "hf_quant_config.json").write_text(json.dumps(quantization), encoding="utf-8")
    return path


def quantizing_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[torch.Tensor, None]:
    """Ordinary causal attention over keys and values that went through E4M3."""
    key, value = (
        (part / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(part.dtype) * scale
        for part, scale in zip((key, value), SCALES[module.layer_idx], strict=True)
    )
    key, value = (part.repeat_interleave(module.num_key_value_groups, dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    out = scores.masked_fill(future, float("-inf")).softmax(dim=-1) @ value
    return out.transpose(1, 2), None


@pytest.mark.parametrize("chunk", [8, 512])
def test_fp8_cache_equals_the_reference(scaled: Path, checkpoint: Callable[..., Path], chunk: int) -> None:
    AttentionInterface.register("trtbuild_test_fp8", quantizing_attention)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint("llama"), dtype=torch.float64, attn_implementation="trtbuild_test_fp8"
    ).eval()
    tokens = list(range(3, 43))
    with torch.inference_mode():
        expected = model(torch.tensor([tokens]), use_cache=False).logits[0]
    config = engine_config(dtype="fp8", max_num_tokens=chunk, tokens_per_block=8)
    with Engine.load(scaled, config=config) as engine:
        assert engine.facts.kv_cache_dtype == "fp8"
        torch.testing.assert_close(engine.logits(tokens), expected, atol=1e-5, rtol=0)
        # Decoding reads the same codes: the greedy continuation is the reference's, also with a reused prefix.
        params = SamplingParams(max_tokens=24, ignore_eos=True)
        found = [engine.generate([tokens], params)[0] for _ in range(2)]
    text = list(tokens)
    with torch.inference_mode():
        for _ in range(24):
            text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    assert [list(one.token_ids) for one in found] == [text[len(tokens) :]] * 2
    assert found[1].metrics.kv_cache_reused_block > 0


def test_the_scales_matter_and_the_cache_is_smaller(scaled: Path, checkpoint: Callable[..., Path]) -> None:
    tokens = list(range(3, 43))
    with Engine.load(scaled, config=engine_config(dtype="fp8")) as engine:
        narrow = engine.logits(tokens)
        stored = engine._runner.model.model.layers[0].self_attn.trtbuild_paged_layer.cache.keys
        assert stored.dtype == torch.uint8
    with Engine.load(checkpoint("llama"), config=engine_config(dtype="fp8")) as engine:
        assert engine.facts.notes == (
            "kv_cache.dtype is fp8 and the checkpoint has no k_scale and v_scale: 1.0 is used",
        )
        plain = engine.logits(tokens)
    with Engine.load(scaled, config=engine_config()) as engine:
        full = engine.logits(tokens)
    assert (narrow - full).abs().max() > 1e-3
    assert (narrow - plain).abs().max() > 1e-3


def test_scattered_blocks_are_gathered(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that grow side by side do not lie in runs; their answers are those of a roomy cache."""
    prompts = [[3 + number] * (3 + number) for number in range(4)]
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    with Engine.load(checkpoint("llama"), config=engine_config()) as engine:
        expected = [one.token_ids for one in engine.generate(prompts, params)]
    config = engine_config(capacity_scheduler_policy="MAX_UTILIZATION", tokens_per_block=4, max_tokens=400)
    scattered, segment_of = 0, model.segment_of

    def count(*args: Any, **options: Any) -> Any:
        nonlocal scattered
        made = segment_of(*args, **options)
        scattered += made.slots is not None
        return made

    monkeypatch.setattr(model, "segment_of", count)
    with Engine.load(checkpoint("llama"), config=config) as engine:
        assert [one.token_ids for one in engine.generate(prompts, params)] == expected
    assert scattered > 40
