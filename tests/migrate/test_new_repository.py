"""The repository that a migration writes beside the recipe: what a build of that recipe makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from migrate.old_repositories import write_repository as write_old
from trtbuild.adapters.triton import model_names, render_repository
from trtbuild.errors import RecipeError
from trtbuild.migrate.new_repository import refuse_place, write_repository
from trtbuild.migrate.run import migrate, open_fields, write_recipe
from trtbuild.pipeline import prepare
from trtbuild.steps import repository_spec

FILLED = frozenset(("gpt_model_path", "kv_cache_free_gpu_mem_fraction", "batch_scheduler_policy", "tokenizer_dir"))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return write_old(tmp_path / "old", "0.17", only=FILLED)


def files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize(
    ("kind", "layout", "line"),
    [("trtllm", "llm", "MAX_UTILIZATION"), ("trtllm-engine", "ensemble", '"max_utilization"')],
)
def test_it_is_the_one_that_a_build_makes(
    kind: Any, layout: str, line: str, old: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    done = migrate(str(old), kind, model=str(tiny_llama), gpu="H100")
    recipe, new = tmp_path / "recipe.yaml", tmp_path / "new"
    refuse_place(new)
    write_recipe(done, recipe)
    write_repository(recipe, new, open_fields(done))
    assert sorted(path.name for path in new.iterdir()) == sorted(model_names(layout, "tensorrt_llm"))
    plan = prepare(recipe).plan
    render_repository(repository_spec(plan.step("repository")), tmp_path / "built")
    assert files(new) == files(tmp_path / "built")
    said = (new / "tensorrt_llm" / "config.pbtxt").read_text(encoding="utf-8")
    assert line in (said if kind == "trtllm-engine" else str(plan.step("engine").parameters["values"]))


def test_what_cannot_be_written_yet(old: Path, tiny_llama: Path, tmp_path: Path) -> None:
    recipe, new = tmp_path / "recipe.yaml", tmp_path / "new"
    done = migrate(str(old))
    write_recipe(done, recipe)
    with pytest.raises(
        RecipeError, match=r"leaves model\.path open; complete .*recipe\.yaml; trtbuild build then writes"
    ):
        write_repository(recipe, new, open_fields(done))
    unsound = migrate(str(old), model=str(tiny_llama))
    (tmp_path / "other.yaml").write_text(unsound.text.replace("free_gpu_memory_fraction: 0.8", "max_tokens: 1"))
    with pytest.raises(RecipeError, match=r"other\.yaml gives no plan \(runtime\.kv_cache\.max_tokens: "):
        write_repository(tmp_path / "other.yaml", new, open_fields(unsound))
    assert not new.exists()
    for place, sentence in (
        (tmp_path, "exists; name another"),
        (tmp_path / "a" / "b", "is no directory; make it first"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            refuse_place(place)
