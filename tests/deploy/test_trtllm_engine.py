"""Arguments of ``trtllm-build``, and what a built engine is held against."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from trtbuild.adapters.trtllm_engine import RECORD, check_engine
from trtbuild.build_flags import FlagTable, flag_table, flag_tables
from trtbuild.compat import facts
from trtbuild.errors import CompatibilityError
from trtbuild.releases import lines
from trtbuild.trtllm_build import (
    EngineSpec,
    Limits,
    Lora,
    Speculation,
    arguments,
    choose,
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
        ({"version": "0.16.0"}, "known are 0.17 to 1.3rc"),
        ({"version": "newest"}, "is no TensorRT-LLM version"),
    ],
)
def test_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CompatibilityError) as caught:
        choose(replace(SPEC, **changes))
    assert sentence in str(caught.value)


OLDER = [table for table in flag_tables() if table.name != "1.2"]


def test_lines_and_tables_of_flags_belong_together() -> None:
    """Every line with engines has one table, whose releases are its own; every row of a flag names tables in order."""
    tables = flag_tables()
    covered = [name for table in tables for name in table.lines]
    assert covered == [line.name for line in lines() if "engine" in line.flows]
    names = [table.name for table in tables]
    for table in tables:
        assert re.fullmatch(r"[0-9a-f]{40}", table.commit)
        assert table.proof
        assert table.date.year >= 2026
        for release in table.releases:
            assert flag_table(release) is table
        # What was read for a release is the page of that release; everything else says that it is nearest.
        assert bool(table.releases) == (table.repo == "NVIDIA/TensorRT-LLM")
        assert not table.releases or table.path == f"{table.releases[-1]}/commands/trtllm-build.html"
    for part in ("build", "plugin"):
        for name, rows in facts("build_flags")[part].items():
            ends = [(names.index(row.get("from", names[0])), names.index(row.get("to", names[-1]))) for row in rows]
            assert all(first <= last for first, last in ends), name
            assert all(one[1] + 1 == other[0] for one, other in pairwise(ends)), name


def test_every_default_of_a_flag_is_allowed() -> None:
    for table in flag_tables():
        for name, flag in table.flags.items():
            assert flag.kind in {"number", "text", "path", "choice", "switch", "list"}, name
            assert bool(flag.allowed) == (flag.kind == "choice") or flag.kind == "list", name
            assert flag.default is None or flag.kind != "choice" or flag.default in flag.allowed, name
            assert flag.default is None or (flag.kind == "number") == isinstance(flag.default, int), name


def test_flags_of_releases() -> None:
    """A sample of what changed, against upstream's pages of 0.18.2, 0.19.0, 0.21.0, 1.1.0 and 1.2.1."""
    found = {table.name: table.flags for table in flag_tables()}
    assert {name: len(flags) for name, flags in found.items()} == {
        "0.17": 66, "0.18": 66, "0.19": 70, "0.20": 70, "0.21": 70, "1.0": 70, "1.1": 70, "1.2": 67, "1.3rc": 67,
    }  # fmt: skip
    assert (found["0.18"]["tokens_per_block"].default, found["0.19"]["tokens_per_block"].default) == (64, 32)
    for name in ("use_paged_context_fmha", "use_fp8_context_fmha"):
        assert (found["0.18"][name].default, found["0.19"][name].default) == ("disable", "enable")
    assert "nvfp4" not in found["0.17"]["gemm_plugin"].allowed
    assert "trace" not in found["0.20"]["log_level"].allowed
    assert "trace" in found["0.21"]["log_level"].allowed
    assert {"auto_parallel", "gpus_per_node", "cluster_key"} == set(found["1.1"]) - set(found["1.2"])
    assert found["1.2"]["max_num_tokens"].default == 8192
    assert {flag.plugin for flag in (found["1.2"]["gemm_plugin"], found["1.2"]["workers"])} == {True, False}
    assert flag_table("1.2.0").note("1.2.0") == "flags of trtllm-build: 58fb435e, proven identical to 1.2.0"
    assert flag_table("1.2.0rc7").note("1.2.0rc7").endswith("not proven identical to 1.2.0rc7")
    assert flag_table("0.17.0").note("0.17.0") == "flags of trtllm-build: be178810, not proven identical to 0.17.0"


@pytest.mark.parametrize("table", OLDER, ids=lambda table: table.name)
def test_every_argument_of_ours_exists_in_every_line(table: FlagTable) -> None:
    """The choice is made of flags that all lines have, with values that each line allows."""
    version = table.releases[0] if table.releases else {"0.17": "0.17.0", "1.3rc": "1.3.0rc3"}[table.name]
    spec = replace(
        SPEC, version=version, tp_size=2, multiple_profiles=True, gather_generation_logits=True, experts=True
    )
    drafts = Speculation(mode="medusa", max_draft_len=3)
    for one in (spec, replace(spec, format=None, kv_cache=None, sparse=True), replace(spec, speculation=drafts)):
        assert {row.flag for row in choose(one)} <= set(table.flags)
    with pytest.raises(CompatibilityError, match=f"trtllm-build {table.name} has no flag --nonsense$"):
        choose(replace(spec, extra={"nonsense": ("1",)}))


@pytest.mark.parametrize(
    ("version", "extra", "sentence"),
    [
        ("1.2.1", {"cluster_key": ("L4",)}, "trtllm-build 1.2 has no flag --cluster_key, 0.17 to 1.1 have it"),
        ("0.18.2", {"dora_plugin": ("enable",)}, "trtllm-build 0.18 has no flag --dora_plugin, 0.19 to 1.3rc have it"),
        ("0.17.0", {"gemm_plugin": ("nvfp4",)}, "trtllm-build 0.17: --gemm_plugin nvfp4 is not one of auto"),
        ("0.20.0", {"log_level": ("trace",)}, "trtllm-build 0.20: --log_level trace is not one of"),
        ("1.2.1", {"lora_target_modules": ("attn_q", "nose")}, "--lora_target_modules nose is none of attn_qkv"),
    ],
)
def test_flags_of_other_lines_are_refused(version: str, extra: dict[str, tuple[str, ...]], sentence: str) -> None:
    with pytest.raises(CompatibilityError) as caught:
        choose(replace(SPEC, version=version, extra=extra))
    assert sentence in str(caught.value)


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
