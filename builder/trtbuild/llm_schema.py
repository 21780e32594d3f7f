"""Argument schemas of TensorRT-LLM's LLM API, one TOML file of ``_compat/llm_args/`` per upstream file that was read.

A file says where it comes from (repo, path, commit, the release it is proven to be or its era) and, per strict class,
each field's type, default, bounds, status and other spellings. A field without ``default`` that is not ``required`` is
null.

Types are a small part of Python's notation: ``int | None``, ``list[int]``, ``dict[str, int]``, ``Literal['a', 'b']``,
names of classes, enums and discriminated unions of the same file, ``Any``, and ``object`` for what no file holds.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from trtbuild.compat import DATA

_DIRECTORY = DATA / "llm_args"
_HEADER = ("name", "repo", "path", "commit", "release", "era", "proof", "date", "root")


@dataclass(frozen=True, slots=True)
class Kind:
    """A parsed type: `name` of a scalar, class, enum, union or container, with `parts` for what is inside.

    ``union`` has the alternatives, ``Literal`` the allowed values, ``list`` and ``dict`` their elements' types.
    """

    name: str
    parts: tuple[Any, ...] = ()

    def __str__(self) -> str:
        if self.name == "union":
            return " | ".join(map(str, self.parts))
        if self.name == "Literal":
            return ", ".join(map(str, self.parts))
        return f"{self.name}[{', '.join(map(str, self.parts))}]" if self.parts else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One argument as upstream declares it; bounds are those of the value itself."""

    type: str
    default: Any = None
    required: bool = False
    default_unknown: bool = False
    status: str | None = None
    aliases: tuple[str, ...] = ()
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None


@dataclass(frozen=True, slots=True)
class Enum:
    """Allowed texts."""

    values: tuple[str, ...]
    ignore_case: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Union:
    """A choice between classes by the value of one key; `engine_only` members do not run on the PyTorch backend."""

    key: str
    members: Mapping[str, str]
    default: str | None = None
    engine_only: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Where a schema comes from; `release` is the version it is proven to be, else `era` says what it looks like."""

    name: str
    repo: str
    path: str
    commit: str
    proof: str
    date: Any
    root: str
    release: str | None = None
    era: str | None = None


@dataclass(frozen=True, slots=True)
class Schema:
    """The arguments of one upstream file."""

    header: Header
    classes: Mapping[str, Mapping[str, Field]]
    enums: Mapping[str, Enum]
    unions: Mapping[str, Union]
    sources: Mapping[str, str]

    @property
    def root(self) -> Mapping[str, Field]:
        """The fields at the top of a document."""
        return self.classes[self.header.root]

    def has(self, path: str) -> bool:
        """Whether a dotted path names an argument, through nested classes and, in a union, through any member."""
        return self.field_at(path) is not None

    def field_at(self, path: str) -> Field | None:
        """The argument at a dotted path, or None."""
        here = [self.root]
        found: Field | None = None
        for key in path.split("."):
            fields = [fields[key] for fields in here if key in fields]
            if not fields:
                return None
            found = fields[0]
            here = [inner for field in fields for inner in self._inside(parse_kind(field.type))]
        return found

    def _inside(self, kind: Kind) -> list[Mapping[str, Field]]:
        if kind.name in self.classes:
            return [self.classes[kind.name]]
        if kind.name in self.unions:
            return [self.classes[member] for member in self.unions[kind.name].members.values()]
        if kind.name == "union":
            return [fields for part in kind.parts for fields in self._inside(part)]
        return []


@cache
def schema_names() -> tuple[str, ...]:
    """Every schema that was read, by the name that release lines use."""
    return tuple(sorted(path.stem for path in _DIRECTORY.glob("*.toml")))


@cache
def load_schema(name: str) -> Schema:
    """One schema by its name, parsed once."""
    data = tomllib.loads((_DIRECTORY / f"{name}.toml").read_text(encoding="utf-8"))
    return Schema(
        header=Header(**{key: data[key] for key in _HEADER if key in data}),
        classes={
            class_name: {key: Field(**_tuples(row)) for key, row in rows.items()}
            for class_name, rows in data["classes"].items()
        },
        enums={key: Enum(**_tuples(row)) for key, row in data.get("enums", {}).items()},
        unions={key: Union(**_tuples(row)) for key, row in data.get("unions", {}).items()},
        sources=data.get("sources", {}),
    )


@cache
def schema_header(name: str) -> Header:
    """Where one schema comes from, read from the top of its file alone."""
    text = (_DIRECTORY / f"{name}.toml").read_text(encoding="utf-8")
    return Header(**tomllib.loads(text.partition("\n[")[0]))


def _tuples(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) and key != "default" else value for key, value in row.items()}


@cache
def parse_kind(text: str) -> Kind:
    """The type that `text` writes.

    Raises:
        ValueError: the notation is another one.
    """
    return _kind(ast.parse(text, mode="eval").body)


def _kind(node: ast.expr) -> Kind:
    match node:
        case ast.Constant(value=None):
            return Kind("None")
        case ast.Name(id=name):
            return Kind(name)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            parts = [_kind(left), _kind(right)]
            return Kind(
                "union", tuple(part for kind in parts for part in (kind.parts if kind.name == "union" else (kind,)))
            )
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            return Kind("Literal", tuple(ast.literal_eval(item) for item in _items(inner)))
        case ast.Subscript(value=ast.Name(id=name), slice=inner):
            return Kind(name, tuple(_kind(item) for item in _items(inner)))
        case _:
            raise ValueError(f"no type of this notation: {ast.unparse(node)}")


def _items(node: ast.expr) -> list[ast.expr]:
    return list(node.elts) if isinstance(node, ast.Tuple) else [node]
