"""From a recipe file and ``--set`` overrides to a `Recipe`, with every problem reported at once."""

from __future__ import annotations

import difflib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from trtbuild.errors import Problem, RecipeError
from trtbuild.recipe import SCHEMA_VERSION, Recipe
from trtbuild.yaml_text import parse_yaml

_MAX_BYTES = 1 << 20
_MAX_KEYS = 10  # no field lies deeper
_PHRASES = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "model_type": "must be a section of its own",
    "mapping_type": "must be a section of its own",
    "dict_type": "must be a section of its own",
}


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe with the text it came from; `overridden` holds the paths that ``--set`` changed."""

    recipe: Recipe
    document: Mapping[str, Any]
    path: Path
    text: str
    overridden: frozenset[str]

    def effective_text(self) -> str:
        """The recipe that this build followed: the file as written, or the document with ``--set`` applied."""
        if not self.overridden:
            return self.text
        stream = io.StringIO()
        stream.write(f"# {self.path.name} with --set {', '.join(sorted(self.overridden))}\n")
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.dump(dict(self.document), stream)
        return stream.getvalue()


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The recipe in `path` with ``section.field=value`` overrides applied.

    Raises:
        RecipeError: with one problem per mistake; the file is missing, is no YAML, or breaks the schema.
    """
    return parse_recipe(_read(path), path, overrides)


