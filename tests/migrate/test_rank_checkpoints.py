"""TensorRT-LLM checkpoints as a source: the config becomes a recipe, the tensors need the original model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from convert.synthetic import plain, quantized
from trtbuild.convert.run import run
from trtbuild.errors import ArtifactError, RecipeError
from trtbuild.migrate.run import Migration, migrate, write_recipe
from trtbuild.pipeline import prepare


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A tiny checkpoint of Transformers with a tokenizer."""
    path = plain(tmp_path_factory.mktemp("original") / "llama", "llama")
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


@pytest.fixture(scope="module")
def ranks(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in FP8 with an FP8 cache, converted for two ranks by the converter of engines."""
    folder = tmp_path_factory.mktemp("ranks")
    source = quantized(original, folder / "unified", "FP8", "FP8")
    request = {"source": str(source), "output": str(folder / "tllm"), "tp_size": 2, "pp_size": 1, "dtype": "auto"}
    run(request, lambda done, total, what: None)
    return folder / "tllm"


def kinds(migration: Migration) -> dict[str, str]:
    return {row.old: row.kind for row in migration.rows if row.old}


@pytest.mark.parametrize("kind", ["trtllm", "trtllm-engine"])
def test_the_config_becomes_a_recipe(ranks: Path, original: Path, tmp_path: Path, kind: str) -> None:
    done = migrate(str(ranks), kind, model=str(original), gpu="H100")  # type: ignore[arg-type]
    assert done.form == "a TensorRT-LLM checkpoint"
    assert done.document["model"]["path"] == str(original)
    assert done.document["compress"] == {"format": "fp8", "kv_cache": "fp8"}
    assert done.document["runtime"]["tensor_parallel_size"] == 2
    assert [row.old for row in done.rows if row.kind == "not recognized"] == []
    lost = {row.old: row for row in done.rows if row.is_loss}
    assert set(lost) == {"tensors"}
    assert (lost["tensors"].old_value, lost["tensors"].where) == ("2 rank files", "tllm")
    assert "cannot be turned back" in done.text
    out = tmp_path / "recipe.yaml"
    write_recipe(done, out)
    plan = prepare(out).plan
    assert (plan.value("compress.format"), plan.value("runtime.tensor_parallel_size")) == ("fp8", 2)


def test_without_the_original_the_recipe_says_which_one(ranks: Path) -> None:
    done = migrate(str(ranks))
    assert done.document["model"]["path"].startswith("/FILL-IN/")
    note = next(note for note in done.notes if "rank files" in note)
    assert "the original one, a LlamaForCausalLM with layers 3, hidden size 128, attention heads 4" in note


def test_another_model_is_refused(ranks: Path, tmp_path: Path) -> None:
    other = plain(tmp_path / "other", "llama", num_hidden_layers=5)
    with pytest.raises(RecipeError) as caught:
        migrate(str(ranks), model=str(other))
    assert "--model: has layers 5 instead of 3, so the rank files were made of another model" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "cannot be read"),
        ("[]", "does not hold a JSON object"),
        ('{"mapping": {}}', "architecture is missing, so it is no configuration of a TensorRT-LLM checkpoint"),
    ],
)
def test_damaged_checkpoints(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "rank0.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ArtifactError) as caught:
        migrate(str(tmp_path))
    assert sentence in str(caught.value)


def test_upstreams_own_keys_have_a_fate(ranks: Path, tmp_path: Path) -> None:
    """The config as upstream's converters of 0.17 to 1.3 write it: more keys, null for what is unset."""
    config = json.loads((ranks / "config.json").read_text())
    config["mapping"] |= {"gpus_per_node": 8, "enable_attention_dp": False, "moe_cluster_size": 1}
    config["quantization"] |= {"smoothquant_val": 0.5, "clamp_val": None, "use_meta_recipe": False}
    config |= {"runtime_defaults": None, "disable_weight_only_quant_plugin": False, "version": "0.17.0"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = migrate(str(tmp_path))
    assert [row.old for row in done.rows if row.kind == "not recognized"] == []
    assert {"clamp_val"} <= {one.name.rpartition(".")[2] for one in done.unset}
    assert kinds(done)["mapping.tp_size"] == "renamed"
