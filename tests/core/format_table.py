"""The table of docs/formats.md, made of the tables that decide; `python tests/core/format_table.py` prints it."""

from __future__ import annotations

from trtbuild.compat import facts
from trtbuild.releases import lines

# What is stored, and what becomes of inputs, in the words of the page.
WORDS = {
    "fp8": ("E4M3, one scale", "E4M3, one calibrated scale"),
    "fp8_per_channel_per_token": ("E4M3, a scale an output", "E4M3, a scale a token"),
    "fp8_block": ("E4M3, a scale for 128 x 128", "as they are"),
    "int8_sq": ("INT8, a scale an output", "smoothed, INT8, one calibrated scale"),
    "int8_weight_only": ("INT8, a scale an output", "as they are"),
    "int4_awq": ("INT4, a scale a group", "smoothed"),
    "int4_gptq": ("as int4_awq, rounded by Hessians", "as they are"),
    "w4a8_awq": ("INT4, a scale a group, rounded to E4M3", "smoothed, E4M3, one calibrated scale"),
    "nvfp4": ("E2M1, E4M3 scales for 16, one scale", "the same, blocks as they come"),
    "nvfp4_awq": ("as nvfp4, searched; made on a GPU only", "smoothed, as nvfp4"),
    "w4a16_nvfp4": ("as nvfp4", "as they are"),
    "mxfp4": ("E2M1, powers of two for 32", "the same, blocks as they come"),
    "mxfp8": ("E4M3, powers of two for 32", "the same, blocks as they come"),
}
CACHES = {
    "fp8": "E4M3, a scale for keys and one for values of a layer",
    "nvfp4": "E2M1, E4M3 scales for 16, one scale",
    "int8": "INT8, a scale for keys and one for values",
}


def _lines(names: list[str]) -> str:
    known = [line.name for line in lines() if "llm-api" in line.flows]
    if not names:
        return "no"
    assert names == known[known.index(names[0]) :]
    return "yes" if names == known else f"from {names[0]}"


def _gpus(algo: str) -> str:
    """The architectures of the newest table that has the format."""
    found = [(row["name"], row["sm"][algo]) for row in facts("gpus")["support"] if algo in row["sm"]]
    chosen = next((sm for name, sm in found if name == "1.2"), found[-1][1] if found else [])
    return ", ".join(f"SM{version}" for version in chosen) or "-"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def weights() -> str:
    """Formats of weights."""
    rows = ["| `compress.format` | weights | inputs | embedded | LLM API | engines | GPUs, TensorRT-LLM | vLLM |"]
    rows.append("|---|---|---|---|---|---|---|---|")
    for name, row in facts("formats")["weights"].items():
        stored, inputs = WORDS[name]
        where = f"yes | {_lines(row['llm_api'])} | {_yes(row['engine'])} | {_gpus(row['algo'])} | {_yes(row['vllm'])}"
        rows.append(f"| `{name}` | {stored} | {inputs} | {where} |")
    return "\n".join(rows) + "\n"


def caches() -> str:
    """Formats of the KV cache."""
    rows = ["| `compress.kv_cache` | stored | embedded | LLM API | engines | GPUs, TensorRT-LLM | vLLM |"]
    rows.append("|---|---|---|---|---|---|---|")
    for name, row in facts("formats")["kv_cache"].items():
        where = f"{_yes(row['embedded'])} | {_lines(row['llm_api'])} | {_yes(row['engine'])}"
        rows.append(f"| `{name}` | {CACHES[name]} | {where} | {_gpus('kv:' + row['algo'])} | {_yes(row['vllm'])} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(weights())
    print(caches())
