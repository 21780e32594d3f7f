"""What the conversion does with every architecture in every format on every division: one table, and no cell untested.

The tests are parametrized over `CELLS`, which is the whole product: a cell that is not in `REFUSED` or `DIVIDED` must
be converted, one that is must be refused with that sentence.
"""

from __future__ import annotations

from itertools import product

from synthetic import MODELS

# column: (quant_algo, KV cache, type of what is not quantized)
FORMATS: dict[str, tuple[str, str | None, str]] = {
    "bf16": ("bf16", None, "auto"),
    "fp16": ("bf16", None, "float16"),
    "FP8": ("FP8", None, "auto"),
    "FP8 + FP8 KV": ("FP8", "FP8", "auto"),
    "W4A16-AWQ": ("W4A16_AWQ", None, "auto"),
    "W4A8-AWQ": ("W4A8_AWQ", None, "auto"),
    "INT8-SQ": ("W8A8_SQ_PER_CHANNEL", None, "auto"),
    "NVFP4": ("NVFP4", None, "auto"),
    "INT8 KV": ("bf16", "INT8", "auto"),
    "mixed": ("MIXED_PRECISION", None, "auto"),
}
# (tensor parallel, pipeline stages): 4 is more than the key and value heads, 2 stages do not divide 3 layers.
DIVISIONS = ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 3))
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")

_NO_W4A8 = "layer cannot load W4A8_AWQ from a checkpoint: its loader has no shape of weights_scaling_factor_2"
_NO_INT8 = "layer cannot load W8A8_SQ_PER_CHANNEL from a checkpoint: the layer has no scales for 8-bit integers"
_NO_MIXED = "mixture-of-experts layer takes its format from all layers together"
REFUSED: dict[tuple[str, str], str] = {
    (name, column): sentence
    for name in EXPERTS
    for column, sentence in (("W4A8-AWQ", _NO_W4A8), ("INT8-SQ", _NO_INT8), ("mixed", _NO_MIXED))
}
DIVIDED: dict[str, str] = {"phi3": "TensorRT-LLM cannot split this model over pipeline stages"}

Cell = tuple[str, str, tuple[int, int]]
CELLS: list[Cell] = list(product(MODELS, FORMATS, DIVISIONS))


def refused(cell: Cell) -> str | None:
    """The sentence that refuses a cell; None where it is converted."""
    name, column, (_, stages) = cell
    return DIVIDED.get(name) if stages > 1 and name in DIVIDED else REFUSED.get((name, column))


_NOTES = {_NO_W4A8: "a", _NO_INT8: "b", _NO_MIXED: "c"}


def markdown() -> str:
    """The matrix as the page on TensorRT engines shows it."""
    head = ["model", *FORMATS, "pipeline stages"]
    rows = [head, ["---"] * len(head)]
    for name in MODELS:
        cells = [refused((name, column, (2, 1))) for column in FORMATS]
        shown = ["yes" if reason is None else f"no ({_NOTES[reason]})" for reason in cells]
        rows.append([name, *shown, "no (d)" if name in DIVIDED else "any number"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
