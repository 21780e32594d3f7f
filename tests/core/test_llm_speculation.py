"""Speculation in plans for the LLM API: each version's words, what is refused, and drafts that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.test_model import edit_config
from core.test_trtllm_plan import arguments, origins
from drafts import eagle3_config, eagle3_tensors, save_eagle3
from tiny import save_checkpoint
from trtbuild.checkpoint_files import open_directory
from trtbuild.console import plan_text
from trtbuild.draft import read_draft
from trtbuild.errors import ArtifactError, CompatibilityError, RecipeError
from trtbuild.foresight import draft_of
from trtbuild.llm_speculation import LLM_FIELDS
from trtbuild.model import read_facts
from trtbuild.plan import Plan, Source
from trtbuild.planner import make_plan
from trtbuild.recipe_file import load_recipe
from trtbuild.recipe_speculative import Speculative
from trtbuild.toolchain import tool_versions

VERSIONS = ("1.0.0", "1.1.0", "1.2.1", "1.3.0rc3", "1.3.0rc22", "1.4.0rc1")
OLD = VERSIONS[:2]


@pytest.fixture(scope="module")
def eagle3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_eagle3(tmp_path_factory.mktemp("drafts") / "eagle3")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drafts") / "small"
    return save_checkpoint(path, overrides={"num_hidden_layers": 1, "intermediate_size": 64})


def planned(model: Path, tmp_path: Path, *overrides: str) -> Plan:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"schema_version: 1\nmodel: {{path: {model}}}\nruntime: {{kind: trtllm}}\n")
    loaded = load_recipe(recipe, overrides)
    facts = read_facts(open_directory(model))
    return make_plan(loaded, facts, Source(str(model)), tool_versions(), draft=draft_of(loaded))


def asked(method: str, version: str, *more: str) -> list[str]:
    return [f"runtime.version={version}", f"speculative.method={method}", *(f"speculative.{one}" for one in more)]


@pytest.mark.parametrize("version", VERSIONS)
def test_ngram(tiny_llama: Path, tmp_path: Path, version: str) -> None:
    plan = planned(tiny_llama, tmp_path, *asked("ngram", version, "max_matching_ngram_size=3", "is_keep_all=false"))
    assert arguments(plan)["speculative_config"] == {
        "decoding_type": "NGram",
        "max_draft_len": 4,
        "max_matching_ngram_size": 3,
        "is_keep_all": False,
    }
    assert origins(plan)["speculative.max_draft_len"] == "default"
    assert origins(plan)["speculative.is_use_oldest"] == f"default of TensorRT-LLM {version}"
    assert plan.step("engine").files == {}


NAMES = dict.fromkeys(VERSIONS[:4], "DraftTarget") | dict.fromkeys(VERSIONS[4:], "Draft_Target")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_draft_model(tiny_llama: Path, tmp_path: Path, small: Path, version: str) -> None:
    plan = planned(tiny_llama, tmp_path, *asked("draft_target", version, f"draft={small}", "max_draft_len=6"))
    place = {"speculative_model_dir" if version in OLD else "speculative_model": "draft"}
    sampling = {"allow_advanced_sampling": True} if version in VERSIONS[2:5] else {}
    assert arguments(plan)["speculative_config"] == {
        "decoding_type": NAMES[version],
        "max_draft_len": 6,
        **place,
        **sampling,
    }
    assert plan.step("engine").files == {"speculative/draft": str(small)}


@pytest.mark.parametrize("version", VERSIONS)
def test_eagle3(tiny_llama: Path, tmp_path: Path, eagle3: Path, version: str) -> None:
    changes = asked("eagle3", version, f"draft={eagle3}")
    if version == "1.0.0":
        with pytest.raises(CompatibilityError) as caught:
            planned(tiny_llama, tmp_path, *changes, "speculative.eagle3_layers_to_capture=[0, 1, 2]")
        assert (
            "speculative.eagle3_layers_to_capture: is not an argument of TensorRT-LLM 1.0.0; it came with TensorRT-LLM "
            "1.1.0 (Eagle); remove it, or change runtime.version" in str(caught.value)
        )
        with pytest.raises(CompatibilityError, match=r"trained on the layers \[0, 1, 2\], and TensorRT-LLM 1\.0\.0 ca"):
            planned(tiny_llama, tmp_path, *changes)
        return
    plan = planned(tiny_llama, tmp_path, *changes)
    assert arguments(plan)["speculative_config"] == {
        "decoding_type": "Eagle3" if version in VERSIONS[4:] else "Eagle",
        "max_draft_len": 3,
        "eagle3_layers_to_capture": [0, 1, 2],
        **({"speculative_model_dir": "draft"} if version in OLD else {"speculative_model": "draft"}),
        **({"allow_advanced_sampling": True} if version in VERSIONS[2:5] else {}),
    }
    assert origins(plan)["speculative.eagle3_layers_to_capture"] == "draft: eagle_config of its config.json"
    greedy = f"TensorRT-LLM {version} verifies these drafts greedily: the server refuses to sample"
    assert (greedy in plan.warnings) == (version == "1.1.0")


def test_two_engines(tiny_llama: Path, tmp_path: Path, eagle3: Path) -> None:
    changes = ("eagle3_one_model=false", f"draft={eagle3}")
    made = arguments(planned(tiny_llama, tmp_path, *asked("eagle3", "1.2.1", *changes)))
    assert made["speculative_config"]["eagle3_one_model"] is False
    with pytest.raises(
        CompatibilityError, match=r"one_model: false: this version always .*\(eagle3, TensorRT-LLM 1\.4"
    ):
        planned(tiny_llama, tmp_path, *asked("eagle3", "1.4.0rc1", *changes))


@pytest.fixture(scope="module")
def mtp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says of itself that it predicts further tokens; only its config is looked at."""
    path = save_checkpoint(tmp_path_factory.mktemp("mtp") / "model")
    edit_config(path, num_nextn_predict_layers=1)
    return path


