"""engine.json and the models that are refused: every sentence as the user reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from trtbuild.errors import ArtifactError, CompatibilityError
from trtbuild.runtime import Engine, EngineConfig, SamplingParams
from trtbuild.runtime.architecture import check_config, check_rope

GOOD: dict[str, Any] = {
    "schema_version": 1, "runtime": "embedded", "max_batch_size": 4, "max_num_tokens": 64, "max_seq_len": 128,
    "kv_cache": {"dtype": "auto", "tokens_per_block": 16, "max_tokens": 512, "free_gpu_memory_fraction": 0.9,
                 "enable_block_reuse": True},
    "capacity_scheduler_policy": "GUARANTEED_NO_EVICT", "enable_chunked_prefill": True, "device": "cpu",
    "compute_dtype": "auto", "weights": "auto", "trust_remote_code": False,
}  # fmt: skip


def write(path: Path, **changes: Any) -> Path:
    data = GOOD | {"kv_cache": GOOD["kv_cache"] | changes.pop("kv_cache", {})} | changes
    (path / "engine.json").write_text(json.dumps(data), encoding="utf-8")
    return path


def test_the_file_is_read(tmp_path: Path) -> None:
    config = EngineConfig.read(write(tmp_path))
    assert (config.max_batch_size, config.kv_cache.tokens_per_block, config.kv_cache.max_tokens) == (4, 16, 512)


def test_an_engine_is_loaded_by_its_file(checkpoint: Callable[..., Path]) -> None:
    path = write(checkpoint("llama", 99))
    with Engine.load(path) as engine:
        assert engine.facts.architecture == "LlamaForCausalLM"
        assert engine.facts.kv_cache_tokens == 512
        assert (engine.facts.device, engine.facts.compute_dtype, engine.facts.weights) == ("cpu", "float32", "expanded")
        assert len(engine.generate([[5, 6]], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, (
            "schema_version is 2, this version of trtbuild reads 1; build the package again with this version")),
        ({"runtime": "trtllm"}, (
            "runtime is 'trtllm', the embedded engine reads only 'embedded'; build with runtime.kind: embedded")),
        ({"max_batch_size": 0}, "max_batch_size: 0 is not allowed; it is a whole number of at least 1"),
        ({"max_seq_len": True}, "max_seq_len: True is not allowed; it is a whole number of at least 1"),
        ({"max_num_tokens": 3}, (
            "max_num_tokens: 3 is less than max_batch_size 4; raise it to at least 4: every running request takes one "
            "token a step")),
        ({"device": "tpu"}, "device: 'tpu' is not allowed; allowed are auto, cpu, cuda"),
        ({"enable_chunked_prefill": "yes"}, "enable_chunked_prefill: 'yes' is not allowed; allowed are true and false"),
        ({"kv_cache": {"dtype": "int4"}}, "kv_cache.dtype: 'int4' is not allowed; allowed are auto, fp8, nvfp4, int8"),
        ({"kv_cache": {"max_tokens": 8}}, (
            "kv_cache.max_tokens: 8 is less than one block of 16 tokens; raise it to at least 16")),
        ({"kv_cache": {"free_gpu_memory_fraction": 1.5}}, (
            "kv_cache.free_gpu_memory_fraction: 1.5 is not allowed; it is above 0 and at most 1")),
        ({"kv_cache": {"pages": 3}}, (
            "unknown key kv_cache.pages; allowed are dtype, tokens_per_block, max_tokens, free_gpu_memory_fraction, "
            "enable_block_reuse; build the package again with this version of trtbuild")),
        ({"speculative": []}, "speculative is [], not an object with a method; build the package again"),
        ({"speculative": {"method": "ngram", "draft": 5}}, (
            "speculative.draft: 5 is no name of a directory; build the package again")),
        ({"speculative": {"method": "ngram", "draft_len_schedule": [1]}}, (
            "speculative.draft_len_schedule: [1] is no list of lists of 2; build the package again")),
        ({"speculative": {"method": "ngram", "draft_len_schedule": [[1, 2, 3]]}}, (
            "speculative.draft_len_schedule: [[1, 2, 3]] is no list of lists of 2; build the package again")),
        ({"speculative": {"method": "medusa", "draft": "draft", "choices": 5}}, (
            "speculative.choices: 5 is no list of lists; build the package again")),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_bad_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        EngineConfig.read(write(tmp_path, **changes))
    assert str(caught.value) == f"{tmp_path / 'engine.json'}: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "there is no such file"), ("{", "cannot be read as JSON"), ("[]", "holds list, not an object")],
)
def test_damaged_files(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "engine.json").write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=message):
        EngineConfig.read(tmp_path)


def test_an_unlimited_cache_needs_a_gpu(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(ArtifactError, match=r"kv_cache\.max_tokens: null is allowed only on a GPU"):
        Engine.load(write(checkpoint("llama", 98), kv_cache={"max_tokens": None}))


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("mamba2", {}, "state-space layers"),
        ("mamba", {}, "state-space layers"),
        ("jamba", {}, "state-space layers"),
        ("falcon_h1", {}, "state-space layers"),
        ("rwkv", {}, "linear-attention or recurrent layers"),
        ("recurrent_gemma", {}, "linear-attention or recurrent layers"),
        ("qwen3_next", {}, "linear-attention or recurrent layers"),
        ("deepseek_v3", {}, "multi-head latent attention (MLA)"),
        ("t5", {}, "cross-attention"),
        ("gemma3n_text", {}, "layers that share their keys and values"),
        ("llama4_text", {}, "layers of type 'chunked_attention'"),
        ("gemma3", {}, "inputs other than text"),
        ("falcon", {"alibi": True}, "position biases (ALiBi)"),
    ],
)
def test_models_out_of_reach_are_refused_by_name(model_type: str, settings: dict[str, Any], reason: str) -> None:
    config = AutoConfig.for_model(model_type, **settings)
    config.architectures = [f"{model_type}-name"]
    with pytest.raises(CompatibilityError) as caught:
        check_config(config)
    assert str(caught.value) == (
        f"{model_type}-name has {reason}, which the embedded engine does not run; "
        "serve it with runtime.kind: trtllm, or choose a decoder with ordinary attention"
    )


def test_a_refused_model_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    AutoConfig.for_model("mamba2").save_pretrained(tmp_path)
    with pytest.raises(CompatibilityError, match="state-space layers"):
        Engine.load(tmp_path, config=EngineConfig())


def test_rotary_factors_that_depend_on_the_batch_are_refused() -> None:
    config = AutoConfig.for_model("llama", max_position_embeddings=256)
    config.architectures = ["LlamaForCausalLM"]
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    check_rope(config, 256)
    with pytest.raises(CompatibilityError) as caught:
        check_rope(config, 512)
    assert str(caught.value) == (
        "LlamaForCausalLM has dynamic rotary positions, whose factors change beyond 256 tokens, "
        "and max_seq_len is 512; set runtime.max_seq_len to at most 256"
    )


def test_the_package_imports_nothing_heavy() -> None:
    code = "import sys, trtbuild.runtime; print(any(name in sys.modules for name in ('torch', 'transformers')))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
