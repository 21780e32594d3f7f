"""Speculation with TensorRT engines: two engines of a draft-target pair, checkpoints with heads, lookahead decoding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from core.test_model import edit_config
from core.test_trtllm_engine_plan import RUNTIME, flags
from trtbuild.console import plan_text
from trtbuild.draft import other_tokens, read_draft
from trtbuild.errors import ArtifactError, CompatibilityError, RecipeError, TrtbuildError
from trtbuild.pipeline import prepare
from trtbuild.plan import Plan
from trtbuild.trtllm_build import built_limits, spec_from_json

TARGET = ("speculative.method=draft_target", "speculative.draft=draft")


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller Llama with the same tokenizer."""
    from tiny import save_checkpoint

    root = tmp_path_factory.mktemp("draft")
    return save_checkpoint(root / "draft", seed=1, overrides={"num_hidden_layers": 1, "num_key_value_heads": 4})


def planned(checkpoint: Path, place: Path, *overrides: str, draft: Path | None = None) -> Plan:
    recipe = place / "recipe.yaml"
    recipe.write_text(f"schema_version: 1\nmodel: {{path: {checkpoint}}}\n{RUNTIME}")
    if draft is not None and not (place / "draft").exists():
        (place / "draft").symlink_to(draft)
    return prepare(recipe, overrides).plan


def test_two_engines_are_planned(tiny_llama: Path, draft: Path, tmp_path: Path) -> None:
    plan = planned(tiny_llama, tmp_path, *TARGET, "speculative.max_draft_len=4", draft=draft)
    assert flags(plan)["speculative_decoding_mode"] == "draft_tokens_external"
    assert (flags(plan)["max_draft_len"], flags(plan)["max_input_len"]) == ("4", "511")
    assert flags(plan)["use_paged_context_fmha"] == "enable"
    engine = json.loads(json.dumps(dict(plan.step("engine").parameters)))
    assert plan.step("engine").files == {"speculative/draft": "draft"}
    target, other = spec_from_json(engine["spec"]), spec_from_json(engine["draft"]["spec"])
    assert built_limits(target)["max_seq_len"] == 512 + 4
    assert (other.speculation, other.limits.max_seq_len, other.limits.max_input_len) == (None, 512, 511)
    arguments = engine["draft"]["arguments"]
    assert "--speculative_decoding_mode" not in arguments
    assert arguments[arguments.index("--use_paged_context_fmha") + 1] == "enable"
    shown = plan_text(plan).partition("trtllm-build of the draft model")[2].partition("what runs where")[0]
    assert "--max_input_len" in shown
    assert "speculative" not in shown
    assert [row["flag"] for row in plan.to_json()["draft_arguments"]] == [row.flag for row in plan.draft_arguments]
    table = {row.what: [str(cell) for cell in row.cells] for row in plan.comparison.rows}  # type: ignore[union-attr]
    assert table["speculation draft_target"][0] == "available: draft_tokens_external"


def test_the_memory_is_divided_by_bytes_a_token(tiny_llama: Path, draft: Path, tmp_path: Path) -> None:
    plan = planned(tiny_llama, tmp_path, *TARGET, "runtime.kv_cache.free_gpu_memory_fraction=0.8", draft=draft)
    # 3 layers with 2 heads and 1 layer with 4: 6 to 4.
    assert plan.value("speculative.draft_kv_cache_share") == 0.4
    repository = plan.step("repository").parameters
    shares = [repository[name]["runtime"]["kv_cache"]["free_gpu_memory_fraction"] for name in ("engine", "draft")]
    assert shares == [0.48, 0.32]
    assert repository["draft"]["gpt_model_path"] == "/package/engine/draft/built"
    assert repository["draft_tokens"] == 5
    chosen = planned(tiny_llama, tmp_path, *TARGET, "speculative.draft_kv_cache_share=0.25", draft=draft)
    engine = chosen.step("repository").parameters["engine"]["runtime"]
    assert engine["kv_cache"]["free_gpu_memory_fraction"] == 0.675


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["runtime.pipeline_parallel_size=3"], "speculative decoding does not run with pipeline_parallel_size 3"),
        (["runtime.kv_cache.enable_block_reuse=false"], "false: every round of drafts would compute the whole prompt"),
        (["compress.kv_cache=fp8"], "fp8 without FP8 weights: trtllm-build turns attention over a paged context off"),
        (["speculative.choices=[[0]]"], "speculative.choices: ((0,),): draft_target has none; remove it"),
        (["speculative.method=lookahead"], "speculative.draft: draft: lookahead has none; remove it"),
        (["model.adapters=[a]"], "upstream says of speculation with LoRA adapters that it is untested"),
    ],
)
def test_what_does_not_go_with_a_draft(
    tiny_llama: Path, draft: Path, tmp_path: Path, overrides: list[str], sentence: str
) -> None:
    with pytest.raises(TrtbuildError) as caught:
        planned(tiny_llama, tmp_path, *TARGET, *overrides, draft=draft)
    assert sentence in str(caught.value)


