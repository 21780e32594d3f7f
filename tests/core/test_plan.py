"""Plans: complete, deterministic, and with keys that follow exactly the fields they depend on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from core.test_model import edit_config, save_70b
from trtbuild.checkpoint_files import open_directory
from trtbuild.errors import CompatibilityError, Problem, RecipeError
from trtbuild.model import read_facts
from trtbuild.plan import STEP_KINDS, Plan, Source, step_key, until
from trtbuild.planner import make_plan
from trtbuild.recipe_file import load_recipe
from trtbuild.toolchain import tool_versions


def plan_for(
    checkpoint: Path, tmp_path: Path, *overrides: str, check: Callable[[Plan], list[Problem]] = lambda _: []
) -> Plan:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"schema_version: 1\nmodel: {{path: {checkpoint}}}\nruntime: {{kind: embedded}}\n")
    loaded = load_recipe(recipe, overrides)
    facts = read_facts(open_directory(checkpoint))
    return make_plan(loaded, facts, Source(str(checkpoint)), tool_versions(), check=check)


def keys(plan: Plan) -> dict[str, str]:
    """Every step's key as if each input's digest were its key."""
    found = {"fetch": "source"}
    for step in plan.steps[1:]:
        found[step.kind] = step_key(step, found, dict.fromkeys(step.files, "digest"))
    return found


def test_plan_is_complete_and_deterministic(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, tmp_path)
    again = plan_for(tiny_llama, tmp_path)
    assert json.dumps(plan.to_json()) == json.dumps(again.to_json())
    assert tuple(step.kind for step in plan.steps) == tuple(kind for kind in STEP_KINDS if kind != "draft")
    origins = {value.path: value.origin for value in plan.values}
    assert origins["runtime.kind"] == "recipe"
    assert origins["runtime.max_batch_size"] == "default"
    assert origins["runtime.kv_cache.max_tokens"] == "max_batch_size x max_seq_len"
    assert plan.value("runtime.kv_cache.max_tokens") == 8 * 512
    assert plan.step("engine").parameters["kv_cache"]["max_tokens"] == 8 * 512


def test_the_place_of_the_checkpoint_does_not_change_the_digest(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(tiny_llama)
    assert plan_for(elsewhere, tmp_path).digest == plan.digest


ALL = set(STEP_KINDS) - {"fetch", "draft"}  # nothing is trained


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("compress.format=fp8", {"compress", "engine", "deploy", "evaluate"}),
        ("compress.kv_cache=fp8", {"compress", "engine", "deploy", "evaluate"}),
        ("runtime.kv_cache.free_gpu_memory_fraction=0.5", {"engine", "deploy"}),
        ("runtime.max_seq_len=null", set()),  # null is the default
        ("runtime.max_batch_size=4", {"engine", "deploy"}),
        ("runtime.capacity_scheduler_policy=MAX_UTILIZATION", {"engine", "deploy"}),
        ("runtime.compute_dtype=float32", {"engine", "deploy", "evaluate"}),
        ("runtime.max_seq_len=256", ALL - {"compress"}),
        ("serving.model_name=other", {"repository", "deploy"}),
        ("serving.streaming=false", {"repository"}),
        ("serving.default_max_tokens=5", {"repository"}),
        ("deploy.labels={a: b}", {"deploy"}),
        ("quality.tokens=8192", {"evaluate"}),
        ("quality.max_perplexity_ratio=2.0", set()),
        ("store=/elsewhere", set()),
    ],
)
def test_a_field_changes_exactly_the_steps_that_depend_on_it(
    tiny_llama: Path, tmp_path: Path, override: str, changed: set[str]
) -> None:
    before, after = keys(plan_for(tiny_llama, tmp_path)), keys(plan_for(tiny_llama, tmp_path, override))
    assert {kind for kind in ALL if before[kind] != after[kind]} == changed


def test_calibration_changes_a_quantized_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    before = keys(plan_for(tiny_llama, tmp_path, "compress.format=fp8"))
    for change in ("compress.calibration.count=4", "compress.exclude=['*lm_head*']"):
        after = keys(plan_for(tiny_llama, tmp_path, "compress.format=fp8", change))
        assert {kind for kind in ALL if before[kind] != after[kind]} == {"compress", "engine", "deploy", "evaluate"}


def test_text_that_the_model_writes_is_no_file(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, tmp_path, "compress.format=fp8", "compress.calibration.data=self")
    compress, evaluate = plan.step("compress"), plan.step("evaluate")
    assert compress.parameters["calibration"]["data"] == "self"
    assert (dict(compress.files), dict(evaluate.files)) == ({}, {})
    named = plan_for(tiny_llama, tmp_path, "compress.format=fp8", "compress.calibration.data=./self")
    assert "data" not in named.step("compress").parameters["calibration"]
    assert named.step("compress").files == {"data": "./self"}


def test_a_split_reaches_both_steps_that_read_it(tiny_llama: Path, tmp_path: Path) -> None:
    settings = ("compress.format=fp8", "compress.calibration.data=chats", "compress.calibration.split=test")
    plan = plan_for(tiny_llama, tmp_path, *settings)
    assert plan.step("compress").parameters["calibration"]["split"] == "test"
    assert plan.step("evaluate").parameters["calibration_split"] == "test"
    before, after = keys(plan), keys(plan_for(tiny_llama, tmp_path, *settings, "compress.calibration.packing=padded"))
    assert {kind for kind in ALL if before[kind] != after[kind]} == {"compress", "engine", "deploy", "evaluate"}


def test_calibration_fits_a_model_with_a_short_context(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_llama, tmp_path / "ckpt"))
    edit_config(checkpoint, max_position_embeddings=256)
    plan = plan_for(checkpoint, tmp_path, "compress.format=fp8")
    value = next(value for value in plan.values if value.path == "compress.calibration.length")
    assert (value.value, value.origin) == (256, "default: 512, at most the model's 256")
    assert plan_for(checkpoint, tmp_path).value("compress.calibration.length") == 256
    with pytest.raises(RecipeError, match="512 is more than the model's context of 256 tokens; use at most 256"):
        plan_for(checkpoint, tmp_path, "compress.format=fp8", "compress.calibration.length=512")


def test_origins_of_sections_and_of_what_only_a_gpu_heeds(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, tmp_path, "runtime.kv_cache={max_tokens: 4096}", "deploy.labels.a=b", "target.gpu=H100")
    origins = {value.path: value.origin for value in plan.values}
    assert origins["runtime.kv_cache.max_tokens"] == "--set"
    assert origins["runtime.kv_cache.tokens_per_block"] == "default"
    assert origins["runtime.kv_cache.free_gpu_memory_fraction"] == "default; only a GPU heeds it"
    assert origins["deploy.labels"] == "--set"
    assert origins["target.gpu"] == "--set; only a GPU heeds it"
    assert origins["runtime.kind"] == "recipe"


def test_the_shortest_requests_that_can_be_evaluated(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, tmp_path, "runtime.max_seq_len=3", "serving.max_input_tokens=2")
    assert plan.step("evaluate").parameters["length"] == 1


def test_gates_belong_to_the_plan_but_to_no_key(tiny_llama: Path, tmp_path: Path) -> None:
    assert plan_for(tiny_llama, tmp_path).gates["max_perplexity_ratio"] == 1.01
    off = plan_for(tiny_llama, tmp_path, "quality.max_perplexity_ratio=null")
    assert off.gates["max_perplexity_ratio"] is None
    assert off.digest != plan_for(tiny_llama, tmp_path).digest


def test_until_keeps_what_a_step_needs(tiny_llama: Path, tmp_path: Path) -> None:
    steps = plan_for(tiny_llama, tmp_path).steps
    assert [step.kind for step in until(steps, "engine")] == ["fetch", "compress", "engine"]
    assert [step.kind for step in until(steps, "repository")] == ["repository"]
    assert until(steps, None) == steps


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["runtime.max_seq_len=1024"],
            "runtime.max_seq_len: 1024 is more than the 512 positions the model knows; use at",
        ),
        (["runtime.max_num_tokens=4"], "runtime.max_num_tokens: 4 is less than max_batch_size 8; use at least 8"),
        (
            ["runtime.enable_chunked_prefill=false", "runtime.max_num_tokens=100"],
            "100 is less than max_seq_len 512 while chunked prefill is off; raise it to 512 or set enable_chunked_pre",
        ),
        (["runtime.kv_cache.max_tokens=100"], "100 is less than max_seq_len 512: the longest request would never fit"),
        (
            ["serving.max_input_tokens=512"],
            "serving.max_input_tokens: 512 leaves no room in max_seq_len 512; use at most 511",
        ),
        (
            ["compress.group_size=64"],
            "compress.group_size: 64 is set while compress.format is none; remove it or use int4",
        ),
        (
            ["compress.format=int4_awq", "compress.group_size=48"],
            "48 does not divide the input size 64 of model.layers.0.mlp.gate_proj; use 64",
        ),
        (
            ["compress.format=int4_awq", "compress.group_size=20"],
            "20 does not divide the input size 64 of model.layers.0.mlp.gate_proj; use 16",
        ),
        (
            ["compress.format=fp8", "compress.calibration.column=text"],
            "compress.calibration.column: is set while compress.calibration.data names no data; name the data, or rem",
        ),
        (
            ["compress.format=fp8", "compress.calibration.data=self", "compress.calibration.split=train"],
            "compress.calibration.split: is set while compress.calibration.data names no data",
        ),
        (
            ["compress.format=fp8", "compress.calibration.data=self", "compress.max_memory=705MB"],
            "compress.calibration.data: self needs the whole model in memory, about ",
        ),
        (
            ["compress.exclude=[a]"],
            "compress.exclude: is set while nothing is compressed; remove it, or set compress.f",
        ),
        (["compress.calibration.seed=1"], "compress.calibration.seed: is set while nothing is compressed; remove it"),
        (["compress.calibration.packing=padded"], "compress.calibration.packing: is set while nothing is compressed"),
        (
            ["runtime.max_seq_len=2"],
            "runtime.max_seq_len: 2 leaves no token to predict when quality is measured; use a",
        ),
        (["serving.max_input_tokens=1"], "1 leaves no token to predict when quality is measured; use at least 2"),
        (["compress.sparsity_method=magnitude"], "compress.sparsity_method: is set while compress.sparsity is none"),
        (
            ["compress.format=fp8", "compress.calibration.length=4096"],
            "4096 is more than the model's context of 512 tokens; use at most 512",
        ),
        (
            ["serving.max_output_tokens=5", "serving.default_max_tokens=9"],
            "9 is more than max_output_tokens 5; use at most 5",
        ),
    ],
)
def test_contradictions_are_recipe_errors(tiny_llama: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_for(tiny_llama, tmp_path, *overrides)
    assert message in str(caught.value)


def test_several_contradictions_come_together(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_for(tiny_llama, tmp_path, "runtime.max_seq_len=1024", "compress.group_size=64")
    assert len(caught.value.problems) == 2


def test_mistakes_demands_and_further_checks_come_together(tiny_llama: Path, tmp_path: Path) -> None:
    overrides = ["compress.group_size=64", "speculative.method=lookahead", "deploy.image=A B"]
    with pytest.raises(RecipeError) as caught:
        plan_for(tiny_llama, tmp_path, *overrides, check=lambda plan: [Problem("seen", plan.value("deploy.image"))])
    assert [problem.path for problem in caught.value.problems] == ["compress.group_size", "seen", "speculative.method"]
    with pytest.raises(CompatibilityError) as refused:
        plan_for(tiny_llama, tmp_path, "speculative.method=lookahead", "runtime.version=1.2.1")
    assert "speculative.method: lookahead" in str(refused.value)
    assert "runtime.version: 1.2.1" in str(refused.value)


def test_layout_ensemble_has_fixed_names_and_a_batch_size(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, tmp_path, "serving.layout=ensemble", "runtime.max_batch_size=6")
    assert plan.step("repository").parameters["max_batch_size"] == 6
    assert "max_batch_size" not in plan_for(tiny_llama, tmp_path).step("repository").parameters
    with pytest.raises(RecipeError, match="serving.model_name: 'mine': the five models of layout ensemble have fixed"):
        plan_for(tiny_llama, tmp_path, "serving.layout=ensemble", "serving.model_name=mine")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("runtime.stream_interval=4", "runtime.stream_interval: 4: only the trtllm runtime has it; remove it"),
        (
            "runtime.enable_attention_dp=true",
            "runtime.enable_attention_dp: True: only the trtllm runtime has it; remove",
        ),
        (
            "runtime.kv_cache.host_cache_size=9",
            "runtime.kv_cache.host_cache_size: 9: only the runtimes trtllm and trtllm-engine have it; rem",
        ),
        (
            "runtime.allow_unknown_version=true",
            "runtime.allow_unknown_version: True: only the runtimes trtllm and trtllm-engine have it; remove it",
        ),
        ("runtime.version=1.2.1", "runtime.version: 1.2.1: the embedded runtime has trtbuild's own version; remove it"),
        (
            "runtime.tensor_parallel_size=2",
            "runtime.tensor_parallel_size: 2: the embedded runtime runs on one device; use 1",
        ),
        ("runtime.pipeline_parallel_size=2", "runtime.pipeline_parallel_size: 2"),
        ("runtime.extra={a: 1}", "runtime.extra: a: the embedded runtime has no further keys; remove it"),
        ("model.adapters=[x]", "model.adapters: x: cannot be done"),
        (
            "speculative.method=lookahead",
            "speculative.method: lookahead: the embedded engine has no such method; use ngram, draft_target, medu",
        ),
        ("target.count=2", "target.count: 2: the embedded runtime runs on one device; use 1"),
    ],
)
def test_what_cannot_be_executed_is_incompatible(tiny_llama: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(CompatibilityError) as caught:
        plan_for(tiny_llama, tmp_path, override)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"auto_map": {"AutoModelForCausalLM": "m.M"}},
            "carries Python code .auto_map.*set model.trust_remote_code: true",
        ),
        ({"model_type": "lama"}, "Transformers knows no causal language model of type 'lama'; did you mean llama"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "state-space, recurrent or linear-attention"),
        ({"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}, "multi-head latent attention"),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            "knows no causal language model of type 't5'",
        ),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "is not the causal language model of type llama, which is",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"already quantized \(gptq, bits=4\); give the original bf16",
        ),
    ],
)
def test_models_that_do_not_fit(tiny_llama: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    checkpoint = Path(shutil.copytree(tiny_llama, tmp_path / "ckpt"))
    edit_config(checkpoint, **changes)
    with pytest.raises(CompatibilityError, match=message):
        plan_for(checkpoint, tmp_path)


def test_weights_of_other_quantizers_do_not_fit(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_llama, tmp_path / "ckpt"))
    (checkpoint / "quant_config.json").write_text('{"w_bit": 4, "q_group_size": 128}')
    with pytest.raises(
        CompatibilityError, match=r"already quantized \(awq, w_bit=4, q_group_size=128\); give the orig"
    ):
        plan_for(checkpoint, tmp_path)


def test_int4_group_follows_the_model(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, tmp_path, "compress.format=int4_gptq")
    assert plan.value("compress.group_size") == 64
    plan = plan_for(tiny_llama, tmp_path, "compress.format=int4_awq")
    assert plan.value("compress.group_size") == 64
    assert next(value.origin for value in plan.values if value.path == "compress.group_size").startswith("model")


def test_what_sparsity_buys(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, tmp_path, "compress.sparsity='2:4'")
    assert plan.gates["max_perplexity_ratio"] == 4.04  # four times what bf16 may lose
    assert any("brings the embedded engine no speed" in warning for warning in plan.warnings)
    assert not any("2:4" in warning for warning in plan_for(tiny_llama, tmp_path).warnings)


def test_a_70b_model_is_planned_from_config_and_headers(tmp_path: Path) -> None:
    checkpoint = tmp_path / "70b"
    checkpoint.mkdir()
    save_70b(checkpoint)
    plan = plan_for(checkpoint, tmp_path, "compress.format=fp8")
    assert 68e9 < plan.facts.parameters < 72e9
    assert 70e9 < plan.estimates["checkpoint_bytes"] < 75e9
