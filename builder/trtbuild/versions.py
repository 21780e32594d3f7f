"""`trtbuild doctor --versions`: the tables of TensorRT-LLM's releases, as text and as JSON."""

from __future__ import annotations

import itertools
import textwrap
from dataclasses import asdict, fields
from typing import Any

from trtbuild.build_flags import FlagTable, flag_tables
from trtbuild.compat import facts
from trtbuild.console import table
from trtbuild.llm_schema import load_schema, schema_header, schema_names
from trtbuild.model_classes import class_lists
from trtbuild.releases import Container, Line, containers, line_of, lines
from trtbuild.schema_changes import changes

UNKNOWN = "unknown"
_WIDTH = 120  # of the widest column
_SCHEMA_HEAD = ["schema", "fields", "read from", "commit", "holds for"]
_FLAG_HEAD = ["lines", "flags", "read from", "commit", "holds for", "against the table before"]
_CONTAINERS = (
    "Triton containers (nvcr.io/nvidia/tritonserver:TAG-trtllm-python-py3); transformers and modelopt as the wheel of "
    "that TensorRT-LLM requires them"
)
_BASE = ("torch", "tensorrt", "cuda", "transformers", "modelopt", "image")


def versions_json() -> dict[str, Any]:
    """Every table with its sources; an unknown cell is null."""
    return {
        "containers": [
            asdict(container) | {"image": container.image, "flows": list(_line(container).flows)}
            for container in containers()
        ],
        "containers_source": _origin(facts("containers")),
        "lines": [
            {**row, "base": {name: row.get("base", {}).get(name) for name in _BASE}, "date": str(row["date"])}
            for row in facts("lines")["line"]
        ],
        "build_flags": [
            {
                field.name: getattr(table, field.name)
                for field in fields(FlagTable)
                if field.name not in ("flags", "date")
            }
            | {"date": str(table.date), "flags": {name: asdict(flag) for name, flag in table.flags.items()}}
            for table in flag_tables()
        ],
        "schemas": [_schema_json(name) for name in schema_names()],
        "quantization": [row | {"date": str(row["date"])} for row in facts("gpus")["support"]],
        "gpus": facts("gpus")["names"]["sm"],
        "speculation": [row | {"date": str(row["date"])} for row in facts("speculative")["method"]],
        "architectures": {
            "llm-api": [row | {"date": str(row["date"])} for row in facts("architectures")["llm-api"]],
            "engine": facts("architectures")["engine"]["classes"],
        },
        "engine_architectures_since": facts("architectures")["engine"]["since"],
    }


def versions_text() -> str:
    """The tables for people."""
    names = [field.name for field in fields(Container)]
    images = [
        [*(getattr(container, name) or UNKNOWN for name in names), ", ".join(_line(container).flows)]
        for container in containers()
    ]
    releases = [
        [line.name, f"{line.first} to {line.last}", ", ".join(line.flows), _schema(line), *_base(line)]
        for line in reversed(lines())
    ]
    sections = [
        (_CONTAINERS, [[*names, "flows"], *images]),
        ("TensorRT-LLM release lines", [["line", "versions", "flows", "LLM arguments", *_BASE], *releases]),
        ("LLM arguments", [_SCHEMA_HEAD, *map(_schema_row, schema_names())]),
        ("LLM arguments against the schema before", [["schema", "class", "what is other"], *_argument_rows()]),
        ("flags of trtllm-build", [_FLAG_HEAD, *_flag_rows()]),
        ("quantization: the SM versions that run a format, by release line", _format_rows()),
        ("speculative decoding", [["method", "LLM API", "trtllm-build", "needs a draft"], *_speculation_rows()]),
        ("architectures", [["flow", "classes"], *_architecture_rows()]),
    ]
    return "\n\n".join(f"{title}\n{table(rows)}" for title, rows in sections)


def _schema_row(name: str) -> list[str]:
    header, schema = schema_header(name), load_schema(name)
    count = sum(map(len, schema.classes.values()))
    return [name, str(count), header.repo, header.commit[:8], header.release or f"no release: {header.era}"]


def _schema_json(name: str) -> dict[str, Any]:
    """Where a schema was read, and every argument of every class: type, default, bounds, status, other spellings."""
    schema = load_schema(name)
    classes = {one: {field: asdict(entry) for field, entry in known.items()} for one, known in schema.classes.items()}
    return asdict(schema.header) | {"date": str(schema.header.date), "classes": classes}


