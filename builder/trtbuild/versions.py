"""`trtbuild doctor --versions`: the tables of TensorRT-LLM's releases, as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from trtbuild.compat import facts
from trtbuild.console import table
from trtbuild.llm_schema import schema_header, schema_names
from trtbuild.releases import Container, Line, containers, lines

UNKNOWN = "unknown"
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
        "schemas": [asdict(schema_header(name)) | {"date": str(schema_header(name).date)} for name in schema_names()],
        "quantization": [row | {"date": str(row["date"])} for row in facts("gpus")["support"]],
        "gpus": facts("gpus")["names"]["sm"],
        "speculation": [row | {"date": str(row["date"])} for row in facts("speculative")["method"]],
        "architectures": {flow: facts("architectures")[flow]["classes"] for flow in ("llm-api", "engine")},
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
    formats = [
        [
            algo.removeprefix("kv:") + (" KV cache" if algo.startswith("kv:") else ""),
            ", ".join(row["lines"]),
            _sm(found),
        ]
        for row in facts("gpus")["support"]
        for algo, found in row["sm"].items()
    ]
    sections = [
        ("Triton containers (nvcr.io/nvidia/tritonserver:TAG-trtllm-python-py3)", [[*names, "flows"], *images]),
        ("TensorRT-LLM release lines", [["line", "versions", "flows", "LLM arguments", *_BASE], *releases]),
        ("quantization by GPU architecture", [["format", "lines", "runs on"], *formats]),
    ]
    return "\n\n".join(f"{title}\n{table(rows)}" for title, rows in sections)


def _line(container: Container) -> Line:
    return next(line for line in lines() if line.has(container.tensorrt_llm))


def _schema(line: Line) -> str:
    if line.schema is None:
        return "-"
    header = schema_header(line.schema)
    proven = f"proven for {header.release}" if header.release else "not proven for a release"
    return f"{header.name} ({header.commit[:8]}, {proven})"


def _base(line: Line) -> list[str]:
    return [line.base.get(name, UNKNOWN) for name in _BASE]


def _sm(found: list[int]) -> str:
    return ", ".join(f"SM{version}" for version in found)


def _origin(data: Any) -> dict[str, str]:
    return {"source": data["source"], "date": str(data["date"])}
