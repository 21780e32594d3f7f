"""Where a recipe's model lies: a directory on this machine or a hub repository at a commit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trtbuild.checkpoint_files import CheckpointFiles, open_directory
from trtbuild.draft import DRAFT_ROLES
from trtbuild.errors import ArtifactError, Problem, RecipeError
from trtbuild.manifest import DigestCache, FileEntry
from trtbuild.model import ModelFacts
from trtbuild.plan import Plan, Source, Step
from trtbuild.recipe_fields import TEXT_SUFFIXES
from trtbuild.recipe_file import LoadedRecipe
from trtbuild.report import Reporter
from trtbuild.text_sets import ARROW, DATA, relative_names, text_files

_DIRECTORIES = {
    "model.tokenizer": "name a directory with tokenizer files",
    "model.adapters": "name a directory with adapter_config.json and adapter_model.safetensors",
    "speculative.draft": "name a checkpoint directory",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Fetched:
    """A complete local checkpoint and the SHA-256 of every file that belongs to it."""

    directory: Path
    files: tuple[FileEntry, ...]


def locate(loaded: LoadedRecipe) -> tuple[Source, CheckpointFiles]:
    """The source of a recipe's model, and its files for reading facts; resolves a hub revision to a commit.

    Raises:
        RecipeError: the directory does not exist, or the hub knows no such repository or revision.
    """
    model = loaded.recipe.model
    directory = local_path(loaded, model.path, at="model.path")
    looks_local = model.path.startswith(("/", ".", "~")) or directory.exists()
    if looks_local or not _HUB_ID.fullmatch(model.path):
        if model.revision is not None:
            problem = Problem("model.revision", f"{model.path} is a directory, it has no revisions", "remove it")
            raise RecipeError([problem])
        return Source(path=str(directory)), open_directory(directory)
    from trtbuild.adapters import hub  # half a second of imports that a local model does not need

    commit = hub.resolve(model.path, model.revision)
    return Source(path=model.path, repo_id=model.path, commit=commit), hub.HubFiles(model.path, commit)


def local_path(loaded: LoadedRecipe, path: str, *, at: str) -> Path:
    """A path of the recipe: ``~`` is the home directory, a relative path starts at the recipe's directory.

    Raises:
        RecipeError: at the place `at` in the recipe, where no path can be made of it.
    """
    try:
        found = (loaded.path.parent / Path(path).expanduser()).resolve()
        found.exists()  # raises for names that no file can have
    except PermissionError:
        raise  # says itself which directory may not be read
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        shown = path if len(path) <= 60 else f"{path[:57]}..."
        raise RecipeError([Problem(at, f"{shown!r} is no path ({reason})", "name an existing place")]) from None
    return found


def missing_files(loaded: LoadedRecipe, steps: Iterable[Step]) -> list[Problem]:
    """What is wrong with the user's files that these steps read: by their places in the recipe, each once."""
    named = {
        (recipe_path(step.kind, role), path, calibration_split(step))
        for step in steps
        for role, path in step.files.items()
    }
    problems: list[Problem] = []
    for at, path, split in sorted(named, key=str):
        try:
            found = local_path(loaded, path, at=at)
            members = text_files(found, split) if at == DATA and (split is not None or found.is_dir()) else [found]
            problems += [problem for member in members for problem in _unfit(at, member)]
        except RecipeError as error:
            problems += error.problems
    return problems


def calibration_split(step: Step) -> str | None:
    """The split of the calibration data that a step reads; None for none."""
    if step.kind == "evaluate":
        return step.parameters.get("calibration_split")
    split: str | None = step.parameters.get("calibration", {}).get("split")
    return split


def recipe_path(kind: str, role: str) -> str:
    """Where the recipe names the file that a kind of step reads in this role."""
    if kind == "draft":
        return "speculative.train.prompts"
    if kind == "engine":
        return "speculative.draft" if role in DRAFT_ROLES else "model.adapters"
    if role == "tokenizer":
        return "model.tokenizer"
    return "quality.data" if (kind, role) == ("evaluate", "data") else DATA


def _unfit(at: str, path: Path) -> list[Problem]:
    hint = _DIRECTORIES.get(at, f"name a file that ends in {', '.join(TEXT_SUFFIXES)}")
    directory = at in _DIRECTORIES
    if not path.exists():
        return [Problem(at, f"{path} does not exist", hint)]
    if directory != path.is_dir():
        return [Problem(at, f"{path} is a {'file' if directory else 'directory'}", hint)]
    if not directory and path.suffix.lower() not in (*TEXT_SUFFIXES, *([ARROW] if at == DATA else [])):
        return [Problem(at, f"{path} ends in {path.suffix or 'nothing'}", hint)]
    empty = not any(path.iterdir()) if directory else path.stat().st_size == 0
    return [Problem(at, f"{path} is empty", hint)] if empty else []


def fetch(plan: Plan, downloads: Path, digests: DigestCache, reporter: Reporter) -> Fetched:
    """Have the whole checkpoint on this machine, with every file's digest.

    A hub repository is downloaded below `downloads`; an interrupted download is resumed there.

    Raises:
        ArtifactError: a file changed since the plan was made.
    """
    directory = Path(plan.source.path)
    if plan.source.repo_id is not None and plan.source.commit is not None:
        from trtbuild.adapters import hub

        directory = downloads / f"{plan.source.repo_id.replace('/', '--')}--{plan.source.commit}"
        names = [file.path for file in plan.facts.files]
        hub.fetch(plan.source.repo_id, plan.source.commit, directory, progress=reporter.progress, names=names)
    return Fetched(directory=directory, files=_digest_files(plan.facts, directory, digests, reporter))


def _digest_files(
    facts: ModelFacts, directory: Path, digests: DigestCache, reporter: Reporter
) -> tuple[FileEntry, ...]:
    total, done = sum(file.size for file in facts.files), 0
    entries = []
    for file in facts.files:
        path = directory / file.path
        if not path.is_file() or path.stat().st_size != file.size:
            raise ArtifactError(f"{path} changed while it was being built from", "start the build again")
        entry = FileEntry(path=file.path, size=file.size, sha256=digests.sha256(path))
        if file.whole and entry.sha256 != file.sha256:
            raise ArtifactError(f"{path} changed while it was being built from", "start the build again")
        entries.append(entry)
        done += file.size
        reporter.progress(done, total, "bytes checked")
    return tuple(entries)


def digest_paths(
    kind: str, paths: Mapping[str, Path], digests: DigestCache, split: str | None = None
) -> dict[str, str]:
    """A digest for each user file (its bytes and suffix) or directory of one kind of step.

    Of calibration data it tells the files that are read, in their order (`split` chooses them); of other directories
    the files at their top.

    Raises:
        RecipeError: one of them does not exist.
    """
    found = {}
    for role, path in paths.items():
        if path.is_dir() and recipe_path(kind, role) == DATA:
            files = text_files(path, split)
            named = zip(relative_names(path, files), files, strict=True)
            found[role] = " ".join(f"{name}:{digests.sha256(file)}" for name, file in named)
        elif path.is_file():
            found[role] = f"{digests.sha256(path)}{path.suffix}"
        elif path.is_dir():
            names = sorted(file for file in path.iterdir() if file.is_file())
            found[role] = " ".join(f"{file.name}:{digests.sha256(file)}" for file in names)
        else:
            raise RecipeError([Problem(recipe_path(kind, role), f"{path} does not exist", "name an existing file")])
    return found
