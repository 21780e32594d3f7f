"""The settings of one recipe, complete, each with where its value came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trtbuild.draft import Draft
from trtbuild.errors import Problem
from trtbuild.plan import Value
from trtbuild.recipe import Recipe


@dataclass(slots=True)
class Settings:
    """All settings of one recipe by dotted path, collected in order, and the problems met on the way.

    `draft` is what the files of ``speculative.draft`` say, for runtimes that take one.
    """

    recipe: Recipe
    document: Mapping[str, Any]
    overridden: frozenset[str]
    values: list[Value] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    draft: Draft | None = None

    def __getitem__(self, path: str) -> Any:
        return next(value.value for value in self.values if value.path == path)

    def given(self, path: str) -> bool:
        """Whether the recipe or ``--set`` states this setting; null is silence, but it switches a gate off."""
        here: Any = self.document
        for key in path.split("."):
            if not isinstance(here, Mapping) or key not in here:
                return False
            here = here[key]
        return here is not None or path.startswith("quality.")

    def take(self, path: str, default: Any = None, origin: str = "default", *, note: str = "") -> Any:
        """Record a setting: the recipe's value, or `default` with its origin where the recipe is silent.

        `note` is added to the origin.
        """
        value = recipe_value(self.recipe, path)
        if not self.given(path):
            value = default if default is not None or value is None else value
        self.put(path, value, origin, note=note)
        return value

    def put(self, path: str, value: Any, origin: str, *, note: str = "") -> None:
        """Record `value` for a setting that the recipe may state in other words; `origin` is where it does not."""
        if self.given(path):
            origin = "--set" if self._was_set(path) else "recipe"
        self.values.append(Value(path, value, f"{origin}; {note}" if note else origin))

    def has(self, path: str) -> bool:
        """Whether a value of this setting was recorded."""
        return any(value.path == path for value in self.values)

    def _was_set(self, path: str) -> bool:
        """Whether ``--set`` gave this value, the section around it, or a part of it."""
        return any(f"{path}.".startswith(f"{key}.") or key.startswith(f"{path}.") for key in self.overridden)

    def problem(self, path: str, message: str, hint: str = "") -> None:
        """Note one thing wrong with the recipe."""
        self.problems.append(Problem(path, message, hint))


def recipe_value(recipe: Recipe, path: str) -> Any:
    """What the recipe has at a dotted path; its own default where it is silent."""
    value: Any = recipe
    for key in path.split("."):
        value = getattr(value, key)
    return value
