"""A document of LLM arguments against the schema of one version, as strict as TensorRT-LLM itself or stricter.

TensorRT-LLM refuses unknown keys at start-up (``extra="forbid"``); we refuse them here, and say whether another version
knows the key. Numbers in text (``"8"``), which upstream would convert, are refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trtbuild.build_flags import flag_tables
from trtbuild.compat import facts
from trtbuild.errors import Problem
from trtbuild.llm_schema import Field, Kind, Schema, Union, load_schema, parse_kind, schema_names

_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def validate(document: Mapping[str, Any], schema: Schema, *, at: str = "", partial: bool = False) -> list[Problem]:
    """Everything in `document` that this version would refuse.

    Args:
        document: LLM arguments as a mapping.
        schema: the version's arguments.
        at: where the document stands, in front of every path.
        partial: the document is a part that is merged into another: required arguments may be absent.
    """
    run = _Run(schema, at)
    run.fields(document, schema.root, "", partial=partial)
    return run.problems


@dataclass(slots=True)
class _Run:
    schema: Schema
    at: str
    problems: list[Problem] = field(default_factory=list)

    def problem(self, path: str, message: str, hint: str = "") -> None:
        self.problems.append(Problem(".".join(filter(None, (self.at, path))), message, hint))

    def fields(self, document: Mapping[str, Any], known: Mapping[str, Field], path: str, *, partial: bool) -> None:
        spellings = {alias: name for name, entry in known.items() for alias in entry.aliases}
        for key, value in document.items():
            here = f"{path}.{key}" if path else str(key)
            entry = known.get(spellings.get(key, key))
            if entry is None:
                self.problem(here, *unknown_argument(self.schema, here, str(key), known))
            else:
                self.value(value, parse_kind(entry.type), entry, here)
        given = {spellings.get(key, key) for key in document}
        for name, entry in known.items():
            if entry.required and name not in given and not partial:
                self.problem(f"{path}.{name}" if path else name, f"is required by {_version(self.schema)}")

    def value(self, value: Any, kind: Kind, entry: Field, path: str) -> None:
        if kind.name == "union":
            self.alternatives(value, kind, entry, path)
        elif kind.name in self.schema.classes:
            self.section(value, kind.name, path)
        elif kind.name in self.schema.unions:
            self.choice(value, self.schema.unions[kind.name], path)
        elif kind.name == "list":
            self.elements(value, kind, entry, path)
        elif kind.name == "dict":
            self.entries(value, kind, entry, path)
        else:
            self.scalar(value, kind, entry, path)

    def alternatives(self, value: Any, kind: Kind, entry: Field, path: str) -> None:
        """One alternative must fit; where none does, the one of the value's own shape says why."""
        trials = []
        for part in kind.parts:
            trial = _Run(self.schema, self.at)
            trial.value(value, part, entry, path)
            if not trial.problems:
                return
            trials.append((part, trial))
        fitting = [trial for part, trial in trials if self.of_shape(value, part)]
        if fitting:
            self.problems += fitting[0].problems
        else:
            allowed = self.allowed(kind)
            self.problem(
                path, f"{value!r} is not allowed by {_version(self.schema)}; allowed: {allowed}", _near(value, kind)
            )

    def of_shape(self, value: Any, kind: Kind) -> bool:
        if kind.name in self.schema.classes or kind.name in self.schema.unions or kind.name == "dict":
            return isinstance(value, Mapping)
        if kind.name == "list":
            return isinstance(value, (list, tuple))
        if kind.name in {"Literal", *self.schema.enums}:
            return isinstance(value, str)
        return _is_scalar(value, kind.name)

    def section(self, value: Any, name: str, path: str) -> None:
        if not isinstance(value, Mapping):
            self.problem(path, f"{value!r} must be a section of its own", "write its fields indented below it")
        else:
            self.fields(value, self.schema.classes[name], path, partial=False)

    def choice(self, value: Any, union: Union, path: str) -> None:
        if not isinstance(value, Mapping):
            self.problem(path, f"{value!r} must be a section of its own", f"with {union.key} and its fields")
            return
        chosen = value.get(union.key, union.default)
        usable = [name for name in union.members if name not in union.engine_only]
        if chosen in union.engine_only:
            message = (
                f"{chosen} runs in TensorRT engines only, not on the PyTorch backend; allowed: {', '.join(usable)}"
            )
            self.problem(f"{path}.{union.key}", message)
        elif chosen not in union.members:
            found = "is required" if chosen is None else f"{chosen!r} is not known to {_version(self.schema)}"
            near = difflib.get_close_matches(str(chosen), usable, n=1)
            hint = f"did you mean {near[0]}?" if near else ""
            self.problem(f"{path}.{union.key}", f"{found}; allowed: {', '.join(usable)}", hint)
        else:
            known = self.schema.classes[union.members[chosen]]
            rest = {key: item for key, item in value.items() if key != union.key}
            self.fields(rest, known, path, partial=False)

    def elements(self, value: Any, kind: Kind, entry: Field, path: str) -> None:
        if not isinstance(value, (list, tuple)):
            self.problem(path, f"{value!r} must be a list", "write a list, for example [a, b]")
            return
        for index, item in enumerate(value):
            self.value(item, kind.parts[0], entry, f"{path}.{index}")

    def entries(self, value: Any, kind: Kind, entry: Field, path: str) -> None:
        if not isinstance(value, Mapping):
            self.problem(path, f"{value!r} must be a section of its own", "write its fields indented below it")
            return
        for key, item in value.items():
            self.value(key, kind.parts[0], Field(type=""), f"{path}.{key}")
            self.value(item, kind.parts[1], entry, f"{path}.{key}")

    def scalar(self, value: Any, kind: Kind, entry: Field, path: str) -> None:
        if kind.name == "Any":
            return
        if kind.name == "object":
            self.problem(path, "takes a Python object, which a file cannot hold", "remove it")
        elif kind.name in self.schema.enums or kind.name == "Literal":
            self.text_of(value, kind, path)
        elif not _is_scalar(value, kind.name):
            self.problem(path, f"{value!r} must be {_described(kind.name)}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            self.bounds(value, entry, path)

    def text_of(self, value: Any, kind: Kind, path: str) -> None:
        enum = self.schema.enums.get(kind.name)
        allowed = enum.values if enum else kind.parts
        spelled = [str(item).lower() for item in allowed] if enum and enum.ignore_case else allowed
        if (str(value).lower() if enum and enum.ignore_case else value) not in spelled:
            shown = ", ".join(map(str, allowed))
            near = difflib.get_close_matches(str(value), [str(item) for item in allowed], n=1)
            hint = f"did you mean {near[0]}?" if near else ""
            self.problem(path, f"{value!r} is not allowed by {_version(self.schema)}; allowed: {shown}", hint)

    def bounds(self, value: float, entry: Field, path: str) -> None:
        for name, words in _BOUNDS.items():
            limit = getattr(entry, name)
            if limit is not None and not _within(value, name, limit):
                self.problem(path, f"{value!r} must be {words} {limit:g}")

    def allowed(self, kind: Kind) -> str:
        """The values of an alternative as a user may write them."""
        shown = []
        for part in kind.parts:
            enum = self.schema.enums.get(part.name)
            words = part.name in {"Literal", "union"} or part.parts
            shown.append(", ".join(enum.values) if enum else str(part) if words else self.described(part.name))
        return ", ".join(shown)

    def described(self, name: str) -> str:
        """A type in words."""
        known = name in self.schema.classes or name in self.schema.unions
        return "a section of its own" if known else _described(name)


def unknown_argument(schema: Schema, path: str, key: str, known: Iterable[str]) -> tuple[str, str]:
    """What to say about a key that this version does not have: message and hint."""
    renamed = _renamed(schema, path)
    if renamed is not None:
        return f"is not an argument of {_version(schema)}", f"there it is called {renamed}"
    others = [name for name in _oldest_first() if name != schema.header.name and load_schema(name).has(path)]
    if others:
        return (
            f"is not an argument of {_version(schema)}; {_when(schema, others)}",
            "remove it, or change runtime.version",
        )
    if any(key in table.flags for table in flag_tables()):
        return f"is not an argument of {_version(schema)} but a flag of trtllm-build", "remove it; engines have it"
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"is not an argument of {_version(schema)}", f"did you mean {near[0]}?" if near else "remove it"


def _oldest_first() -> list[str]:
    """Every schema by the order of the release lines that use it."""
    used = [row["schema"] for row in facts("lines")["line"] if "schema" in row]
    return sorted(schema_names(), key=used.index)


def _when(schema: Schema, others: list[str]) -> str:
    """Since when, or until when, `others` have what this schema does not."""
    order = _oldest_first()
    here = order.index(schema.header.name)
    if all(order.index(name) < here for name in others):
        return f"it was removed after {_version(load_schema(others[-1]))}"
    if all(order.index(name) > here for name in others):
        return f"it came with {_version(load_schema(others[0]))}"
    return f"only of {', '.join(_version(load_schema(name)) for name in others)}"


def _renamed(schema: Schema, path: str) -> str | None:
    """What this schema calls an argument that another version has under `path`."""
    for row in facts("lines")["renamed"]:
        for here, there in ((row["from"], row["to"]), (row["to"], row["from"])):
            if path == here and schema.has(there):
                return str(there)
    return None


def _version(schema: Schema) -> str:
    """How a message calls a schema: the release, or the line with its commit."""
    header = schema.header
    return f"TensorRT-LLM {header.release}" if header.release else f"TensorRT-LLM {header.name} ({header.commit[:8]})"


def _is_scalar(value: Any, name: str) -> bool:
    match name:
        case "None":
            return value is None
        case "bool":
            return isinstance(value, bool)
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "float":
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case _:
            return isinstance(value, str)


def _described(name: str) -> str:
    return {"bool": "true or false", "int": "a whole number", "float": "a number", "None": "null"}.get(name, "text")


def _within(value: float, name: str, limit: float) -> bool:
    return {"ge": value >= limit, "gt": value > limit, "le": value <= limit, "lt": value < limit}[name]


def _near(value: Any, kind: Kind) -> str:
    words = [str(item) for part in kind.parts if part.name == "Literal" for item in part.parts]
    near = difflib.get_close_matches(str(value), words, n=1)
    return f"did you mean {near[0]}?" if near else ""
