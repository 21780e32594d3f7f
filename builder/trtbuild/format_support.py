"""Which runtime loads which format, and what is nearest where one does not: look-ups in ``_compat/formats.toml``.

The embedded engine loads every format of weights; what TensorRT-LLM's two flows load depends on the release line, and
on the GPU's architecture (`support.refused_format`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from trtbuild.compat import facts
from trtbuild.releases import Flow, Line
from trtbuild.support import refused_format

Part = Literal["weights", "kv_cache"]
_LEFT_ALONE = "none"


def _row(part: Part, name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = facts("formats")[part][name]
    return found


def algorithm(part: Part, name: str) -> str | None:
    """The format under the name that `refused_format` knows: ``quant_algo``, with ``kv:`` for a KV cache."""
    if name == _LEFT_ALONE:
        return None
    return f"kv:{_row(part, name)['algo']}" if part == "kv_cache" else str(_row(part, name)["algo"])


def recipe_name(part: Part, algo: str) -> str:
    """The recipe's name of a format that TensorRT-LLM calls `algo`."""
    return next(name for name, row in facts("formats")[part].items() if row["algo"] == algo)


def needs_gpu(weight_format: str) -> bool:
    """Whether the format can be made on a GPU only."""
    return weight_format != _LEFT_ALONE and bool(_row("weights", weight_format).get("gpu_only"))


def refused_embedded(kv_cache: str) -> str | None:
    """Why the embedded engine has no such KV cache, or None."""
    if kv_cache == _LEFT_ALONE or _row("kv_cache", kv_cache)["embedded"]:
        return None
    return str(_row("kv_cache", kv_cache)["why"])


def refused_flow(part: Part, name: str, flow: Flow, line: Line) -> str | None:
    """Why a flow of a release line does not load a format, on whatever GPU, or None."""
    if name == _LEFT_ALONE:
        return None
    row = _row(part, name)
    if row["engine"] if flow == "engine" else line.name in row["llm_api"]:
        return None
    if flow == "llm-api" and row["llm_api"]:
        first = row["llm_api"][0]
        return f"the LLM API of TensorRT-LLM loads it from {first} on"
    return str(row["why"])


def refused_experts(weight_format: str, flow: Flow) -> str | None:
    """Why a flow that loads a format does not load experts in it, or None."""
    if weight_format == _LEFT_ALONE:
        return None
    found: Mapping[str, str] = _row("weights", weight_format).get("experts", {})
    return found.get(flow)


def refused_gpu(part: Part, name: str, flow: Flow, line: Line, sm: int) -> str | None:
    """Why a format that a flow of a release line loads does not run on an architecture, or None."""
    if (part, name) == ("kv_cache", _LEFT_ALONE):
        return None
    if flow == "engine" and name != _LEFT_ALONE and sm in _row(part, name).get("engine_not_on", ()):
        return f"trtllm-build refuses INT4 and INT8 on SM{sm}"
    return refused_format(line, algorithm(part, name), sm)


def refused(part: Part, name: str, flow: Flow, line: Line, sm: int | None) -> str | None:
    """Why a flow of a release line does not load a format on an architecture (None: on none in particular), or None."""
    why = refused_flow(part, name, flow, line)
    return why if why is not None or sm is None else refused_gpu(part, name, flow, line, sm)


def nearest(part: Part, name: str, flow: Flow, line: Line, sm: int | None) -> str | None:
    """The format that comes closest to a refused one and is loaded there, which may be none; None where nothing is."""
    others = () if name == _LEFT_ALONE else (*_row(part, name)["nearest"], _LEFT_ALONE)
    return next((other for other in others if refused(part, other, flow, line, sm) is None), None)
