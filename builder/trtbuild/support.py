"""What TensorRT-LLM supports, by GPU architecture, model class and release line: look-ups in ``_compat/``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trtbuild.compat import facts
from trtbuild.errors import Problem
from trtbuild.releases import Line, lines

# The recipe's weight formats under the names that TensorRT-LLM gives them (`quant_algo` of hf_quant_config.json), or
# ModelOpt where TensorRT-LLM has none. Who loads which: `format_support`.
QUANT_ALGO: Mapping[str, str | None] = {
    "none": None,
    "fp8": "FP8",
    "fp8_per_channel_per_token": "FP8_PER_CHANNEL_PER_TOKEN",
    "fp8_block": "FP8_BLOCK_SCALES",
    "int8_sq": "W8A8_SQ_PER_CHANNEL",
    "int8_weight_only": "W8A16",
    "int4_awq": "W4A16_AWQ",
    "int4_gptq": "W4A16_AWQ",
    "w4a8_awq": "W4A8_AWQ",
    "nvfp4": "NVFP4",
    "nvfp4_awq": "NVFP4_AWQ",
    "w4a16_nvfp4": "W4A16_NVFP4",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
}
MIXED = "MIXED_PRECISION"


def quant_algo(formats: Sequence[str]) -> str | None:
    """TensorRT-LLM's name for a checkpoint whose layers have these formats, bf16 left out."""
    return MIXED if len(formats) > 1 else QUANT_ALGO[formats[0] if formats else "none"]


@dataclass(frozen=True, slots=True)
class SpeculativeMethod:
    """One method: the LLM API's name per argument schema, trtllm-build's name, and whether it takes a draft."""

    name: str
    decoding_type: Mapping[str, str]
    engine: str | None
    needs_draft: bool


def sm_version(gpu: str) -> int | None:
    """The SM version of a GPU's name, such as ``H100``, ``NVIDIA A100-SXM4-80GB`` or ``l40s``; None if unknown."""
    words = _words(gpu)
    fitting = [
        (len(known), version)
        for name, version in facts("gpus")["names"]["sm"].items()
        if (known := _words(name)) == words[: len(known)]
    ]
    return max(fitting)[1] if fitting else None


def _words(name: str) -> list[str]:
    """A GPU's name in lower-case words, without what every name may have in front."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    while words and words[0] in {"nvidia", "geforce", "tesla"}:
        words = words[1:]
    return words


def unknown_gpu(gpu: str) -> Problem:
    """The refusal of a GPU that no table has."""
    names = list(facts("gpus")["names"]["sm"])
    near = difflib.get_close_matches(gpu, names, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(names)}"
    return Problem("target.gpu", f"{gpu!r} is no known GPU", hint)


def refused_format(line: Line, algo: str | None, sm: int) -> str | None:
    """Why a format does not run on an architecture in this release line, or None.

    Args:
        line: the release line, which decides the table.
        algo: ``quant_algo``, ``kv:`` and the algorithm of the KV cache, or None for bf16.
        sm: the architecture.
    """
    data = facts("gpus")
    if algo is None:
        least = data["plain"]["least_sm"]
        return None if sm >= least else f"TensorRT-LLM runs bf16 from SM{least} on"
    table = next((row for row in data["support"] if line.name in row["lines"]), None)
    if table is None:
        return None
    listed = table["sm"].get(algo, [])
    if sm in listed:
        return None
    names = ", ".join(f"SM{version}" for version in listed) or "none"
    return f"TensorRT-LLM {line.name} lists {algo.removeprefix('kv:')} for {names} only"


def group_sizes(algo: str) -> tuple[int, ...]:
    """The sizes of INT4 groups that TensorRT-LLM's kernels take; empty for formats without groups of INT4 weights."""
    found = facts("gpus")["groups"].get(algo, [])
    return tuple(found)


def refused_architecture(architecture: str) -> str | None:
    """Why no TensorRT engines are built of models of this class, or None."""
    if architecture in facts("architectures")["engine"]["classes"]:
        return None
    return f"{architecture} is not among the classes that TensorRT-LLM lists for its engine flow"


def refused_in_line(line: Line, architecture: str, algo: str | None) -> tuple[str, str] | None:
    """Why engines of this release line cannot have a class that the flow lists, in this format, and what to do."""
    table = facts("architectures")["engine"]
    names = [known.name for known in lines()]
    in_format = table["formats_since"].get(architecture, {}).get(algo)
    for first, what in ((table["since"].get(architecture), ""), (in_format, f" in {algo}")):
        if first is not None and names.index(line.name) < names.index(first):
            said = f"TensorRT-LLM {line.name} builds no engines of {architecture}{what}"
            return f"{said}, {first} is the first that trtbuild knows to", f"use a runtime.version from {first} on"
    if algo in table["unloadable"].get(architecture, ()):
        return f"TensorRT-LLM's own class for {architecture} cannot load {algo} experts", "use another compress.format"
    return None


def refused_scaling(line: Line, kind: str | None) -> str | None:
    """Why engines of this release line cannot have this rotary scaling."""
    first, names = facts("architectures")["engine"]["scalings_since"].get(kind), [known.name for known in lines()]
    if first is None or names.index(line.name) >= names.index(first):
        return None
    said = f"rotary scaling {kind!r}: TensorRT-LLM {line.name} builds no engines with it"
    return f"{said}, {first} is the first that trtbuild knows to"


def speculative_method(name: str) -> SpeculativeMethod:
    """One speculative method by the recipe's name."""
    row = next(row for row in facts("speculative")["method"] if row["name"] == name)
    return SpeculativeMethod(name, row.get("decoding_type", {}), row.get("engine"), row["needs_draft"])