@pytest.mark.parametrize("version", VERSIONS)
def test_mtp(mtp: Path, tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from trtbuild.compat import facts

    monkeypatch.setitem(facts("speculative")["mtp"], "model_types", ["llama"])
    plan = planned(mtp, tmp_path, *asked("mtp", version, "max_draft_len=2"))
    length = "max_draft_len" if version in VERSIONS[4:] else "num_nextn_predict_layers"
    found = arguments(plan)["speculative_config"]
    found.pop("allow_advanced_sampling", None)
    assert found == {"decoding_type": "MTP", length: 2}
    modules = asked("mtp", version, "num_nextn_predict_layers=2")
    if version in VERSIONS[4:]:
        with pytest.raises(
            CompatibilityError, match=r"num_nextn_predict_layers: is no longer .*; write max_draft_len: 2"
        ):
            planned(mtp, tmp_path, *modules)
    else:
        assert planned(mtp, tmp_path, *modules).value("speculative.max_draft_len") == 2


def test_every_field_has_a_home() -> None:
    named = {name for names in LLM_FIELDS.values() for name in names} | {"method", "draft_kv_cache_share", "train"}
    assert set(Speculative.model_fields) == named


def test_a_schedule(tiny_llama: Path, tmp_path: Path) -> None:
    schedule = "draft_len_schedule={1: 4, 8: 2, 32: 0}"
    plan = planned(tiny_llama, tmp_path, *asked("ngram", "1.2.1", schedule, "max_concurrency=40"))
    found = arguments(plan)["speculative_config"]
    assert (found["draft_len_schedule"], found["max_concurrency"]) == ({1: 4, 8: 2, 32: 0}, 40)
    assert plan.digest == planned(tiny_llama, tmp_path, *asked("ngram", "1.2.1", schedule, "max_concurrency=40")).digest
    assert "draft_len_schedule" in plan_text(plan)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            asked("ngram", "1.1.0", "draft_len_schedule={1: 4}"),
            "speculative.draft_len_schedule: is not an argument of TensorRT-LLM 1.1.0; it came with TensorRT-LLM 1.2.1",
        ),
        (asked("ngram", "1.0.0", "max_concurrency=4"), "max_concurrency: is not an argument of TensorRT-LLM 1.0.0; it"),
        (asked("ngram", "1.2.1", "draft_len_schedule={2: 4}"), "has no draft length for 1 request, and max_draft_len"),
        (asked("ngram", "1.2.1", "draft_len_schedule={1: 3}"), "has 3 for 1 request, and max_draft_len is 4; write 1:"),
        (asked("ngram", "1.2.1", "draft_len_schedule={1: 4, 2: 5}"), "draft_len_schedule.2: 5 is more than max_draft_"),
        (
            asked("ngram", "1.4.0rc1", "draft_len_schedule={1: 4}", "max_concurrency=4"),
            "speculative.max_concurrency: 4: draft_len_schedule says from how many requests on nothing is drafted (ngr",
        ),
        (asked("ngram", "1.2.1", "max_draft_len=512"), "max_draft_len: 512: a request has at most 512 tokens (runtime"),
        (asked("ngram", "1.2.1", "draft=x"), "speculative.draft: x: ngram has none; remove it"),
        (asked("ngram", "1.2.1", "draft_kv_cache_share=0.5"), "draft_kv_cache_share: 0.5: ngram has none; remove it"),
        (asked("draft_target", "1.2.1"), "speculative.draft: is missing, and draft_target needs a draft model; name i"),
        (asked("eagle3", "1.2.1"), "speculative.draft: is missing, and eagle3 needs a draft that was trained for the"),
        (asked("eagle3", "1.2.1"), "and a model of 3 layers has none of those that TensorRT-LLM captures; name the la"),
        (asked("eagle3", "1.2.1", "eagle3_layers_to_capture=[0, 3]"), "to_capture: 3: the model has 3 layers; name la"),
        (asked("eagle3", "1.2.1", "eagle3_layers_to_capture=[1, 1]"), "[1, 1] names a layer twice; name each layer on"),
        (asked("mtp", "1.2.1"), "speculative.method: mtp: the model has no layers that predict further tokens (num_ne"),
        ([*asked("ngram", "1.2.1"), "runtime.pipeline_parallel_size=2"], "does not run with pipeline_parallel_size 2;"),
        (
            [*asked("ngram", "1.2.1"), "runtime.extra={sampler_type: TRTLLMSampler}"],
            "runtime.extra.sampler_type: TRTLLMSampler: the C++ sampler does not verify drafts; remove it, or use no s",
        ),
        (
            [*asked("ngram", "1.2.1"), "runtime.extra={disable_overlap_scheduler: false}"],
            "disable_overlap_scheduler: false: TensorRT-LLM switches the overlap scheduler off for this method; remove",
        ),
        (
            [*asked("eagle3", "1.0.0"), "runtime.guided_decoding_backend=xgrammar"],
            "guided_decoding_backend: xgrammar: these drafts do not follow a grammar (eagle3, TensorRT-LLM 1.0.0); rem",
        ),
        (
            asked("eagle3", "1.0.0", "eagle3_one_model=false"),
            "enable_block_reuse: true: a draft with an engine of its own does not run with block reuse (eagle3, Tensor",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(tiny_llama: Path, tmp_path: Path, changes: list[str], sentence: str) -> None:
    with pytest.raises(CompatibilityError) as caught:
        planned(tiny_llama, tmp_path, *changes)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (
            "{max_draft_len: 3}",
            "runtime.extra.speculative_config.max_draft_len: the recipe says it in speculative.max_d",
        ),
        (
            "{decoding_type: AUTO}",
            "speculative_config.decoding_type: the recipe says it in speculative.method; set it th",
        ),
        (
            "{speculative_model: x}",
            "speculative_config.speculative_model: the recipe says it in speculative.draft; set it",
        ),
        ("{max_windows: 3}", "runtime.extra.speculative_config.max_windows: is not an argument of TensorRT-LLM 1.2.1"),
    ],
)
def test_extra_keys_beside_the_section(tiny_llama: Path, tmp_path: Path, extra: str, sentence: str) -> None:
    changes = asked("ngram", "1.2.1")
    with pytest.raises(RecipeError) as caught:
        planned(tiny_llama, tmp_path, *changes, f"runtime.extra.speculative_config={extra}")
    assert sentence in str(caught.value)
    plan = planned(tiny_llama, tmp_path, *changes, "runtime.extra.speculative_config={acceptance_window: 50}")
    assert arguments(plan)["speculative_config"]["acceptance_window"] == 50


