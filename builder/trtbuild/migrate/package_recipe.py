"""A package of trtbuild, or a recipe: the new recipe keeps whatever the new runtime takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtbuild.migrate.legacy import Legacy, Setting, leaves, split_unset
from trtbuild.recipe_file import load_recipe

_RECIPE = "recipe.yaml"


def is_package(path: Path) -> bool:
    """Whether a directory is a package, which keeps its recipe beside the model repository."""
    return (path / _RECIPE).is_file() and (path / "model_repository").is_dir()


def read_package(path: Path) -> Legacy:
    """The recipe that a package was built from.

    Raises:
        RecipeError: its recipe is damaged.
    """
    return read_recipe(load_recipe(path / _RECIPE).document, _RECIPE, path)


def read_recipe(document: Mapping[str, Any], where: str, root: Path) -> Legacy:
    """A recipe's fields."""
    pairs = leaves(document)
    # In a gate null is a value: it switches the gate off, where silence means the default.
    gates = [Setting("recipe", name, None, where) for name, value in pairs if _is_gate(name) and value is None]
    others = [(name, value) for name, value in pairs if value is not None or not _is_gate(name)]
    settings, unset = split_unset("recipe", others, where)
    return Legacy("a recipe of trtbuild", root, (*settings, *gates), tuple(unset))


def _is_gate(name: str) -> bool:
    return name.startswith(("quality.max_", "quality.min_"))
