"""The files that a recipe names: where they lie, and what is said when they do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from trtbuild.errors import RecipeError
from trtbuild.manifest import DigestCache
from trtbuild.plan import Step
from trtbuild.recipe_file import LoadedRecipe, load_recipe
from trtbuild.source import digest_paths, local_path, missing_files


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedRecipe:
    path = tmp_path / "recipe.yaml"
    path.write_text("schema_version: 1\nmodel: {path: x}\nruntime: {kind: embedded}\n")
    return load_recipe(path)


def test_each_file_is_named_once_by_its_place_in_the_recipe(loaded: LoadedRecipe, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    steps = [
        Step("compress", {}, (), {}, {"data": "none.txt", "tokenizer": "empty"}),
        Step("evaluate", {}, (), {}, {"data": "empty", "calibration": "none.txt"}),
    ]
    text = "name a file that ends in .txt, .md, .jsonl, .parquet"
    assert [str(problem) for problem in missing_files(loaded, steps)] == [
        f"compress.calibration.data: {tmp_path}/none.txt does not exist; {text}",
        f"model.tokenizer: {tmp_path}/empty is empty; name a directory with tokenizer files",
        f"quality.data: {tmp_path}/empty is a directory; {text}",
    ]
    assert missing_files(loaded, [Step("evaluate", {}, (), {}, {"data": "text.txt"})]) == []
    long = [Step("evaluate", {}, (), {}, {"data": "a" * 300})]
    assert [problem.path for problem in missing_files(loaded, long)] == ["quality.data"]


def test_a_file_that_went_away_is_named_by_its_place_in_the_recipe(tmp_path: Path) -> None:
    digests = DigestCache(tmp_path / "digests")
    for kind, place in (("compress", "compress.calibration.data"), ("evaluate", "quality.data")):
        with pytest.raises(RecipeError, match=f"{place}: .*gone.txt does not exist; name an existing file"):
            digest_paths(kind, {"data": tmp_path / "gone.txt"}, digests)


@pytest.mark.parametrize("path", ["~nosuchuser/x", "a\0b", "a" * 300, "b/" * 3000])
def test_names_that_no_file_can_have(loaded: LoadedRecipe, path: str) -> None:
    with pytest.raises(RecipeError, match=r"store: '.*' is no path \(.*\); name an existing place"):
        local_path(loaded, path, at="store")