@pytest.mark.parametrize(
    ("config", "tensors", "sentence"),
    [
        ({"hidden_size": 128}, {}, "speculative.draft: reads hidden states of 128, and the model's hidden_size is 64;"),
        ({"target_hidden_size": 32}, {}, "reads hidden states of 32, and the model's hidden_size is 64"),
        ({"vocab_size": 300}, {}, "has the target's vocab_size 300, and the model's vocab_size is 320"),
        ({"draft_vocab_size": 400}, {}, "has draft_vocab_size 400, more than its vocab_size 320"),
        ({"architectures": ["MistralForCausalLM"]}, {}, "is MistralForCausalLM (llama); drafts of EAGLE-3 are LlamaFo"),
        ({"model_type": "deepseek_v3"}, {}, "is LlamaForCausalLMEagle3 (deepseek_v3); drafts of"),
        ({"max_position_embeddings": 100}, {}, "knows 100 positions, and runtime.max_seq_len is 512"),
        ({"num_hidden_layers": 2}, {}, "lacks the tensor midlayer.0.self_attn.q_proj.weight"),
        ({"quantization_config": {"quant_method": "modelopt"}}, {}, "is quantized (modelopt): trtbuild takes drafts o"),
        ({}, {"d2t": None}, "speculative.draft: lacks the tensor d2t; use a draft that was trained for this model"),
        ({}, {"fc.weight": ("BF16", [64, 128])}, "[64, 128], not [64, 192]: it reads 2 layers of the model, and 3 are"),
        ({}, {"midlayer.self_attn.q_proj.weight": ("BF16", [64, 64])}, "q_proj.weight has shape [64, 64], not [64, 12"),
    ],
)  # fmt: skip
def test_drafts_that_do_not_fit(
    tiny_llama: Path, tmp_path: Path, config: dict[str, Any], tensors: dict[str, Any], sentence: str
) -> None:
    changed = {name: entry for name, entry in (eagle3_tensors() | tensors).items() if entry is not None}
    draft = save_eagle3(tmp_path / "draft", eagle3_config(**config), changed)
    with pytest.raises(CompatibilityError) as caught:
        planned(tiny_llama, tmp_path, *asked("eagle3", "1.2.1", f"draft={draft}"))
    assert sentence in str(caught.value)


