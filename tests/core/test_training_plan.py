"""Training of heads and drafts in the plan: values, the step, what is refused, and drafts of other models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from core.test_model import edit_config
from drafts import eagle3_config, save_eagle3, save_medusa
from trtbuild.checkpoint_files import LocalFiles
from trtbuild.draft_checks import refuse_other_weights
from trtbuild.errors import ArtifactError, CompatibilityError, RecipeError, TrtbuildError
from trtbuild.manifest import FileEntry, canonical_json
from trtbuild.medusa_draft import MedusaHeads, one_path, read_medusa, tree_problems
from trtbuild.model import read_facts
from trtbuild.pipeline import Prepared, prepare
from trtbuild.plan import Plan, step_key
from trtbuild.planned_draft import planned_draft, usual_captured
from trtbuild.source import missing_files
from trtbuild.trained_for import RECORD, TrainedFor, read_record, record_json, tokenizer_digest, weights_digest

LLM = "runtime: {kind: trtllm, max_seq_len: 256}\n"
ENGINE = "target: {gpu: H100}\nruntime: {kind: trtllm-engine, max_seq_len: 256}\nserving: {layout: ensemble}\n"
EAGLE3, MEDUSA = ("speculative.method=eagle3",), ("speculative.method=medusa",)
PROMPTS = "speculative.train.prompts=prompts.txt"


def prepared(checkpoint: Path, place: Path, runtime: str, *overrides: str) -> Prepared:
    (place / "prompts.txt").write_text("one prompt\nanother prompt\n")
    recipe = place / "recipe.yaml"
    recipe.write_text(f"schema_version: 1\nmodel: {{path: {checkpoint}}}\n{runtime}")
    return prepare(recipe, overrides)


def planned(checkpoint: Path, place: Path, runtime: str, *overrides: str) -> Plan:
    return prepared(checkpoint, place, runtime, *overrides).plan


def test_a_draft_of_eagle3_is_planned(tiny_llama: Path, tmp_path: Path) -> None:
    plan = planned(tiny_llama, tmp_path, LLM, *EAGLE3, PROMPTS, "speculative.train.draft_vocab_size=96")
    assert [step.kind for step in plan.steps][:4] == ["fetch", "compress", "draft", "engine"]
    draft, engine = plan.step("draft"), plan.step("engine")
    assert (draft.inputs, engine.inputs, engine.files) == (("fetch", "compress"), ("compress", "draft"), {})
    assert draft.files == {"prompts": "prompts.txt"}
    assert draft.parameters == {
        "method": "eagle3", "format": "none", "trust_remote_code": False, "captured": [0, 1], "column": None,
        "samples": 128, "held_out": 0.1, "max_seq_len": 256, "max_answer_tokens": 128, "epochs": 3, "batch_size": 4,
        "learning_rate": 5e-4, "num_layers": 1, "ttt_steps": 3, "draft_vocab_size": 96, "seed": 0, "device": "auto",
    }  # fmt: skip
    assert engine.parameters["speculation"]["config"]["eagle3_layers_to_capture"] == [0, 1]
    assert engine.parameters["speculation"]["draft_argument"] == "speculative_model"


def test_heads_of_medusa_are_planned(tiny_llama: Path, tmp_path: Path) -> None:
    plan = planned(tiny_llama, tmp_path, ENGINE, *MEDUSA, PROMPTS, "speculative.train.num_heads=2")
    parameters = plan.step("draft").parameters
    assert (parameters["num_heads"], parameters["learning_rate"], parameters["captured"]) == (2, 1e-3, None)
    engine = plan.step("engine").parameters
    assert engine["medusa"] == {"num_heads": 2, "num_layers": 1, "max_draft_len": 2}
    assert engine["spec"]["architecture"] == "MedusaForCausalLM"
    assert engine["dtype"] == "bfloat16"
    more = plan.step("repository").parameters["engine"]["more"]
    assert (more["decoding_mode"], more["medusa_choices"]) == ("medusa", [[0], [0, 0]])
    tree = "speculative.choices=[[0], [1], [0, 0], [0, 1]]"
    plan = planned(tiny_llama, tmp_path, ENGINE, *MEDUSA, PROMPTS, "speculative.train.num_heads=2", tree)
    assert plan.value("speculative.max_draft_len") == plan.step("engine").parameters["medusa"]["max_draft_len"] == 4
    assert not any("quality is measured" in warning for warning in plan.warnings)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("eagle3", ["samples=64"]), ("eagle3", ["held_out=0.2"]), ("eagle3", ["max_seq_len=128"]),
        ("eagle3", ["max_answer_tokens=64"]), ("eagle3", ["epochs=4"]), ("eagle3", ["batch_size=2"]),
        ("eagle3", ["learning_rate=0.01"]), ("eagle3", ["num_layers=2"]), ("eagle3", ["ttt_steps=2"]),
        ("eagle3", ["draft_vocab_size=64"]), ("eagle3", ["seed=1"]), ("eagle3", ["column=text"]),
        ("medusa", ["num_heads=4"]), ("medusa", ["num_layers=2"]),
    ],
)  # fmt: skip
def test_every_field_is_part_of_the_step_s_key(
    tiny_llama: Path, tmp_path: Path, method: str, changes: list[str]
) -> None:
    def key(*overrides: str) -> str:
        given = (f"speculative.method={method}", PROMPTS, *(f"speculative.train.{one}" for one in overrides))
        step = planned(tiny_llama, tmp_path, LLM if method == "eagle3" else ENGINE, *given).step("draft")
        return step_key(step, dict.fromkeys(step.inputs, "digest"), dict.fromkeys(step.files, "digest"))

    assert key() == key()
    assert key(*changes) != key()


def test_the_captured_layers_the_prompts_and_the_target_are_part_of_it_too(tiny_llama: Path, tmp_path: Path) -> None:
    step = planned(tiny_llama, tmp_path, LLM, *EAGLE3, PROMPTS).step("draft")
    other = planned(
        tiny_llama, tmp_path, LLM, *EAGLE3, PROMPTS, "speculative.eagle3_layers_to_capture=[0, 2]"
    ).step("draft")  # fmt: skip
    inputs, files = {"fetch": "f", "compress": "c"}, {"prompts": "p"}
    keys = {
        step_key(step, inputs, files), step_key(other, inputs, files),
        step_key(step, inputs | {"fetch": "other"}, files), step_key(step, inputs | {"compress": "other"}, files),
        step_key(step, inputs, {"prompts": "other"}),
    }  # fmt: skip
    assert len(keys) == 5


@pytest.mark.parametrize(
    ("runtime", "overrides", "sentence"),
    [
        (LLM, ["speculative.method=ngram", PROMPTS], "speculative.train: ngram: it has no heads; use medusa or eagle3"),
        (LLM, [PROMPTS], "speculative.train: none: without a speculative.method nothing is trained"),
        (LLM, [*EAGLE3, PROMPTS, "speculative.draft=prompts.txt"], "speculative.draft: is given, and speculative.tr"),
        (LLM, [*EAGLE3, "speculative.train.epochs=2"], "speculative.train.prompts: is required"),
        (LLM, [*EAGLE3, "speculative.train.prompts=nowhere.txt"], "speculative.train.prompts: .* does not exist; name"),
        (LLM, [*EAGLE3, PROMPTS, "speculative.train.num_heads=2"], "num_heads: is for medusa, and the method is eag"),
        (ENGINE, [*MEDUSA, PROMPTS, "speculative.train.ttt_steps=2"], "ttt_steps: is for eagle3, and the method is"),
        (
            ENGINE, [*MEDUSA, PROMPTS, "speculative.train.draft_vocab_size=9"],
            "draft_vocab_size: is for eagle3, and the method is medusa",
        ),
        (LLM, [*EAGLE3, PROMPTS, "speculative.train.max_seq_len=513"], "513 is more than the model's context of 512"),
        (LLM, [*EAGLE3, PROMPTS, "speculative.train.max_answer_tokens=256"], "256 leaves no room for a prompt in max"),
        (LLM, [*EAGLE3, PROMPTS, "speculative.train.draft_vocab_size=321"], "321 is more than the model's vocabulary"),
        (LLM, [*EAGLE3, PROMPTS, "speculative.eagle3_layers_to_capture=[1]"], r"\[1\]: a draft is trained on two lay"),
        (LLM, [*EAGLE3, PROMPTS, "speculative.eagle3_layers_to_capture=[0, 3]"], "3: the model has 3 layers"),
        (LLM, [*EAGLE3, PROMPTS, "speculative.train.learning_rate=0"], "learning_rate: 0 must be greater than 0"),
        (LLM, [*EAGLE3, PROMPTS, "speculative.train.samples=1"], "samples: 1 must be"),
        (LLM, [*EAGLE3, PROMPTS, "speculative.train.held_out=1.0"], "held_out: 1.0 must be"),
        (LLM, [*EAGLE3, PROMPTS, "speculative.train.epoch=3"], "epoch: unknown field; did you mean epochs"),
        (LLM, [*MEDUSA, PROMPTS], "medusa: the LLM API of TensorRT-LLM .* has no such method"),
        (ENGINE, [*EAGLE3, PROMPTS], "eagle3: trtllm-build has no such mode"),
        (
            ENGINE, [*MEDUSA, PROMPTS, "speculative.choices=[[0], [0, 1, 0]]"],
            r"\[0, 1, 0\] goes on from \[0, 1\], which is no path: this is no tree",
        ),
        (ENGINE, [*MEDUSA], "speculative.draft: is missing, and medusa needs"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_training(
    tiny_llama: Path, tmp_path: Path, runtime: str, overrides: list[str], sentence: str
) -> None:
    with pytest.raises(TrtbuildError, match=sentence):
        planned(tiny_llama, tmp_path, runtime, *overrides)


def test_an_empty_file_of_prompts(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(RecipeError, match=r"speculative.train.prompts: .*empty.jsonl is empty; name a file that ends"):
        planned(tiny_llama, tmp_path, LLM, *EAGLE3, "speculative.train.prompts=empty.jsonl")
    loaded = prepared(tiny_llama, tmp_path, LLM, *EAGLE3, PROMPTS)
    assert missing_files(loaded.loaded, loaded.plan.steps) == []


def test_models_that_no_draft_is_trained_for(tiny_llama: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_llama, tmp_path / "gemma"))
    edit_config(other, architectures=["GemmaForCausalLM"], model_type="gemma")
    with pytest.raises(TrtbuildError, match="speculative.train: GemmaForCausalLM: drafts are trained for LlamaForCau"):
        planned(other, tmp_path, LLM, *EAGLE3, PROMPTS)


def test_what_is_planned_is_what_is_captured(tiny_llama: Path, tmp_path: Path) -> None:
    assert usual_captured(32) == (1, 15, 28)
    assert [usual_captured(layers) for layers in (1, 2, 3, 6)] == [(0,), (0, 1), (0, 1), (1, 2)]
    loaded = prepared(tiny_llama, tmp_path, LLM, *EAGLE3, PROMPTS).loaded
    draft = planned_draft(loaded.recipe.speculative, read_facts(LocalFiles(tiny_llama)))
    assert draft is not None
    assert draft.eagle3 is not None
    assert draft.eagle3.shapes["fc.weight"] == (64, 128)
    assert "d2t" not in draft.eagle3.shapes


def record(tiny_llama: Path, **changes: Any) -> TrainedFor:
    fields: dict[str, Any] = {
        "method": "eagle3", "weights": "a" * 64, "tokenizer": tokenizer_digest(tiny_llama), "hidden_size": 64,
        "vocab_size": 320, "num_layers": 3, "captured": (0, 1, 2), "format": "none",
    }  # fmt: skip
    return TrainedFor(**fields | changes)


def drafted(tiny_llama: Path, tmp_path: Path, **changes: Any) -> Prepared:
    """A plan with a draft of the user's that was trained for a model."""
    directory = save_eagle3(tmp_path / "draft", eagle3_config())
    (directory / RECORD).write_text(canonical_json(record_json(record(tiny_llama, **changes))))
    return prepared(tiny_llama, tmp_path, LLM, *EAGLE3, "speculative.draft=draft")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": 128}, "was trained for a hidden_size of 128, and it is 64 here; train a draft for this model"),
        ({"vocab_size": 500}, "was trained for a vocab_size of 500, and it is 320 here"),
        ({"num_layers": 4}, "was trained for a number of layers of 4, and it is 3 here"),
        ({"method": "medusa"}, "was trained for the method medusa, and it is eagle3 here"),
        ({"tokenizer": "b" * 64}, "was trained for a model with another tokenizer: its token ids mean other words"),
    ],
)
def test_a_draft_of_another_model_is_refused_by_its_record(
    tiny_llama: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(CompatibilityError, match=sentence):
        drafted(tiny_llama, tmp_path, **changes)


def test_a_draft_of_another_model_of_the_same_sizes_is_refused_by_its_digest(tiny_llama: Path, tmp_path: Path) -> None:
    files = [FileEntry("model.safetensors", 7, "c" * 64), FileEntry("config.json", 5, "d" * 64)]
    ours = drafted(tiny_llama, tmp_path, weights=weights_digest(files))
    refuse_other_weights(ours.plan, ours.loaded, files)
    refuse_other_weights(ours.plan, ours.loaded, [FileEntry("renamed.safetensors", 7, "c" * 64)])
    with pytest.raises(CompatibilityError, match=r"was trained for another model of the same sizes \(weights "):
        refuse_other_weights(ours.plan, ours.loaded, [FileEntry("model.safetensors", 7, "e" * 64)])
    for damaged in ({}, record_json(record(tiny_llama)) | {"weights": 5}):
        (tmp_path / "draft" / RECORD).write_text(canonical_json(damaged))
        with pytest.raises(ArtifactError, match=r"says not for which model the draft was trained; train it again"):
            read_record(tmp_path / "draft")
    (tmp_path / "draft" / RECORD).unlink()
    refuse_other_weights(ours.plan, ours.loaded, [])  # a draft that trtbuild has not trained


def test_heads_from_a_directory_go_the_same_way(tiny_llama: Path, tmp_path: Path) -> None:
    save_medusa(tmp_path / "heads", heads=2)
    given = (*MEDUSA, "speculative.draft=heads")
    plan = planned(tiny_llama, tmp_path, ENGINE, *given)
    assert plan.step("engine").files == {"speculative/medusa": "heads"}
    assert plan.step("engine").inputs == ("compress",)
    assert plan.step("engine").parameters["medusa"] == {"num_heads": 2, "num_layers": 1, "max_draft_len": 2}
    assert read_medusa(LocalFiles(tmp_path / "heads")) == MedusaHeads(
        num_heads=2, num_layers=1, hidden_size=64, vocab_size=320
    )
    save_medusa(tmp_path / "wide", heads=2, hidden=96)
    with pytest.raises(CompatibilityError, match="read hidden states of 96, and the model's hidden_size is 64"):
        planned(tiny_llama, tmp_path, ENGINE, *MEDUSA, "speculative.draft=wide")
    other = Path(shutil.copytree(tiny_llama, tmp_path / "phi"))
    edit_config(other, architectures=["Qwen3ForCausalLM"], model_type="qwen3")
    with pytest.raises(
        TrtbuildError, match="TensorRT-LLM has Medusa for LlamaForCausalLM, MistralForCausalLM, Qwen2For"
    ):
        planned(other, tmp_path, ENGINE, *given)


def test_damaged_heads(tmp_path: Path) -> None:
    place = save_medusa(tmp_path / "heads", heads=2)
    config = json.loads((place / "config.json").read_text())
    for changes, sentence in (
        ({"medusa_num_heads": 0}, "has no positive medusa_num_heads and medusa_num_layers"),
        ({"medusa_num_layers": 2}, r"lacks the matrix 0.2.weight of the first head"),
        ({"medusa_num_heads": 3}, r"lacks the tensor 2.0.linear.weight; lacks the tensor 2.0.linear.bias"),
    ):
        (place / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ArtifactError, match=sentence):
            read_medusa(LocalFiles(place))
    save_medusa(place, heads=2, bias=32)
    with pytest.raises(ArtifactError, match=r"0.0.linear.bias is BF16 \[32\], not a float of \[64\]"):
        read_medusa(LocalFiles(place))


def test_trees() -> None:
    assert one_path(3) == ((0,), (0, 0), (0, 0, 0))
    assert tree_problems(one_path(3), 3) == []
    assert tree_problems([[0, 0], [0]], 2) == []
    assert tree_problems([[0], []], 2) == ["holds an empty path"]
    assert tree_problems([[0], [0]], 2) == ["names a path twice"]
    assert tree_problems([[0], [0, 0], [0, 0, 0]], 2) == ["[0, 0, 0] is 3 tokens long, and there are 2 heads"]
