"""Packages for the LLM API that draft: built whole, read back, and verified."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from drafts import eagle3_tensors, save_eagle3
from tiny import save_checkpoint
from trtbuild.adapters import trtllm_draft
from trtbuild.adapters.trtllm_checkpoint import Layout
from trtbuild.checkpoint_files import LocalFiles
from trtbuild.model import read_tensors
from trtbuild.verification import verify_trtllm
from trtbuild.yaml_text import parse_yaml

Cli = Callable[..., subprocess.CompletedProcess[str]]
GATE = ("--set", "quality.max_perplexity_ratio=10.0")


@pytest.fixture(scope="module")
def plain_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, store: Path) -> Path:
    path = tmp_path_factory.mktemp("drafting") / "recipe.yaml"
    path.write_text(
        f"schema_version: 1\nmodel: {{path: {tiny_llama}}}\nruntime: {{kind: trtllm, max_seq_len: 256}}\n"
        f"store: {store}\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def eagle3_package(plain_recipe: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft as ModelOpt exports it, whose decoder layer has another name than older releases know."""
    folder = tmp_path_factory.mktemp("eagle3")
    draft = save_eagle3(folder / "given", tensors=eagle3_tensors("layers.0"))
    options = [item for one in ("method=eagle3", f"draft={draft}") for item in ("--set", f"speculative.{one}")]
    cli("build", plain_recipe, "-o", folder / "package", *options, *GATE)
    return folder / "package"


def test_an_eagle3_package(eagle3_package: Path, cli: Cli) -> None:
    arguments = parse_yaml((eagle3_package / "engine" / "llm_args.yaml").read_text(encoding="utf-8"))
    assert arguments["speculative_config"] == {
        "decoding_type": "Eagle",
        "max_draft_len": 3,
        "eagle3_layers_to_capture": [0, 1, 2],
        "allow_advanced_sampling": True,
        "speculative_model": "draft",
    }
    engine = json.loads((eagle3_package / "engine" / "engine.json").read_text(encoding="utf-8"))
    assert engine["speculation"] == {"method": "eagle3", "draft": "draft"}
    lines = cli("verify", eagle3_package).stdout.splitlines()
    assert "passed  draft: EAGLE-3: 14 tensors, 96 tokens, reads 3 layers" in lines
    assert all(line.startswith("passed") for line in lines), lines


def test_its_layers_have_the_names_of_every_release(eagle3_package: Path) -> None:
    files = LocalFiles(eagle3_package / "engine" / "draft")
    tensors = {tensor.name: tensor for tensor in read_tensors(files)}
    assert {name: [tensor.dtype, list(tensor.shape)] for name, tensor in tensors.items()} == {
        name: list(entry) for name, entry in eagle3_tensors().items()
    }
    for name, first in (("midlayer.mlp.up_proj.weight", b"l"), ("fc.weight", b"f"), ("d2t", b"d")):
        tensor = tensors[name]
        assert files.read(tensor.shard, tensor.begin, tensor.bytes) == first * tensor.bytes


def test_verify_finds_a_draft_that_was_changed(eagle3_package: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(eagle3_package, package)
    config = package / "engine" / "draft" / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"vocab_size": 320', '"vocab_size": 319'))
    found = {check.name: check.problems for check in verify_trtllm(package)}
    assert found["draft: EAGLE-3"] == ("has the target's vocab_size 319, and the model's vocab_size is 320",)
    config.unlink()
    found = {check.name: check.problems for check in verify_trtllm(package)}
    assert found["LLM arguments"] == ("speculative_config: draft holds no draft model; build the package again",)
    arguments = package / "engine" / "llm_args.yaml"
    text = arguments.read_text(encoding="utf-8")
    arguments.write_text(text.replace('speculative_model: "draft"', 'speculative_model: "elsewhere"'))
    found = {check.name: check.problems for check in verify_trtllm(package)}
    assert "the draft is elsewhere in llm_args.yaml, draft in engine.json" in found["LLM arguments"][0]


def test_an_ngram_package(plain_recipe: Path, cli: Cli, tmp_path: Path) -> None:
    options = ("--set", "speculative.method=ngram", "--set", "speculative.draft_len_schedule={1: 4, 8: 0}")
    cli("build", plain_recipe, "-o", tmp_path / "package", *options, *GATE)
    text = (tmp_path / "package" / "engine" / "llm_args.yaml").read_text(encoding="utf-8")
    assert parse_yaml(text)["speculative_config"]["draft_len_schedule"] == {1: 4, 8: 0}
    assert not (tmp_path / "package" / "engine" / "draft").exists()
    lines = cli("verify", tmp_path / "package").stdout.splitlines()
    assert all(line.startswith("passed") for line in lines), lines


def test_a_draft_model_in_the_stock_form(plain_recipe: Path, cli: Cli, tmp_path: Path) -> None:
    small = save_checkpoint(tmp_path / "small", overrides={"num_hidden_layers": 1})
    options = [
        *("--set", "speculative.method=draft_target", "--set", f"speculative.draft={small}"),
        *("--set", "serving.model_py=upstream"),
    ]
    package = tmp_path / "package"
    cli("build", plain_recipe, "-o", package, *options, *GATE)
    drafted = {path.name for path in (package / "engine" / "draft").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= drafted
    text = (package / "model_repository" / "tensorrt_llm" / "1" / "model.yaml").read_text(encoding="utf-8")
    served = parse_yaml(text)
    assert served["speculative_config"]["speculative_model"] == f"{served['model']}/draft"
    lines = cli("verify", package).stdout.splitlines()
    assert any(line.startswith("passed  draft: tokenizer") for line in lines)
    assert all(line.startswith("passed") for line in lines), lines
    first = cli("check", plain_recipe, *options).returncode
    assert first == 0
    tokenizer = small / "tokenizer.json"
    document = json.loads(tokenizer.read_text(encoding="utf-8"))
    vocabulary = document["model"]["vocab"]
    one, other = list(vocabulary)[10:12]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    tokenizer.write_text(json.dumps(document), encoding="utf-8")
    assert "has another tokenizer than the model: 2 of" in cli("check", plain_recipe, *options, check=3).stderr


def test_layers_that_predict_further_tokens(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model", tokenizer=False)
    asked = {"method": "mtp", "config": {"decoding_type": "MTP"}}
    (found,) = trtllm_draft.check(None, model, asked, "1.2.1", Layout())
    assert found.problems == (
        "config.json names 0 layers that predict further tokens, and no tensor is in model.layers.3.",
    )
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}))
    (found,) = trtllm_draft.check(None, model, asked, "1.2.1", Layout())
    assert (found.problems, found.detail) == ((), "9 tensors in model.layers.2")
    assert trtllm_draft.check(None, model, asked | {"method": "ngram"}, "1.2.1", Layout()) == []


def test_the_draft_is_part_of_the_engine_s_key(plain_recipe: Path, cli: Cli, tmp_path: Path) -> None:
    changes = ("speculative.method=eagle3", f"speculative.draft={tmp_path}/draft")
    options = ["--until", "engine", *(item for change in changes for item in ("--set", change))]
    save_eagle3(tmp_path / "draft")
    first = cli("build", plain_recipe, *options).stdout
    assert cli("build", plain_recipe, *options).stdout == first
    weights = tmp_path / "draft" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert cli("build", plain_recipe, *options).stdout != first