def test_layers_other_than_those_it_was_trained_on(tiny_llama: Path, tmp_path: Path, eagle3: Path) -> None:
    with pytest.raises(
        CompatibilityError, match=r"\[0, 1\]: the draft was trained on the layers \[0, 1, 2\]; remove it"
    ):
        planned(
            tiny_llama,
            tmp_path,
            *asked("eagle3", "1.2.1", f"draft={eagle3}", "eagle3_layers_to_capture=[0, 1]"),
        )


def test_an_ordinary_model_is_no_draft_of_eagle3(small: Path) -> None:
    with pytest.raises(ArtifactError, match="has no positive draft_vocab_size, which a draft of EAGLE-3 has"):
        read_draft(small, "eagle3")


def test_a_draft_model_that_does_not_fit(tiny_llama: Path, tmp_path: Path) -> None:
    changes = asked("draft_target", "1.2.1")
    with pytest.raises(CompatibilityError, match="no fewer than the model's"):
        planned(tiny_llama, tmp_path, *changes, f"speculative.draft={tiny_llama}")
    other = save_checkpoint(tmp_path / "other", "phi", tokenizer=False, overrides={"num_hidden_layers": 1})
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    with pytest.raises(CompatibilityError) as caught:
        planned(tiny_llama, tmp_path, *changes, f"speculative.draft={other}")
    assert "PhiForCausalLM is not among the classes that TensorRT-LLM 1.2.1 lists for its LLM API" in str(caught.value)
    assert "knows 64 positions, and runtime.max_seq_len is 512" in str(caught.value)


def test_the_comparison(tiny_llama: Path, tmp_path: Path) -> None:
    plan = planned(tiny_llama, tmp_path, *asked("ngram", "1.2.1", "max_concurrency=8", "max_draft_len=3"))
    assert plan.comparison is not None
    rows = {row.what: [str(cell) for cell in row.cells] for row in plan.comparison.rows}
    assert rows["speculation ngram"] == [
        "not available: not in trtllm-build",
        "available: decoding_type NGram",
        "available: decoding_type NGram",
    ]
    assert rows["speculative.max_concurrency"] == ["not available: no counterpart", "available", "available"]
