"""Arguments of ``trtllm-build``, and what a built engine is held against."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trtbuild.adapters.trtllm_engine import RECORD, check_engine
from trtbuild.errors import CompatibilityError
from trtbuild.trtllm_build import (
    EngineSpec,
    Limits,
    Lora,
    Speculation,
    arguments,
    choose,
    release_line,
    release_lines,
)

LIMITS = Limits(max_batch_size=64, max_seq_len=4096, max_num_tokens=8192)
SPEC = EngineSpec(
    version="1.2.1", architecture="LlamaForCausalLM", format="FP8", kv_cache="FP8", gpu=90, tp_size=2, pp_size=1,
    limits=LIMITS,
)  # fmt: skip


def values(spec: EngineSpec) -> dict[str, str]:
    return {choice.flag: " ".join(choice.values) for choice in choose(spec)}


def test_the_whole_argument_list_of_fp8_llama_on_two_gpus() -> None:
    assert arguments(choose(SPEC), "/checkpoint", "/engine") == (
        "--checkpoint_dir", "/checkpoint", "--output_dir", "/engine",
        "--max_batch_size", "64", "--max_seq_len", "4096", "--max_input_len", "4096", "--max_num_tokens", "8192",
        "--max_beam_width", "1", "--kv_cache_type", "paged", "--tokens_per_block", "32",
        "--use_paged_context_fmha", "enable", "--use_fp8_context_fmha", "enable", "--gemm_plugin", "disable",
        "--reduce_fusion", "enable", "--user_buffer", "enable",
        "--input_timing_cache", "/build/timing.cache", "--output_timing_cache", "/build/timing.new",
        "--workers", "2", "--monitor_memory",
    )  # fmt: skip
    assert all(choice.reason for choice in choose(SPEC))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"format": None, "kv_cache": None}, {"gemm_plugin": "auto", "use_fp8_context_fmha": "disable"}),
        ({"format": "W4A16_AWQ", "kv_cache": "FP8"}, {"gemm_plugin": "auto", "use_fp8_context_fmha": "disable"}),
        ({"format": "NVFP4", "gpu": 100}, {"gemm_plugin": "nvfp4", "use_fp8_context_fmha": "enable"}),
        ({"sparse": True, "format": None}, {"gemm_plugin": "disable", "weight_sparsity": ""}),
        ({"experts": True, "architecture": "MixtralForCausalLM"}, {"moe_plugin": "auto"}),
        ({"tp_size": 1, "pp_size": 2}, {"workers": "2"}),
        ({"multiple_profiles": True, "gather_generation_logits": True},
         {"multiple_profiles": "enable", "gather_generation_logits": ""}),
        ({"lora": Lora(directories=("/a", "/b"), modules=("attn_q", "attn_v"), max_rank=16), "format": None},
         {"lora_plugin": "auto", "lora_dir": "/a /b", "lora_target_modules": "attn_q attn_v", "max_lora_rank": "16"}),
        ({"speculation": Speculation(mode="eagle", max_draft_len=200)},
         {"speculative_decoding_mode": "eagle", "max_draft_len": "200", "max_num_tokens": str(64 * 201)}),
    ],
)  # fmt: skip
def test_choices_follow_the_spec(changes: dict[str, Any], wanted: dict[str, str]) -> None:
    found = values(replace(SPEC, **changes))
    assert wanted.items() <= found.items()


def test_what_is_left_out() -> None:
    single = values(replace(SPEC, tp_size=1))
    assert not {"reduce_fusion", "user_buffer", "weight_sparsity", "lora_plugin", "moe_plugin"} & single.keys()
    assert "user_buffer" not in values(replace(SPEC, format=None))
    assert "reduce_fusion" not in values(replace(SPEC, architecture="Qwen2ForCausalLM"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"gpu": 80}, "FP8 needs compute capability 8.9, the target has 8.0"),
        ({"format": "NVFP4", "kv_cache": None}, "NVFP4 needs compute capability 10.0, the target has 9.0"),
        ({"format": None, "gpu": 86}, "an FP8 KV cache needs compute capability 8.9"),
        ({"pp_size": 2, "speculation": Speculation(mode="medusa", max_draft_len=63)}, "pp_size must be 1"),
        ({"speculation": Speculation(mode="medusa", max_draft_len=0)}, "max_draft_len of 1 or more"),
        ({"speculation": Speculation(mode="mtp", max_draft_len=3)}, "--speculative_decoding_mode mtp is not one of"),
        ({"sparse": True, "gpu": 75, "format": None, "kv_cache": None}, "2:4 sparsity needs compute capability 8.0"),
        ({"version": "1.3.0rc21"}, "the flags of trtllm-build 1.3.0rc21 are not known"),
        ({"version": "0.16.0"}, "known are 1.2"),
        ({"version": "newest"}, "is no TensorRT-LLM version"),
    ],
)
def test_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CompatibilityError) as caught:
        choose(replace(SPEC, **changes))
    assert sentence in str(caught.value)


def test_every_flag_has_a_source_and_every_default_is_allowed() -> None:
    for line in release_lines():
        assert all("@" in source and len(source.rpartition("@")[2]) == 40 for source in line["sources"])
        assert line["date"].year >= 2026
        for flags in (line["build"], line["plugin"]):
            for name, flag in flags.items():
                assert flag["kind"] in {"value", "switch", "list", "plugin"}, name
                assert flag["kind"] != "plugin" or flag["default"] in flag["allowed"], name
    assert release_line("1.2.0rc7")["name"] == release_line("1.0.0")["name"] == "1.2"
    path = Path(release_line.__globals__["_FLAGS"])
    assert tomllib.loads(path.read_text(encoding="utf-8"))


def engine_config(spec: EngineSpec) -> dict[str, Any]:
    """What `trtllm-build` writes: version, pretrained_config, build_config."""
    mapping = {"world_size": spec.world_size, "tp_size": spec.tp_size, "pp_size": spec.pp_size}
    return {
        "version": spec.version,
        "pretrained_config": {
            "architecture": spec.architecture, "mapping": mapping,
            "quantization": {"quant_algo": spec.format, "kv_cache_quant_algo": spec.kv_cache},
        },
        "build_config": {
            "max_batch_size": 64, "max_seq_len": 4096, "max_num_tokens": 8192, "max_beam_width": 1,
            "plugin_config": {"tokens_per_block": 32},
        },
    }  # fmt: skip


def test_read_back() -> None:
    record = {"compute_capability": "9.0"}
    assert check_engine(engine_config(SPEC), record, SPEC) == ()
    wrong = engine_config(SPEC)
    wrong["version"] = "1.1.0"
    wrong["pretrained_config"]["mapping"]["tp_size"] = 4
    wrong["build_config"]["max_seq_len"] = 2048
    wrong["build_config"]["plugin_config"]["tokens_per_block"] = 64
    problems = check_engine(wrong, {"compute_capability": "8.9"}, SPEC)
    assert [problem.path.rpartition(" ")[2] for problem in problems] == [
        "version", "pretrained_config.mapping.tp_size", "build_config.max_seq_len", "build_config.tokens_per_block",
        "compute_capability",
    ]  # fmt: skip
    assert "is '1.1.0', the plan says '1.2.1'" in str(problems[0])
    assert [problem.path for problem in check_engine(engine_config(SPEC), None, SPEC)] == [RECORD]
    assert len(check_engine({}, record, SPEC)) == 12
    drafts = replace(SPEC, speculation=Speculation(mode="eagle", max_draft_len=5))
    assert [p.path for p in check_engine(engine_config(drafts), record, drafts)] == [
        "config.json: build_config.max_seq_len"
    ]
