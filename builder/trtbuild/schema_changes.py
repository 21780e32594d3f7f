"""What became of the LLM API's arguments from one schema to the next: fields, their types, defaults and names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from trtbuild.compat import facts
from trtbuild.llm_schema import Field, Schema


def changes(old: Schema, new: Schema) -> list[tuple[str, str]]:
    """The classes that differ, and what is other about each, in words; the names are upstream's."""
    renamed = {row["from"].rpartition(".")[2]: row["to"] for row in facts("lines")["renamed"]}
    found = []
    for name in sorted(set(old.classes) | set(new.classes)):
        if name not in new.classes:
            found.append((name, "removed"))
        elif name not in old.classes:
            found.append((name, f"new: {', '.join(new.classes[name])}" if new.classes[name] else "new, without fields"))
        else:
            said = "; ".join(_fields(old.classes[name], new.classes[name], renamed))
            found += [(name, said)] if said else []
    return [*found, *_choices(old, new)]


def _fields(old: Mapping[str, Field], new: Mapping[str, Field], renamed: Mapping[str, str]) -> Iterator[str]:
    """What is other about the fields of one class."""
    gone = [name for name in old if name not in new]
    called = {name: _within(renamed[name], new) for name in gone if name in renamed}
    added = [name for name in new if name not in old and name not in called.values()]
    removed = [name for name in gone if name not in called]
    if added:
        yield f"added {', '.join(added)}"
    if removed:
        yield f"removed {', '.join(removed)}"
    for name, other in called.items():
        yield f"{name} is now {other}"
    for name in (name for name in new if name in old):
        before, now = old[name], new[name]
        if before.type != now.type:
            yield f"{name}: {now.type} instead of {before.type}"
        if _default(before) != _default(now):
            yield f"{name} defaults to {_default(now)} instead of {_default(before)}"
        if now.status == "deprecated" and before.status != "deprecated":
            yield f"{name} is deprecated"


def _within(path: str, fields: Mapping[str, Field]) -> str:
    """The new name of a field, as a path only where it stands in another class."""
    name = path.rpartition(".")[2]
    return name if name in fields else path


def _default(field: Field) -> str:
    if field.required:
        return "nothing"
    return "what no file says" if field.default_unknown else str(field.default)


def _choices(old: Schema, new: Schema) -> Iterator[tuple[str, str]]:
    """Values of enums and members of choices between classes."""
    for name in sorted(set(old.enums) & set(new.enums)):
        before, now = old.enums[name].values, new.enums[name].values
        said = [f"also {value}" for value in now if value not in before]
        said += [f"no more {value}" for value in before if value not in now]
        if said:
            yield name, "; ".join(said)
    for name in sorted(set(old.unions) & set(new.unions)):
        theirs, ours = old.unions[name].members, new.unions[name].members
        said = [f"also {key}" for key in ours if key not in theirs]
        said += [f"no more {key}" for key in theirs if key not in ours]
        if said:
            yield name, "; ".join(said)
