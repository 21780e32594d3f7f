"""Which files a set of calibration text consists of: one file, a directory of files, or a data set saved on disk.

The plan, the step's key and the reader ask the same function, so that what is digested is what is read.

Sources (huggingface/datasets @da892300af44): `save_to_disk` writes dataset_dict.json with the names of the splits, a
directory for each, and in it state.json, whose `_data_files` names Arrow streams in order (arrow_dataset.py and
dataset_dict.py in src/datasets). Splits in the names of files and directories, as on the hub: data_files.py there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trtbuild.errors import Problem, RecipeError
from trtbuild.recipe_fields import TEXT_SUFFIXES

DATA, SPLIT = "compress.calibration.data", "compress.calibration.split"
ARROW = ".arrow"

_DICTIONARY, _STATE = "dataset_dict.json", "state.json"
_ABOUT = ("readme", "license", "licence", "changelog", "contributing", "notice")  # no calibration text
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\b.*")
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_NO_WORD = re.compile(r"[-._ 0-9]+")
_SHOWN = 5


def text_files(path: Path, split: str | None = None) -> tuple[Path, ...]:
    """The files of the text at `path`, in the order in which they are read.

    Args:
        path: A file, or a directory.
        split: Of a data set; None takes train, or the only one.

    Raises:
        RecipeError: there is no such split, or more than one and none is named; the directory holds nothing to read.
    """
    if not path.is_dir():
        if split is not None:
            raise _problem(SPLIT, f"{split!r} is set, but {path} is one file", "remove it")
        return (path,)
    if (path / _DICTIONARY).is_file():
        splits = _json(path / _DICTIONARY).get("splits")
        names = [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []
        return _saved_files(path / _choose(path, split, names), None)
    if (path / _STATE).is_file():
        return _saved_files(path, split)
    return _plain_files(path, split)


def relative_names(path: Path, files: Iterable[Path]) -> list[str]:
    """The names of a set's files below its directory; a file's own name."""
    return [file.relative_to(path).as_posix() if file != path else file.name for file in files]


def _saved_files(path: Path, split: str | None) -> tuple[Path, ...]:
    """The Arrow files of a data set that `Dataset.save_to_disk` wrote."""
    state = _json(path / _STATE)
    if split is not None and state.get("_split") != split:
        there = state.get("_split")
        what = f"there is no split {split!r} in {path}, which holds {f'the split {there}' if there else 'one data set'}"
        raise _problem(SPLIT, what, "remove it, or name another directory")
    if any(value for key, value in state.items() if key.startswith("_indices")):
        raise _problem(DATA, f"{path} selects its rows by an index file", "save it again with a current `datasets`")
    named = state.get("_data_files")
    entries = named if isinstance(named, list) else []
    files = [path / str(entry["filename"]) for entry in entries if isinstance(entry, dict) and "filename" in entry]
    if not files:
        raise _problem(DATA, f"{path / _STATE} names no data files", "save the data set again")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise _problem(DATA, f"{path}: {_some(missing)} is missing, {_STATE} names it", "copy the whole data set")
    return tuple(files)


def _plain_files(path: Path, split: str | None) -> tuple[Path, ...]:
    every = [file for file in sorted(path.rglob("*")) if file.is_file() and not _is_aside(file.relative_to(path))]
    files = [file for file in every if file.suffix.lower() in TEXT_SUFFIXES]
    if not files:
        kinds = sorted({file.suffix.lower() or file.name for file in every})
        found = f", only {_some(kinds)}" if kinds else ""
        raise _problem(DATA, f"{path} holds no file of text{found}", f"it may hold {', '.join(TEXT_SUFFIXES)}")
    splits = _splits(path, files)
    if splits:
        files = splits[_choose(path, split, sorted(splits))]
    elif split is not None:
        raise _problem(SPLIT, f"the names of the files in {path} tell no splits", "remove it")
    kinds = sorted({file.suffix.lower() for file in files} - {".md"})
    if len(kinds) > 1:
        what = f"{path} holds files of several kinds: {', '.join(kinds)}"
        raise _problem(DATA, what, "name a directory with one kind")
    return tuple(files)


def _is_aside(file: Path) -> bool:
    """Whether a file is no data: hidden, in a directory of a tool, or about the data."""
    hidden = any(part.startswith((".", "__")) for part in file.parts)
    about = file.suffix.lower() in {".md", ".txt", ""} and file.stem.lower().startswith(_ABOUT)
    return hidden or about or file.name in {"dataset_info.json", "dataset_infos.json", "config.json"}


def _splits(path: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of each split that names of shards, else of directories, else of files tell of; else none."""
    shards = {file: found[1] for file in files if (found := _SHARD.fullmatch(file.name))}
    if shards:
        return _grouped(shards)
    inside = {file: file.relative_to(path).parent.parts for file in files}
    for words in (inside, {file: (file.stem,) for file in files}):
        named = {file: name for file, parts in words.items() if (name := _split_of(parts)) is not None}
        if named:
            return _grouped(named)
    return {}


def _split_of(parts: Iterable[str]) -> str | None:
    words = {word for part in parts for word in _NO_WORD.split(part)}
    return next((split for split, known in _SPLIT_WORDS.items() if words & set(known)), None)


def _grouped(named: dict[Path, str]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for file, split in named.items():
        groups.setdefault(split, []).append(file)
    return groups


def _choose(path: Path, split: str | None, splits: Sequence[str]) -> str:
    if split in splits:
        return str(split)
    there = ", ".join(splits) or "none"
    if split is not None:
        raise _problem(SPLIT, f"there is no split {split!r} in {path}", f"its splits: {there}")
    if "train" in splits:
        return "train"
    if len(splits) == 1:
        return splits[0]
    raise _problem(SPLIT, f"is not set, and {path} has no split named train", f"name one of its splits: {there}")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _problem(DATA, f"{path} cannot be read ({error})", "save the data set again") from error
    if not isinstance(value, dict):
        raise _problem(DATA, f"{path} is not a mapping", "save the data set again")
    return value


def _problem(field: str, message: str, hint: str) -> RecipeError:
    return RecipeError([Problem(field, message, hint)])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
