"""Recipes: what is read, what is refused, and the sentences that a user sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml.error import YAMLError

from trtbuild.errors import RecipeError
from trtbuild.recipe import Recipe, json_schema
from trtbuild.recipe_file import load_recipe
from trtbuild.yaml_text import parse_yaml

BAD = sorted((Path(__file__).parent / "bad").glob("*.yaml"))
MINIMAL = "schema_version: 1\nmodel:\n  path: ckpt\nruntime:\n  kind: embedded\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_minimal_recipe(tmp_path: Path) -> None:
    loaded = load_recipe(write(tmp_path, MINIMAL))
    assert loaded.recipe.model.path == "ckpt"
    assert loaded.recipe.runtime.max_batch_size == 8
    assert loaded.effective_text() == MINIMAL


def test_there_are_bad_recipes() -> None:
    assert len(BAD) >= 12


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_bad_recipe_says_what_its_first_lines_promise(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    promised = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")]
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).replace(str(path), path.name).splitlines() == promised


def test_yaml_surprises_stay_text() -> None:
    assert parse_yaml("a: 2:4\nb: no\nc: 1e3\nd: 2024x") == {"a": "2:4", "b": "no", "c": 1000.0, "d": "2024x"}


def test_too_many_values() -> None:
    with pytest.raises(YAMLError, match="holds more than 20000 values"):
        parse_yaml(f"[{'1,' * 20_001}]")


def test_missing_file_not_utf8_and_too_long(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no such file; name a recipe, or write one with `trtbuild init"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9")
    with pytest.raises(RecipeError, match=r"is not UTF-8 text \(byte 10\)"):
        load_recipe(tmp_path / "latin.yaml")
    (tmp_path / "long.yaml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(RecipeError, match="bytes long, a recipe has at most"):
        load_recipe(tmp_path / "long.yaml")


def test_set_changes_one_value_and_is_remembered(tmp_path: Path) -> None:
    loaded = load_recipe(write(tmp_path, MINIMAL), ["runtime.max_batch_size=64", "compress.sparsity=2:4"])
    assert loaded.recipe.runtime.max_batch_size == 64
    assert loaded.recipe.compress.sparsity == "2:4"
    assert loaded.overridden == {"runtime.max_batch_size", "compress.sparsity"}
    again = write(tmp_path, loaded.effective_text())
    assert load_recipe(again).recipe == loaded.recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("runtime.max_batch_size", "is not section.field=value; for example --set runtime.max_batch_size=64"),
        ("runtime.max_batch_sise=4", "runtime.max_batch_sise: unknown field; did you mean max_batch_size?"),
        ("schema_version.x=4", "--set schema_version.x: schema_version is no section"),
        ("runtime.max_batch_size=[", "'[' is not a YAML value; quote it"),
        ("runtime.max_batch_size=2001-99-99", "'2001-99-99' is not a YAML value; quote it"),
        ("compress.exclude=[*lm_head*]", "'[*lm_head*]' is not a YAML value; quote it"),
        ("model.path=" + "[" * 3000, "is not a YAML value; quote it"),
        (f"{'a.' * 3000}a=1", "is not section.field=value"),
        ('deploy.labels={"\\ud83d": a}', "deploy.labels: holds half of a character"),
        ('model.path="\\ud83d"', "model.path: holds half of a character"),
        ("quality.max_kl_divergence=.nan", "quality.max_kl_divergence: nan must be a finite number"),
        ("runtime.max_batch_size=many", "runtime.max_batch_size: 'many' must be a whole number"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, MINIMAL), [override])
    assert message in str(caught.value)


def test_newer_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="schema_version 2 is newer than this trtbuild, which reads up to 1; install"):
        load_recipe(write(tmp_path, MINIMAL.replace("schema_version: 1", "schema_version: 2")))


def test_recipes_are_frozen(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL)).recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.runtime.max_batch_size = 3  # type: ignore[misc]


def test_json_schema_describes_every_section() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    json.dumps(schema)


@given(
    batch=st.integers(1, 4096),
    length=st.integers(2, 100_000),
    fmt=st.sampled_from(["none", "fp8", "int4_awq"]),
    name=st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True),
)
def test_recipe_to_yaml_and_back_is_identity(
    tmp_path_factory: pytest.TempPathFactory, batch: int, length: int, fmt: str, name: str
) -> None:
    document = {
        "schema_version": 1,
        "model": {"path": name},
        "compress": {"format": fmt},
        "runtime": {"kind": "embedded", "max_batch_size": batch, "max_seq_len": length},
        "serving": {"model_name": name},
    }
    path = tmp_path_factory.mktemp("r") / "recipe.yaml"
    path.write_text(json.dumps(document), encoding="utf-8")
    recipe = load_recipe(path).recipe
    path.write_text(recipe.model_dump_json(), encoding="utf-8")
    assert load_recipe(path).recipe == recipe