def altered(draft: Path, tmp_path: Path, **config: Any) -> Path:
    made = Path(shutil.copytree(draft, tmp_path / "other"))
    edit_config(made, **config)
    return made


def test_drafts_that_do_not_fit_the_model(tiny_llama: Path, draft: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], list[str], str]] = [
        (
            {"max_position_embeddings": 256},
            [],
            "knows 256 positions, and runtime.max_seq_len is 512; use runtime.max_se",
        ),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, [], "GPT2LMHeadModel is not among the classes"),
        ({}, ["runtime.tensor_parallel_size=8"], "speculative.draft: cannot be divided over the 8 ranks"),
    ]
    for number, (config, overrides, sentence) in enumerate(cases):
        place = tmp_path / str(number)
        place.mkdir()
        with pytest.raises(CompatibilityError) as caught:
            planned(tiny_llama, place, *TARGET, *overrides, draft=altered(draft, place, **config))
        assert sentence in str(caught.value), sentence
    with pytest.raises(CompatibilityError, match="no fewer than the model's"):
        planned(draft, tmp_path, *TARGET, draft=tiny_llama)
    with pytest.raises(RecipeError, match="speculative.draft: .* does not exist"):
        planned(tiny_llama, tmp_path, TARGET[0], "speculative.draft=nowhere")


