"""Speculation in plans for the embedded engine: values, ``engine.json``, and every sentence of refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from core.test_model import edit_config
from drafts import eagle3_config, save_eagle3
from tiny import save_checkpoint
from trtbuild.checkpoint_files import open_directory
from trtbuild.errors import ArtifactError, CompatibilityError
from trtbuild.foresight import draft_of, refuse_unconvertible
from trtbuild.model import read_facts
from trtbuild.plan import Plan, Source
from trtbuild.planner import make_plan
from trtbuild.recipe_file import load_recipe
from trtbuild.runtime import SpeculativeConfig
from trtbuild.toolchain import tool_versions


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drafts") / "small"
    return save_checkpoint(path, overrides={"num_hidden_layers": 1, "intermediate_size": 64})


def planned(model: Path, tmp_path: Path, *asked: str, **runtime: str) -> Plan:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"schema_version: 1\nmodel: {{path: {model}}}\nruntime: {{kind: embedded}}\n")
    overrides = [f"speculative.{one}" for one in asked] + [f"{name}={value}" for name, value in runtime.items()]
    loaded = load_recipe(recipe, [one.replace("__", ".") for one in overrides])
    draft = draft_of(loaded)
    plan = make_plan(loaded, read_facts(open_directory(model)), Source(str(model)), tool_versions(), draft=draft)
    refuse_unconvertible(plan, loaded, draft)
    return plan


def test_ngram_has_the_vendor_s_defaults_and_the_recipe_s_values(tiny_llama: Path, tmp_path: Path) -> None:
    plan = planned(tiny_llama, tmp_path, "method=ngram", "draft_len_schedule={1: 4, 8: 2, 16: 0}", "is_keep_all=false")
    assert plan.value("speculative.max_matching_ngram_size") == 2
    said = plan.step("engine").parameters["speculative"]
    assert said == {
        "method": "ngram", "max_draft_len": 4, "draft_len_schedule": [[1, 4], [8, 2], [16, 0]],
        "max_matching_ngram_size": 2, "is_keep_all": False, "is_use_oldest": True, "is_public_pool": True,
    }  # fmt: skip
    # What the plan says is what the engine reads, through JSON.
    section = SpeculativeConfig.of(json.loads(json.dumps(said)))
    assert [section.length_at(batch) for batch in (1, 7, 8, 15, 16, 99)] == [4, 4, 2, 2, 0, 0]
    assert planned(tiny_llama, tmp_path).step("engine").parameters.get("speculative") is None


def test_a_draft_model_is_a_file_of_the_engine_step(tiny_llama: Path, tmp_path: Path, small: Path) -> None:
    plan = planned(tiny_llama, tmp_path, "method=draft_target", f"draft={small}")
    engine = plan.step("engine")
    assert engine.files["speculative/draft"] == str(small)
    # One layer of the model's three, so a quarter of the memory of both caches.
    assert engine.parameters["speculative"] == {
        "method": "draft_target", "draft": "draft", "max_draft_len": 5, "draft_kv_cache_share": 0.25,
    }  # fmt: skip


def test_warnings(tiny_llama: Path, tmp_path: Path) -> None:
    plan = planned(tiny_llama, tmp_path, "method=ngram", runtime__device="cuda", runtime__max_num_tokens="16")
    assert any("on a GPU drafts are verified on the general path" in warning for warning in plan.warnings)
    assert any("a full batch would verify 40 tokens in a step" in warning for warning in plan.warnings)


REFUSED = [
    (["method=lookahead"], "speculative.method: lookahead: the embedded engine has no such method; use ngram, "),
    (["method=ngram", "draft=x"], "speculative.draft: x: ngram has none; remove it"),
    (["method=ngram", "choices=[[0]]"], "speculative.choices: ((0,),): ngram has none; remove it"),
    (["max_draft_len=3"], "speculative.max_draft_len: 3: of no use without a speculative.method; remove it"),
    (["method=eagle3"], "speculative.draft: is missing, and eagle3 needs a draft that was trained for the model; name"),
    (["method=draft_target"], "speculative.draft: is missing, and draft_target needs a draft model; name its direct"),
    (["method=ngram", "max_draft_len=600"],
     "speculative.max_draft_len: 600: a request has at most 512 tokens (runtime.max_seq_len), its prompt's first"),
    (["method=ngram", "draft_len_schedule={1: 9}"], "draft_len_schedule: has 9 for 1 request, and max_draft_len is 4"),
    (["method=ngram", "draft_len_schedule={1: 4, 8: 5}"], "draft_len_schedule.8: 5 is more than max_draft_len 4"),
    (["method=ngram", "draft_len_schedule={1: 4}", "max_concurrency=3"],
     "speculative.max_concurrency: 3: draft_len_schedule says from how many requests on nothing is drafted"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "sentence"), REFUSED, ids=lambda value: str(value)[:40])
def test_refusals(tiny_llama: Path, tmp_path: Path, asked: list[str], sentence: str) -> None:
    with pytest.raises(CompatibilityError) as caught:
        planned(tiny_llama, tmp_path, *asked)
    assert sentence in str(caught.value)


def test_a_draft_longer_than_a_step(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CompatibilityError) as caught:
        planned(tiny_llama, tmp_path, "method=ngram", "max_draft_len=16", runtime__max_num_tokens="16")
    sentence = "max_draft_len: 16: with the token before it a draft is longer than a step (runtime.max_num_tokens 16)"
    assert sentence in str(caught.value)


def test_drafts_that_do_not_fit(tiny_llama: Path, tmp_path: Path, small: Path) -> None:
    def refusal(draft: Path) -> str:
        with pytest.raises(CompatibilityError) as caught:
            planned(tiny_llama, tmp_path, "method=draft_target", f"draft={draft}")
        return str(caught.value)

    def changed(name: str, **changes: object) -> Path:
        shutil.copytree(small, tmp_path / name)
        edit_config(tmp_path / name, **changes)
        return tmp_path / name

    assert "parameters, no fewer than the model's" in refusal(tiny_llama)
    short = changed("short", max_position_embeddings=128)
    assert "knows 128 positions, and runtime.max_seq_len is 512" in refusal(short)
    mamba = changed("mamba", model_type="mamba", architectures=["MambaForCausalLM"])
    assert "MambaForCausalLM (mamba): " in refusal(mamba)
    tokenizer = changed("other") / "tokenizer.json"
    document = json.loads(tokenizer.read_text(encoding="utf-8"))
    names = sorted(document["model"]["vocab"], key=document["model"]["vocab"].__getitem__)
    document["model"]["vocab"] |= {names[40]: 41, names[41]: 40}
    tokenizer.write_text(json.dumps(document), encoding="utf-8")
    assert "has another tokenizer than the model: 2 of 320 tokens differ" in refusal(tmp_path / "other")


def refused(model: Path, tmp_path: Path, *asked: str) -> str:
    with pytest.raises(CompatibilityError) as caught:
        planned(model, tmp_path, *asked)
    return str(caught.value)


def medusa_export(path: Path, heads: int = 2, hidden: int = 64) -> Path:
    """A model with heads as ModelOpt exports it, of which nothing but the heads is read."""
    tensors = {"model.norm.weight": ("BF16", [hidden])}
    for head in range(heads):
        tensors |= {
            f"medusa_heads.{head}.0.linear.weight": ("BF16", [hidden, hidden]),
            f"medusa_heads.{head}.0.linear.bias": ("BF16", [hidden]),
            f"medusa_heads.{head}.1.weight": ("BF16", [320, hidden]),
        }
    config = {
        "architectures": ["MedusaLlamaForCausalLM"],
        "medusa": {"num_medusa_heads": heads, "num_medusa_layers": 1},
    }
    return save_eagle3(path, config, tensors)


def test_medusa_heads(tiny_llama: Path, tmp_path: Path) -> None:
    draft = medusa_export(tmp_path / "heads")
    asked = ("method=medusa", f"draft={draft}")
    plain = {"method": "medusa", "draft": "draft", "max_draft_len": 2}
    assert planned(tiny_llama, tmp_path, *asked).step("engine").parameters["speculative"] == plain
    plan = planned(tiny_llama, tmp_path, *asked, "choices=[[0], [1], [0, 2]]")
    said = plan.step("engine").parameters["speculative"]
    assert said == plain | {"choices": [[0], [1], [0, 2]]}
    section = SpeculativeConfig.of(json.loads(json.dumps(said)))
    assert section.choices == ((0,), (1,), (0, 2))
    assert "max_draft_len: 3: the draft has 2 heads" in refused(tiny_llama, tmp_path, *asked, "max_draft_len=3")
    for choices, sentence in (
        ("[[0], [1, 0]]", "[1, 0] goes on from [1], which is no path: this is no tree; name every path"),
        ("[[0], [0, 0], [0, 0, 0]]", "[0, 0, 0] is 3 tokens long, and there are 2 heads"),
        ("[[0], [0]]", "names a path twice"),
    ):
        assert sentence in refused(tiny_llama, tmp_path, *asked, f"choices={choices}")
    other = refused(tiny_llama, tmp_path, *asked, "choices=[[0]]", "max_draft_len=2")
    assert "choices: the longest path has 1 tokens, and max_draft_len is 2; remove max_draft_len" in other
    narrow = medusa_export(tmp_path / "narrow", hidden=32)
    sentence = "speculative.draft: read hidden states of 32, and the model's hidden_size is 64"
    assert sentence in refused(tiny_llama, tmp_path, "method=medusa", f"draft={narrow}")
    with pytest.raises(ArtifactError, match="config.json does not say how many Medusa heads there are"):
        planned(tiny_llama, tmp_path, "method=medusa", f"draft={tiny_llama}")


def test_an_eagle3_draft(tiny_llama: Path, tmp_path: Path) -> None:
    draft = save_eagle3(tmp_path / "draft")
    plan = planned(tiny_llama, tmp_path, "method=eagle3", f"draft={draft}")
    assert plan.step("engine").parameters["speculative"] == {"method": "eagle3", "draft": "draft", "max_draft_len": 3}
    for name, changes, sentence in (
        (
            "layers",
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 5]}},
            "reads layer 5, and the model has 3",
        ),
        ("none", {"eagle_config": {}}, "does not say which layers of the model it reads"),
        ("wide", {"target_hidden_size": 128}, "reads hidden states of 128, and the model's hidden_size is 64"),
        ("short", {"max_position_embeddings": 64}, "knows 64 positions, and runtime.max_seq_len is 512"),
        ("fc", {"fc_norm": True}, "has fc_norm in its config, which the embedded engine does not compute"),
    ):
        other = save_eagle3(tmp_path / name, eagle3_config(**changes))
        assert sentence in refused(tiny_llama, tmp_path, "method=eagle3", f"draft={other}")
