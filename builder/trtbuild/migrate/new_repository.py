"""The model repository of a migrated deployment, before anything is compressed: a plan decides all of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trtbuild.adapters import triton
from trtbuild.errors import Problem, RecipeError, TrtbuildError
from trtbuild.pipeline import prepare
from trtbuild.steps import repository_spec

_AT = "--repository"


def refuse_place(out: Path | None) -> None:
    """Refuse a place that cannot hold a new directory, before anything is written; None is no place.

    Raises:
        RecipeError: it exists, or its own directory does not.
    """
    if out is None:
        return
    if out.exists():
        raise RecipeError([Problem(_AT, f"{out} exists", "name another directory, or remove it")])
    if not out.absolute().parent.is_dir():
        raise RecipeError([Problem(_AT, f"{out.parent} is no directory", "make it first, or name another one")])


def write_repository(recipe: Path, out: Path | None, still_open: Sequence[str]) -> None:
    """Write the repository that `trtbuild build` would make of a recipe; its engine comes with that build.

    Args:
        recipe: the written recipe.
        out: a directory that does not exist yet; None where none is wanted.
        still_open: fields that the user must fill in first.

    Raises:
        RecipeError: the recipe is not complete, or not sound.
    """
    if out is None:
        return
    later = f"complete {recipe}; trtbuild build then writes the repository, with its engine"
    if still_open:
        raise RecipeError([Problem(_AT, f"{recipe} leaves {', '.join(still_open)} open", later)])
    try:
        spec = repository_spec(prepare(recipe).plan.step("repository"))
    except TrtbuildError as error:
        raise RecipeError([Problem(_AT, f"{recipe} gives no plan ({error})", later)]) from error
    triton.render_repository(spec, out)
