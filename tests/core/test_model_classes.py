"""Which model classes a release's LLM API lists: the list of the release that was read, and what is said of others."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.test_trtllm_plan import plan_for
from tiny import save_checkpoint
from trtbuild.errors import CompatibilityError
from trtbuild.model_classes import class_list, class_lists, refused_class, version_with
from trtbuild.releases import Release, containers, find_release, lines


def release(version: str) -> Release:
    found = find_release(version, allow_unknown=True)
    assert isinstance(found, Release)
    return found


def test_every_line_with_an_llm_api_has_one_list() -> None:
    named = [name for one in class_lists() for name in one.lines]
    assert sorted(named) == sorted(line.name for line in lines() if "llm-api" in line.flows)
    for one in class_lists():
        assert not one.classes & one.autodeploy
        assert {"LlamaForCausalLM", "Qwen3MoeForCausalLM"} <= one.classes
        for version in one.releases:
            assert class_list(release(version)) is one


def test_containers_have_a_proven_list_but_for_one() -> None:
    unproven = {
        version
        for version in {one.tensorrt_llm for one in containers()}
        if "llm-api" in release(version).line.flows and class_list(release(version)).note(version)
    }
    assert unproven == {"1.0.3.2510"}


@pytest.mark.parametrize(
    ("architecture", "without", "with_it"),
    [
        ("Phi3ForCausalLM", "1.0.0", "1.1.0"),
        ("GptOssForCausalLM", "1.1.0", "1.2.0"),
        ("Glm4MoeForCausalLM", "1.2.1", "1.3.0rc3"),
        ("Cohere2ForCausalLM", "1.3.0rc3", "1.3.0rc14"),
        ("Qwen3_5MoeForCausalLM", "1.3.0rc22", "1.4.0rc1"),
    ],
)
def test_lists_differ_between_releases(architecture: str, without: str, with_it: str) -> None:
    assert refused_class(release(with_it), architecture) is None
    assert refused_class(release(without), architecture) is not None


def test_what_a_refusal_says() -> None:
    assert refused_class(release("1.0.0"), "Phi3ForCausalLM") == (
        "Phi3ForCausalLM is not among the classes that TensorRT-LLM 1.0.0 lists for its LLM API"
    )
    assert refused_class(release("1.3.0rc22"), "Qwen3_5MoeForCausalLM") == (
        "TensorRT-LLM 1.3.0rc22 runs Qwen3_5MoeForCausalLM through its AutoDeploy backend only "
        "(by the list of 1.3.0rc14, not proven identical to 1.3.0rc22)"
    )
    assert class_list(release("1.4.0rc1")).note("1.4.0rc1") == "by the newest list, not proven identical to 1.4.0rc1"


def test_where_a_class_runs() -> None:
    assert version_with("Phi3ForCausalLM") == "1.2.1", "the newest that a container has"
    assert version_with("Glm4MoeForCausalLM") == "1.4.0rc1", "no container has one that lists it"
    assert version_with("GemmaForCausalLM") is None


def test_a_plan_refuses_by_its_release_and_names_another(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "phi3", "phi3")
    with pytest.raises(CompatibilityError) as caught:
        plan_for(checkpoint, tmp_path, "runtime.version=1.0.0")
    assert str(caught.value).endswith(
        "1.0.0 lists for its LLM API; use runtime.version: 1.2.1, runtime.kind: trtllm-engine or embedded, "
        "or another model"
    )
    plan_for(checkpoint, tmp_path, "runtime.version=1.1.0")


def test_a_plan_says_which_list_it_went_by(tiny_llama: Path, tmp_path: Path) -> None:
    said = plan_for(tiny_llama, tmp_path, "runtime.version=1.3.0rc5").warnings
    expected = "the model's class was accepted by the list of 1.3.0rc3, not proven identical to 1.3.0rc5"
    assert expected in said
    assert not any("class was accepted" in line for line in plan_for(tiny_llama, tmp_path).warnings)
