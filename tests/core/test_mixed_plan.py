"""What the plan says of formats by layer, of their choice by measurement, and of the form of the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.test_plan import plan_for
from trtbuild import evidence
from trtbuild.errors import CompatibilityError, RecipeError
from trtbuild.plan import Plan

OVERRIDES = "compress.overrides={'*.mlp.*': int4_awq, '*.0.*': none}"
TRTLLM = ("runtime.kind=trtllm", "runtime.version=1.2.1")
ENGINE = ("runtime.kind=trtllm-engine", "runtime.version=1.2.1", "target.gpu=H100", "serving.layout=ensemble")


def parameters(plan: Plan) -> dict[str, object]:
    return dict(plan.step("compress").parameters)


def test_overrides_keep_their_order(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, tmp_path, "compress.format=fp8", OVERRIDES)
    found = parameters(plan)
    assert found["overrides"] == [["*.mlp.*", "int4_awq"], ["*.0.*", "none"]]
    assert (found["format"], found["group_size"]) == ("fp8", 64)
    assert plan.value("compress.overrides") == {"*.mlp.*": "int4_awq", "*.0.*": "none"}
    assert plan.gates["max_perplexity_ratio"] == 1.35  # the loosest of both formats
    swapped = plan_for(tiny_llama, tmp_path, "compress.format=fp8",
                       "compress.overrides={'*.0.*': none, '*.mlp.*': int4_awq}")  # fmt: skip
    assert swapped.digest != plan.digest


def test_a_recipe_without_the_fields_plans_what_it_did(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, tmp_path, "compress.format=fp8")
    assert not {"overrides", "auto", "checkpoint"} & parameters(plan).keys()
    assert not any("overrides" in value.path or "auto" in value.path for value in plan.values)


def test_a_choice_is_planned_with_its_memory(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, tmp_path, "compress.format=auto")
    expected = {"formats": ["fp8", "int4_awq"], "target_bits": 5.0, "method": "gradient"}
    assert parameters(plan)["auto"] == expected
    assert parameters(plan)["format"] == "none"
    assert any("holds the whole model in memory" in warning for warning in plan.warnings)
    fixed = plan_for(tiny_llama, tmp_path, "compress.format=fp8")
    assert plan.estimates["compress_peak_memory_bytes"] > fixed.estimates["compress_peak_memory_bytes"]
    given = plan_for(tiny_llama, tmp_path, "compress.format=auto", "compress.target_bits=7.5",
                     "compress.auto_formats=[int4_awq, fp8]", "compress.auto_method=kl_div")  # fmt: skip
    expected = {"formats": ["int4_awq", "fp8"], "target_bits": 7.5, "method": "kl_div"}
    assert parameters(given)["auto"] == expected


WRONG = [
    (["compress.target_bits=5.0"], "compress.target_bits: is set while compress.format is none; use format: auto"),
    (["compress.format=auto", "compress.target_bits=4.2"], "4.2: the smallest of fp8, int4_awq takes 4.5 bits"),
    (["compress.format=auto", "compress.overrides={'*': fp8}"], "is set while compress.format is auto, which chooses"),
    (["compress.format=auto", "compress.sparsity=2:4"], "2:4 with format: auto: the layers' sensitivity"),
    (["compress.format=auto", "compress.auto_formats=[fp8, fp8]"], "compress.auto_formats: fp8 stands twice"),
    (["compress.format=auto", "compress.max_memory=800MB"], "format: auto holds the whole model in memory"),
    (["compress.overrides={'*': none}"], "compress.overrides: leaves every layer in bf16"),
    (["compress.overrides={'*': int3}"], "compress.overrides"),
    (["compress.checkpoint=compressed-tensors"], "is set while no weights are quantized"),
    (["compress.format=fp8", "compress.kv_cache=fp8", "compress.checkpoint=compressed-tensors"], "without KV scales"),
    (["compress.format=int4_awq", "compress.checkpoint=compressed-tensors", *TRTLLM],
     "compressed-tensors: the runtime trtllm reads ModelOpt's form; use modelopt"),
    (["compress.format=auto", *ENGINE], "auto: an engine is planned for formats that are known"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_contradictions(overrides: list[str], message: str, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises((RecipeError, CompatibilityError), match=message.replace("(", r"\\(")):
        plan_for(tiny_llama, tmp_path, *overrides)


def test_every_format_is_held_against_the_gpu(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CompatibilityError, match="compress.format: fp8 does not run on A100"):
        plan_for(tiny_llama, tmp_path, "compress.format=int4_awq", "compress.group_size=64",
                 "compress.overrides={'*.mlp.*': fp8}", *TRTLLM, "target.gpu=A100")  # fmt: skip


def test_engines_of_several_formats(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, tmp_path, "compress.format=fp8", "compress.overrides={'*.mlp.*': int4_awq}", *ENGINE)
    assert plan.step("engine").parameters["spec"]["format"] == "MIXED_PRECISION"
    assert plan.step("evaluate").parameters["joined_scales"]["gate_up"] is True


def test_groups_that_vllm_has_no_kernels_for(tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_llama, tmp_path, "compress.format=int4_awq", "compress.group_size=16",
                    "compress.checkpoint=compressed-tensors")  # fmt: skip
    assert "vLLM's INT4 kernels take groups of 32, 64, 128, not 16" in plan.warnings


def test_the_evidence_has_the_table_and_its_picture() -> None:
    choices = [{"format": "fp8", "bits": 8.0, "sensitivity": 0.5}, {"format": "none", "bits": 16.0, "sensitivity": 0.0}]
    groups = [{"layers": ["model.layers.0.mlp.down_proj"], "weights": 8, "chosen": "fp8", "choices": choices}]
    table = {"method": "gradient", "target_bits": 8.0, "planned_bits": 8.0, "how": "", "groups": groups}
    files = evidence.choice({"result": {"choice": table, "bits_per_weight": 8.1}})
    assert json.loads(files["evidence/sensitivity.json"]) == table | {"bits_per_weight": 8.1}
    assert "layers.0.mlp.down_proj" in files["evidence/sensitivity.svg"]
    assert evidence.choice({"result": {}}) == {}
    assert evidence.choice({}) == {}
