"""Instances on GPUs: how many GPUs serve, what instances on one GPU take together, what a dense model is not told."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from core.test_trtllm_engine_plan import plan_for as engine_plan
from core.test_trtllm_plan import plan_for
from tiny import save_checkpoint
from trtbuild.adapter_file import read_adapter_config
from trtbuild.errors import CompatibilityError, RecipeError
from trtbuild.plan import Plan

PlanOf = Callable[..., Plan]
PLANS = [pytest.param(plan_for, id="llm"), pytest.param(engine_plan, id="engine")]
SHARED = "serving.gpu_device_ids=[[0], [0]]"


@pytest.mark.parametrize("plan_of", PLANS)
def test_gpus_that_stay_idle_are_said(plan_of: PlanOf, tiny_llama: Path, tmp_path: Path) -> None:
    said = plan_of(tiny_llama, tmp_path, "target.count=4").warnings
    assert (
        "target.count is 4, and the package runs on 1 of them: 3 stay idle; serving.gpu_device_ids starts an instance "
        "on each group of GPUs"
    ) in said
    named = plan_of(tiny_llama, tmp_path, "target.count=4", "serving.gpu_device_ids=[[0], [3]]")
    assert "target.count is 4, and the package runs on 2 of them: 2 stay idle" in named.warnings
    whole = plan_of(tiny_llama, tmp_path, "target.count=2", "serving.gpu_device_ids=[[0], [1]]")
    assert not any("stay idle" in warning for warning in whole.warnings)


@pytest.mark.parametrize("plan_of", PLANS)
def test_the_target_counts_the_gpus_of_instances(plan_of: PlanOf, tiny_llama: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny_llama, tmp_path, "serving.gpu_device_ids=[[0], [3]]")
    assert plan.value("target.count") == 4
    with pytest.raises(RecipeError, match=r"gpu_device_ids\.1: names GPU 3, and target.count 2 leaves 0 to 1; na"):
        plan_of(tiny_llama, tmp_path, "target.count=2", "serving.gpu_device_ids=[[0], [3]]")


@pytest.mark.parametrize("plan_of", PLANS)
def test_instances_on_one_gpu_must_fit_together(plan_of: PlanOf, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_of(tiny_llama, tmp_path, SHARED)
    assert str(caught.value) == (
        "serving.gpu_device_ids: 2 instances share GPU 0, and each takes 0.9 of the memory that is free when it starts "
        "(runtime.kv_cache.free_gpu_memory_fraction): together more than there is; use "
        "runtime.kv_cache.free_gpu_memory_fraction: 0.47 at most, or set runtime.kv_cache.max_tokens"
    )
    plan_of(tiny_llama, tmp_path, SHARED, "runtime.kv_cache.free_gpu_memory_fraction=0.47")
    plan_of(tiny_llama, tmp_path, SHARED, "runtime.kv_cache.max_tokens=4096")
    three = ("serving.gpu_device_ids=[[1, 0], [0, 2], [2, 0]]", "runtime.tensor_parallel_size=2")
    with pytest.raises(RecipeError, match="3 instances share GPU 0, and each takes 0.5 .* 0.31 at most"):
        plan_of(tiny_llama, tmp_path, *three, "runtime.kv_cache.free_gpu_memory_fraction=0.5")


def test_ranks_are_named_by_what_the_runtime_has(tiny_llama: Path, tmp_path: Path) -> None:
    two = "serving.gpu_device_ids=[[0, 1]]"
    with pytest.raises(RecipeError, match=r"one engine takes 1 \(tensor x pipeline x context parallel\); name 1"):
        plan_for(tiny_llama, tmp_path, two)
    with pytest.raises(RecipeError, match=r"one engine takes 1 \(tensor x pipeline parallel\); name 1"):
        engine_plan(tiny_llama, tmp_path, two)


def test_settings_of_experts_belong_to_models_with_experts(tiny_llama: Path, tmp_path: Path) -> None:
    settings = ("runtime.moe_config.backend=CUTLASS", "runtime.extra.moe_config={max_num_tokens: 64}")
    with pytest.raises(CompatibilityError) as caught:
        plan_for(tiny_llama, tmp_path, *settings)
    assert str(caught.value).splitlines() == [
        "runtime.moe_config.backend: CUTLASS is set, but LlamaForCausalLM has no experts; remove it",
        "runtime.extra.moe_config: is set, but LlamaForCausalLM has no experts; remove it",
    ]
    plan_for(save_checkpoint(tmp_path / "mixtral", "mixtral"), tmp_path, *settings)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "{0} has no adapter_config.json"),
        ("[]", "{0}/adapter_config.json holds no JSON object"),
        ("{", "{0}/adapter_config.json is no JSON"),
        ("{}", "{0}/adapter_config.json has no r"),
        ('{"r": true}', "{0}/adapter_config.json has r: True, which is no number"),
        ('{"r": "8"}', "{0}/adapter_config.json has r: '8', which is no number"),
    ],
)
def test_a_config_of_an_adapter_that_cannot_be_read(tmp_path: Path, text: str | None, sentence: str) -> None:
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(sentence.format(tmp_path))}$"):
        read_adapter_config(tmp_path, "r")
