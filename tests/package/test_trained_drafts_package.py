"""Packages whose draft the build itself trains: built whole, read back, verified, and given to another build."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from tiny import save_checkpoint
from trtbuild.checkpoint_files import LocalFiles
from trtbuild.model import read_tensors
from trtbuild.yaml_text import parse_yaml

Cli = Callable[..., subprocess.CompletedProcess[str]]
GATE = ("--set", "quality.max_perplexity_ratio=10.0")
LLM = "runtime: {kind: trtllm, max_seq_len: 256}\n"
ENGINE = "target: {gpu: H100}\nruntime: {kind: trtllm-engine, max_seq_len: 256, build_in: script}\n"
SMALL = "samples: 12, held_out: 0.25, max_seq_len: 48, max_answer_tokens: 12, epochs: 2"


def recipe_of(place: Path, model: Path, store: Path, runtime: str, speculative: str) -> Path:
    (place / "prompts.txt").write_text("".join(f"question {number} of a model\n" for number in range(12)))
    path = place / "recipe.yaml"
    path.write_text(
        f"schema_version: 1\nmodel: {{path: {model}}}\n{runtime}store: {store}\nspeculative: {{{speculative}}}\n"
    )
    return path


@pytest.fixture(scope="module")
def eagle3_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, store: Path) -> Path:
    train = f"{{prompts: prompts.txt, draft_vocab_size: 128, {SMALL}}}"
    place = tmp_path_factory.mktemp("trained")
    return recipe_of(place, tiny_llama, store, LLM, f"method: eagle3, train: {train}")


@pytest.fixture(scope="module")
def eagle3_package(eagle3_recipe: Path, cli: Cli) -> Path:
    package = eagle3_recipe.parent / "package"
    cli("build", eagle3_recipe, "-o", package, *GATE)
    return package


def test_a_package_with_a_trained_draft(eagle3_package: Path, cli: Cli) -> None:
    arguments = parse_yaml((eagle3_package / "engine" / "llm_args.yaml").read_text(encoding="utf-8"))
    assert arguments["speculative_config"] == {
        "decoding_type": "Eagle",
        "max_draft_len": 3,
        "eagle3_layers_to_capture": [0, 1],
        "allow_advanced_sampling": True,
        "speculative_model": "draft",
    }
    tensors = {tensor.name: tensor.shape for tensor in read_tensors(LocalFiles(eagle3_package / "engine" / "draft"))}
    assert (tensors["midlayer.self_attn.q_proj.weight"], tensors["d2t"]) == ((64, 128), (128,))
    lines = cli("verify", eagle3_package).stdout.splitlines()
    assert "passed  draft: EAGLE-3: 14 tensors, 128 tokens, reads 2 layers" in lines
    assert all(line.startswith("passed") for line in lines), lines


def test_the_evidence_has_the_curve_and_the_acceptance(eagle3_package: Path) -> None:
    training: dict[str, Any] = json.loads((eagle3_package / "evidence" / "training.json").read_text())
    assert training["prompts"] == {"learned": 9, "held_out": 3}
    assert len(training["loss"]) == training["steps"] == 6
    assert {name: len(part["match"]) for name, part in training["acceptance"].items()} == {"held_out": 3, "learned": 3}
    assert training["usage"]["seconds"] > 0
    picture = ET.parse(eagle3_package / "evidence" / "training.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    line = picture.find(f"{space}polyline")
    assert line is not None
    assert len(line.attrib["points"].split()) == 6
    told = [bar.text for bar in picture.iter(f"{space}title")]
    accepted = training["acceptance"]["held_out"]["accepted"][0]
    assert f"held out: accepted, 1 ahead: {accepted:.3f}" in told
    assert len(told) == 3 * 4


def test_a_second_build_trains_nothing(eagle3_recipe: Path, eagle3_package: Path, cli: Cli) -> None:
    again = cli("build", eagle3_recipe, "-o", eagle3_package, *GATE)
    assert "draft" in again.stderr
    assert "built" not in again.stderr
    stopped = cli("build", eagle3_recipe, "--until", "draft").stdout.strip()
    assert (Path(stopped) / "target.json").is_file()
    plain = ("--set", "speculative={method: none}")
    refused = cli("build", eagle3_recipe, "--until", "draft", *plain, check=2).stderr
    assert "--until: draft: this recipe has no such step" in refused


def test_the_embedded_engine_takes_the_same_draft(eagle3_recipe: Path, eagle3_package: Path, cli: Cli) -> None:
    embedded = ("--set", "runtime={kind: embedded, max_seq_len: 256}")
    done = cli("build", eagle3_recipe, "--until", "engine", *embedded)
    engine = Path(done.stdout.strip())
    assert json.loads((engine / "engine.json").read_text())["speculative"] == {
        "method": "eagle3",
        "draft": "draft",
        "max_draft_len": 3,
    }
    files = sorted(path.name for path in (engine / "draft").iterdir())
    assert files == ["config.json", "model.safetensors", "target.json"]
    for name in files:
        assert (engine / "draft" / name).read_bytes() == (eagle3_package / "engine" / "draft" / name).read_bytes()


def test_a_trained_draft_is_for_its_own_target_alone(
    eagle3_package: Path, tiny_llama: Path, store: Path, tmp_path: Path, cli: Cli
) -> None:
    draft = eagle3_package / "engine" / "draft"
    given = f"method: eagle3, draft: {draft}"
    own = recipe_of(tmp_path, tiny_llama, store, LLM, given)
    cli("build", own, "--until", "engine")
    twin = save_checkpoint(tmp_path / "twin", seed=1)
    other = recipe_of(tmp_path, twin, store, LLM, given)
    cli("check", other)  # nothing but the bytes of the weights tells the two apart
    refused = cli("build", other, "--until", "engine", check=3).stderr
    assert "was trained for another model of the same sizes (weights " in refused
    assert "train a draft for this model (speculative.train)" in refused
    deeper = save_checkpoint(tmp_path / "deeper", overrides={"num_hidden_layers": 4})
    refused = cli("check", recipe_of(tmp_path, deeper, store, LLM, given), check=3).stderr
    assert "was trained for a number of layers of 3, and it is 4 here" in refused


def test_prompts_without_a_prompt(tiny_llama: Path, store: Path, tmp_path: Path, cli: Cli) -> None:
    recipe = recipe_of(tmp_path, tiny_llama, store, LLM, "method: eagle3, train: {prompts: prompts.txt}")
    (tmp_path / "prompts.txt").write_text("\n \n")
    refused = cli("build", recipe, "--until", "draft", check=2).stderr
    assert "speculative.train.prompts:" in refused
    assert "holds no prompt; give a file with prompts like those that will be served" in refused


def test_an_engine_with_trained_heads(tiny_llama: Path, store: Path, tmp_path: Path, cli: Cli) -> None:
    train = f"{{prompts: prompts.txt, num_heads: 2, {SMALL}}}"
    parallel = ENGINE.replace("runtime: {", "runtime: {tensor_parallel_size: 2, ") + "serving: {layout: ensemble}\n"
    recipe = recipe_of(tmp_path, tiny_llama, store, parallel, f"method: medusa, train: {train}")
    package = tmp_path / "package"
    cli("build", recipe, "-o", package, *GATE)
    config = json.loads((package / "engine" / "checkpoint" / "config.json").read_text())
    assert (config["architecture"], config["max_draft_len"]) == ("MedusaForCausalLM", 2)
    assert (config["num_medusa_heads"], config["num_medusa_layers"]) == (2, 1)
    for rank in range(2):
        path = package / "engine" / "checkpoint" / f"rank{rank}.safetensors"
        header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
        heads = {name: entry["shape"] for name, entry in header.items() if name.startswith("medusa_heads.")}
        assert heads == {
            f"medusa_heads.{head}.{name}": shape
            for head in range(2)
            for name, shape in (
                ("medusa_layers.0.linear.weight", [32, 64]),
                ("medusa_layers.0.linear.bias", [32]),
                ("lm_head.weight", [160, 64]),
            )
        }
    spec = json.loads((package / "engine" / "engine.json").read_text())["spec"]
    assert spec["speculation"] == {"mode": "medusa", "max_draft_len": 2, "more_len": 0}
    lines = cli("verify", package).stdout.splitlines()
    assert all(line.startswith(("passed", "not run")) for line in lines), lines
    trained = Path(cli("build", recipe, "--until", "draft").stdout.strip())
    as_given = recipe_of(tmp_path, tiny_llama, store, parallel, f"method: medusa, draft: {trained}")
    engine = Path(cli("build", as_given, "--until", "engine").stdout.strip())
    for rank in range(2):
        name = f"checkpoint/rank{rank}.safetensors"
        assert (engine / name).read_bytes() == (package / "engine" / name).read_bytes()