def parse_recipe(text: str, path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The recipe that `text` is; `path` is where it lies or will lie, for the sentences and for relative places.

    Raises:
        RecipeError: as `load_recipe`.
    """
    document = _parse(text, path)
    overridden = frozenset(_apply_override(document, override) for override in overrides)
    _refuse_surrogates(document, "")
    _check_schema_version(document, path)
    try:
        recipe = Recipe.model_validate(_tuples(document))
    except ValidationError as error:
        raise RecipeError([_problem(item) for item in error.errors()]) from None
    return LoadedRecipe(recipe=recipe, document=document, path=path.resolve(), text=text, overridden=overridden)


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise _single(
            path, "there is no such file", "name a recipe, or write one with `trtbuild init MODEL_DIR`"
        ) from None
    except OSError as error:
        raise _single(path, f"cannot be read ({error.strerror})", "name a readable recipe file") from None
    if len(data) > _MAX_BYTES:
        raise _single(path, f"is {len(data)} bytes long, a recipe has at most {_MAX_BYTES}", "name a recipe file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _single(path, f"is not UTF-8 text (byte {error.start})", "save the recipe as UTF-8") from None


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        document = parse_yaml(text)
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        key = str(error.problem).split('"')[1] if '"' in str(error.problem) else "?"
        raise _single(path, f"line {line}: the key {key!r} stands twice", "keep one of them") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise _single(path, f"{where}{error.problem or 'is not YAML'}", "mend the YAML at that place") from None
    except YAMLError as error:
        raise _single(path, f"is not YAML: {error}", "write a recipe as YAML, see `trtbuild init`") from None
    if not isinstance(document, dict):
        found = "is empty" if document is None else f"holds a {type(document).__name__}"
        raise _single(
            path, f"{found}, a recipe is a mapping with schema_version, model and runtime", "see `trtbuild init`"
        )
    return document


def _apply_override(document: dict[str, Any], override: str) -> str:
    dotted, equals, value = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys) or len(keys) > _MAX_KEYS:
        raise RecipeError(
            [
                Problem(
                    "--set", f"{override!r} is not section.field=value", "for example --set runtime.max_batch_size=64"
                )
            ]
        )
    try:
        parsed = parse_yaml(value) if value else None
    except YAMLError:
        raise RecipeError([Problem(f"--set {dotted}", f"{value!r} is not a YAML value", "quote it")]) from None
    here: Any = document
    for key in keys[:-1]:
        here = here.setdefault(key, {})
        if not isinstance(here, dict):
            raise RecipeError([Problem(f"--set {dotted}", f"{key} is no section", _near(keys[0], Recipe.model_fields))])
    here[keys[-1]] = parsed
    return dotted


def _check_schema_version(document: Mapping[str, Any], path: Path) -> None:
    version = document.get("schema_version")
    if isinstance(version, int) and not isinstance(version, bool) and version > SCHEMA_VERSION:
        raise _single(
            path,
            f"schema_version {version} is newer than this trtbuild, which reads up to {SCHEMA_VERSION}",
            "install a newer trtbuild",
        )


def _refuse_surrogates(value: Any, path: str) -> None:
    """Refuse text that is no Unicode: YAML reads an emoji in JSON's notation as two lone surrogates."""
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_surrogates(key, path)
            _refuse_surrogates(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_surrogates(item, f"{path}.{index}")
    elif isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
        raise RecipeError(
            [Problem(path, "holds half of a character (a surrogate escape)", "write the character itself")]
        )


def _tuples(value: Any) -> Any:
    """Sequences as tuples: the recipe's values are frozen, and strict validation takes no list for a tuple."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def _problem(item: Any) -> Problem:
    location = [str(part) for part in item["loc"]]
    path = ".".join(location)
    kind, context = item["type"], item.get("ctx", {})
    value = item.get("input")
    if kind == "extra_forbidden":
        section = _section_at(location[:-1])
        return Problem(path, "unknown field", _near(location[-1], section.model_fields if section else {}))
    if kind == "missing":
        return Problem(path, "is required", _required_hint(path))
    if kind == "literal_error":
        allowed = str(context.get("expected", "")).replace("'", "").replace(" or ", ", ")
        return Problem(path, f"{_show(value)} is not allowed; allowed: {allowed}", _closest(value, path))
    if kind == "string_pattern_mismatch":
        return Problem(
            path, f"{_show(value)} may hold letters, digits, '_', '.' and '-' and starts with a letter, digit or '_'"
        )
    if kind == "none_required" or (value is None and kind.endswith("_type")):
        return Problem(path, "is empty", "give a value or leave the line out")
    message = _PHRASES.get(kind) or str(item["msg"]).replace("Input should be", "must be").replace("a valid ", "a ")
    return Problem(path, f"{_show(value)} {message}", _type_hint(kind, value))


def _type_hint(kind: str, value: Any) -> str:
    if kind == "string_type":
        return f'quote it: "{value}"'
    if kind in {"model_type", "dict_type", "mapping_type"}:
        return "write its fields indented below it"
    if kind == "tuple_type":
        return "write a list, for example [a, b]"
    return ""


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _required_hint(path: str) -> str:
    return {
        "schema_version": f"write schema_version: {SCHEMA_VERSION} as the first line",
        "model": "write a section model: with path: CHECKPOINT_DIR",
        "model.path": "give a checkpoint directory or a hub id",
        "runtime": "write a section runtime: with kind: embedded",
        "runtime.kind": "choose embedded, trtllm or trtllm-engine",
    }.get(path, "")


def _closest(value: Any, path: str) -> str:
    *parents, name = path.split(".")
    section = _section_at(parents)
    field = section.model_fields.get(name) if section else None
    choices = [str(choice) for choice in get_args(field.annotation)] if field else []
    return _suggest(str(value), choices)


def _near(name: str, fields: Mapping[str, Any]) -> str:
    suggestion = _suggest(name, list(fields))
    return suggestion or (f"known here: {', '.join(fields)}" if fields else "")


def _suggest(name: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, choices, n=1)
    return f"did you mean {close[0]}?" if close else ""


def _section_at(location: Sequence[str]) -> type[BaseModel] | None:
    section: type[BaseModel] = Recipe
    for part in location:
        field = section.model_fields.get(part)
        kinds = [field.annotation, *get_args(field.annotation)] if field else []  # a section may be left out as a whole
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if inner is None:
            return None
        section = inner
    return section


def _single(path: Path, message: str, hint: str) -> RecipeError:
    return RecipeError([Problem(str(path), message, hint)])