def test_token_ids_must_mean_the_same(tiny_llama: Path, draft: Path, tmp_path: Path) -> None:
    other = altered(draft, tmp_path)
    data = json.loads((other / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    one, two = list(vocabulary)[50:52]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(
        CompatibilityError, match=r"another tokenizer than the model: 2 of 320 tokens differ; use a dra"
    ):
        planned(tiny_llama, tmp_path, *TARGET, draft=other)
    assert other_tokens(tiny_llama, draft) is None


def test_another_size_of_vocabulary_is_said(tiny_llama: Path, tmp_path: Path) -> None:
    from tiny import save_checkpoint

    wider = save_checkpoint(tmp_path / "wide", overrides={"num_hidden_layers": 1, "vocab_size": 384})
    plan = planned(tiny_llama, tmp_path, *TARGET, draft=wider)
    assert any("the draft's vocabulary has 384 entries and the model's 320" in warning for warning in plan.warnings)


def test_lookahead(tiny_llama: Path, tmp_path: Path) -> None:
    plan = planned(tiny_llama, tmp_path, "speculative.method=lookahead")
    assert flags(plan)["speculative_decoding_mode"] == "lookahead_decoding"
    assert flags(plan)["max_draft_len"] == "83", "upstream's example for windows, n-grams and sets of 7"
    assert plan.step("repository").parameters["engine"]["more"] == {
        "backend": "tensorrtllm", "decoding_mode": "lookahead", "lookahead_window_size": 7, "lookahead_ngram_size": 7,
        "lookahead_verification_set_size": 7,
    }  # fmt: skip
    small = planned(
        tiny_llama, tmp_path, "speculative.method=lookahead", "speculative.max_window_size=2",
        "speculative.max_ngram_size=2", "speculative.max_verification_set_size=1",
    )  # fmt: skip
    assert flags(small)["max_draft_len"] == "2"
    with pytest.raises(CompatibilityError, match="upstream lists it for bf16, fp16 and FP8 only, not for int4_awq"):
        planned(tiny_llama, tmp_path, "speculative.method=lookahead", "compress.format=int4_awq")


def heads(place: Path, architecture: str, **more: Any) -> Path:
    """A checkpoint as upstream's scripts leave one, for the tiny Llama; its weights are never read."""
    place.mkdir()
    config = {
        "architecture": architecture, "dtype": "float16", "hidden_size": 64, "num_hidden_layers": 3,
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(config | more))
    (place / "rank0.safetensors").write_bytes(b"weights")
    return place


@pytest.mark.parametrize(
    ("method", "architecture", "config", "mode", "decoding", "longest", "seq_len"),
    [
        ("medusa", "MedusaForCausalLM", {"max_draft_len": 63}, "medusa", "medusa", "63", 575),
        ("eagle", "EagleForCausalLM", {"max_draft_len": 31, "num_eagle_layers": 4}, "eagle", "eagle", "31", 547),
        (
            "redrafter", "ReDrafterForLLaMALM", {"redrafter_num_beams": 4, "redrafter_draft_len_per_beam": 5},
            "explicit_draft_tokens", "redrafter", "20", 532,
        ),
    ],
)  # fmt: skip
def test_a_checkpoint_with_heads(
    tiny_llama: Path, tmp_path: Path, method: str, architecture: str, config: dict[str, Any], mode: str, decoding: str,
    longest: str, seq_len: int,
) -> None:  # fmt: skip
    heads(tmp_path / "heads", architecture, **config)
    given = (f"speculative.method={method}", "speculative.draft=heads")
    plan = planned(tiny_llama, tmp_path, *given)
    assert (flags(plan)["speculative_decoding_mode"], flags(plan)["max_draft_len"]) == (mode, longest)
    engine = plan.step("engine")
    assert (engine.parameters["dtype"], engine.files) == ("float16", {"speculative/heads": "heads"})
    spec = spec_from_json(json.loads(json.dumps(engine.parameters["spec"])))
    assert (spec.architecture, built_limits(spec)["max_seq_len"]) == (architecture, seq_len)
    assert plan.step("repository").parameters["engine"]["more"] == {"backend": "tensorrtllm", "decoding_mode": decoding}
    assert any("quality is measured on the checkpoint that trtbuild makes" in warning for warning in plan.warnings)


def test_the_tree_of_drafts(tiny_llama: Path, tmp_path: Path) -> None:
    heads(tmp_path / "heads", "MedusaForCausalLM", max_draft_len=2)
    given = ("speculative.method=medusa", "speculative.draft=heads")
    plan = planned(tiny_llama, tmp_path, *given, "speculative.choices=[[0], [0, 1]]")
    assert plan.step("repository").parameters["engine"]["more"]["medusa_choices"] == [[0], [0, 1]]
    with pytest.raises(CompatibilityError, match="3 paths, and the heads were converted for a max_draft_len of 2"):
        planned(tiny_llama, tmp_path, *given, "speculative.choices=[[0], [1], [2]]")
    with pytest.raises(CompatibilityError, match="holds an empty path"):
        planned(tiny_llama, tmp_path, *given, "speculative.choices=[[]]")


def test_heads_that_do_not_fit_or_are_none(tiny_llama: Path, tmp_path: Path) -> None:
    given = ("speculative.method=medusa", "speculative.draft=heads")
    heads(tmp_path / "heads", "MedusaForCausalLM", max_draft_len=63, num_hidden_layers=5)
    with pytest.raises(CompatibilityError, match="was converted with 5, and the model's number of layers is 3"):
        planned(tiny_llama, tmp_path, *given)
    with pytest.raises(CompatibilityError, match="was converted with 1, and tensor_parallel_size is 2"):
        planned(tiny_llama, tmp_path, *given, "runtime.tensor_parallel_size=2")
    with pytest.raises(CompatibilityError, match="was converted with none, and compress.format is FP8"):
        planned(tiny_llama, tmp_path, *given, "compress.format=fp8")
    with pytest.raises(
        RecipeError, match=r"is a checkpoint of MedusaForCausalLM: this version .* no heads of eagle; c"
    ):
        planned(tiny_llama, tmp_path, "speculative.method=eagle", "speculative.draft=heads")
    with pytest.raises(
        RecipeError, match=r"is no checkpoint in TensorRT-LLM's format: .* examples/medusa/convert_chec"
    ):
        planned(tiny_llama, tmp_path, "speculative.method=medusa", f"speculative.draft={tiny_llama}")
    (tmp_path / "heads" / "rank0.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"rank0.safetensors is missing, and config.json says 1 ranks"):
        read_draft(tmp_path / "heads", "medusa")
    heads(tmp_path / "half", "MedusaForCausalLM")
    with pytest.raises(ArtifactError, match="lacks what a checkpoint with heads says"):
        read_draft(tmp_path / "half", "medusa")
