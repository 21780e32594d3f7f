"""A draft's record of the model that it was trained for, held against the recipe's model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from trtbuild.draft import AT, DRAFT_ROLES
from trtbuild.errors import CompatibilityError
from trtbuild.manifest import FileEntry
from trtbuild.plan import Plan
from trtbuild.recipe_file import LoadedRecipe
from trtbuild.source import local_path
from trtbuild.trained_for import TrainedFor, other_weights, read_record, size_misfits, tokenizer_digest, weights_digest

_HINT = "train a draft for this model (speculative.train), or give the model that it was trained for"


def refuse_other_sizes(plan: Plan, loaded: LoadedRecipe, tokenizer: Path | None) -> None:
    """Refuse a draft that was trained for a model of other sizes or with another tokenizer, before anything is read.

    Args:
        plan: the whole plan.
        loaded: the recipe.
        tokenizer: the directory with the model's tokenizer; None while it is on a hub.

    Raises:
        CompatibilityError: naming every difference.
        ArtifactError: the draft's record is damaged.
    """
    known = None if tokenizer is None else tokenizer_digest(tokenizer)
    for directory, trained in _records(plan.step("engine").files, loaded):
        method = loaded.recipe.speculative.method
        _refuse(directory, size_misfits(trained, method, plan.facts, known))


def refuse_other_weights(plan: Plan, loaded: LoadedRecipe, files: Iterable[FileEntry]) -> None:
    """Refuse a draft that was trained for another model, by the digests of all of the model's bytes.

    Raises:
        CompatibilityError: they are others.
        ArtifactError: the draft's record is damaged.
    """
    weights = weights_digest(files)
    for directory, trained in _records(plan.step("engine").files, loaded):
        problem = other_weights(trained, weights)
        _refuse(directory, [] if problem is None else [problem])


def _records(files: Mapping[str, str], loaded: LoadedRecipe) -> Iterable[tuple[Path, TrainedFor]]:
    for role in DRAFT_ROLES:
        if role in files:
            directory = local_path(loaded, files[role], at=AT)
            record = read_record(directory)
            if record is not None:
                yield directory, record


def _refuse(directory: Path, problems: list[str]) -> None:
    if problems:
        raise CompatibilityError("\n".join(f"{AT}: {directory} {problem}" for problem in problems), _HINT)