def _argument_rows() -> list[list[str]]:
    rows = []
    for old, new in itertools.pairwise(load_schema(name) for name in schema_names()):
        for name, said in changes(old, new):
            pieces = textwrap.wrap(said, _WIDTH, break_on_hyphens=False)
            rows += [[new.header.name, name, pieces[0]], *(["", "", piece] for piece in pieces[1:])]
    return rows


def _flag_rows() -> list[list[str]]:
    """One row a table, newest first, with what it has other than the table before it."""
    tables = flag_tables()
    return [
        [
            ", ".join(one.lines),
            str(len(one.flags)),
            one.repo,
            one.commit[:8],
            ", ".join(one.releases) or "no release: nearest",
            "; ".join(_changes(before, one)) if before else "-",
        ]
        for before, one in reversed(list(zip([None, *tables], tables, strict=False)))
    ]


def _changes(old: FlagTable, new: FlagTable) -> list[str]:
    """What became of the flags from one table to the next, in words."""
    added, gone = sorted(set(new.flags) - set(old.flags)), sorted(set(old.flags) - set(new.flags))
    said = [f"added {', '.join(added)}"] if added else []
    said += [f"removed {', '.join(gone)}"] if gone else []
    for name in sorted(set(old.flags) & set(new.flags)):
        before, now = old.flags[name], new.flags[name]
        if before.default != now.default:
            said.append(f"{name} now {now.default}")
        elif before.kind != now.kind:
            said.append(f"{name} now takes a {now.kind}")
        elif before.allowed != now.allowed:
            said.append(f"{name} also {', '.join(value for value in now.allowed if value not in before.allowed)}")
    return said or ["the same"]


def _format_rows() -> list[list[str]]:
    """One column for each table of upstream's, and "-" where it leaves a format out."""
    tables = facts("gpus")["support"]
    algos = list(dict.fromkeys(algo for row in reversed(tables) for algo in row["sm"]))
    head = ["format", *(", ".join(row["lines"]) for row in tables)]
    return [head, *([_called(algo), *(_versions(row["sm"].get(algo, [])) for row in tables)] for algo in algos)]


def _called(algo: str) -> str:
    return algo.removeprefix("kv:") + (" KV cache" if algo.startswith("kv:") else "")


def _versions(found: list[int]) -> str:
    return " ".join(map(str, found)) or "-"


def _speculation_rows() -> list[list[str]]:
    rows = []
    for row in facts("speculative")["method"]:
        draft = "yes" if row["needs_draft"] else "no"
        rows.append([row["name"], _spellings(row.get("decoding_type", {})), row.get("engine", "-"), draft])
    return rows


def _spellings(names: dict[str, str]) -> str:
    """The LLM API's names, each with the schemas that have it."""
    groups: dict[str, list[str]] = {}
    for schema, name in names.items():
        groups.setdefault(name, []).append(schema)
    return "; ".join(f"{name} ({', '.join(schemas)})" for name, schemas in groups.items()) or "-"


def _architecture_rows() -> list[list[str]]:
    """The LLM API's lists as what each has more and less than the one before, then the engines' classes."""
    rows, before = [], None
    for one in class_lists():
        title = f"LLM API, {', '.join(one.lines)} (read: {', '.join(one.releases) or 'the newest list'})"
        if before is None:
            rows += _in_fours(title, sorted(one.classes))
        else:
            rows += _in_fours(title, [f"+ {name}" for name in sorted(one.classes - before.classes)])
            rows += _in_fours("", [f"- {name}" for name in sorted(before.classes - one.classes)])
        if one.autodeploy:
            rows += _in_fours("  AutoDeploy backend only", sorted(one.autodeploy))
        before = one
    engine = facts("architectures")["engine"]
    since = engine["since"]
    return rows + _in_fours(
        "engine", [f"{one} (from {since[one]})" if one in since else one for one in engine["classes"]]
    )


def _in_fours(title: str, names: list[str]) -> list[list[str]]:
    return [[title if at == 0 else "", ", ".join(names[at : at + 4])] for at in range(0, len(names), 4)]


def _line(container: Container) -> Line:
    return line_of(container.tensorrt_llm)


def _schema(line: Line) -> str:
    if line.schema is None:
        return "-"
    header = schema_header(line.schema)
    proven = f"proven for {header.release}" if header.release else "not proven for a release"
    return f"{header.name} ({header.commit[:8]}, {proven})"


def _base(line: Line) -> list[str]:
    return [line.base.get(name, UNKNOWN) for name in _BASE]


def _origin(data: Any) -> dict[str, str]:
    return {"source": data["source"], "date": str(data["date"])}
