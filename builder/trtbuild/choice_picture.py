"""The picture of a choice of formats: every layer against how much the model suffers from it in each format, as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

_ROW, _TOP, _LEFT, _WIDTH, _RIGHT = 18, 64, 300, 560, 150
_BELOW = 36
_COLORS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#a6761d", "#666666")
_FONT = 'font-family="sans-serif" font-size="11"'


def draw(choice: Mapping[str, Any], bits: float | None) -> str:
    """An SVG document: one row for each group of layers, one dot for each format, the chosen one filled.

    Args:
        choice: The table as the compress step records it: ``groups`` with ``layers``, ``chosen`` and ``choices``.
        bits: Bits of a weight in the files, if they are known.
    """
    groups: Sequence[Mapping[str, Any]] = choice["groups"]
    formats = sorted({item["format"] for group in groups for item in group["choices"]})
    color = dict(zip(formats, _COLORS * 2, strict=False))
    scores = [item["sensitivity"] for group in groups for item in group["choices"] if item["sensitivity"] > 0]
    low, high = (math.floor(math.log10(min(scores))), math.ceil(math.log10(max(scores)))) if scores else (0, 1)
    scale = _Scale(low, max(high, low + 1))
    height = _TOP + _ROW * len(groups) + _BELOW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + _RIGHT}" height="{height}">',
        f'<rect width="100%" height="100%" fill="white"/><g {_FONT}>',
        f'<text x="10" y="20" font-size="14">{escape(_title(choice, bits))}</text>',
        *_legend(formats, color),
        *_axis(scale, height),
    ]
    for index, group in enumerate(groups):
        parts += _row(group, _TOP + _ROW * index + _ROW // 2, scale, color)
    return "\n".join([*parts, "</g></svg>", ""])


class _Scale:
    """A logarithmic axis from ten to the power of `low` to that of `high`; zero stands left of it."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high

    def at(self, value: float) -> float:
        """The position of a value in the picture."""
        if value <= 0:
            return float(_LEFT)
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return round(_LEFT + 20 + share * (_WIDTH - 20), 1)


def _title(choice: Mapping[str, Any], bits: float | None) -> str:
    found = "" if bits is None else f", {bits:g} in the files"
    return f"Sensitivity of layers by format ({choice['method']}); {choice['target_bits']:g} bits wanted{found}"


def _legend(formats: Sequence[str], color: Mapping[str, str]) -> Iterator[str]:
    left = 10
    for name in formats:
        shown = "bf16" if name == "none" else name
        yield f'<circle cx="{left + 5}" cy="38" r="5" fill="{color[name]}"/>'
        yield f'<text x="{left + 15}" y="42">{escape(shown)}</text>'
        left += 30 + 8 * len(shown)
    yield f'<text x="{left}" y="42" fill="#555">filled: chosen; to the right of each row: how it is stored</text>'


def _axis(scale: _Scale, height: int) -> Iterator[str]:
    bottom = height - _BELOW + 6
    for power in range(scale.low, scale.high + 1):
        x = scale.at(10.0**power)
        yield f'<line x1="{x}" y1="{_TOP - 4}" x2="{x}" y2="{bottom}" stroke="#ddd"/>'
        yield f'<text x="{x}" y="{bottom + 14}" text-anchor="middle" fill="#555">1e{power}</text>'
    yield f'<text x="{_LEFT}" y="{bottom + 14}" text-anchor="middle" fill="#555">0</text>'


def _row(group: Mapping[str, Any], y: int, scale: _Scale, color: Mapping[str, str]) -> Iterator[str]:
    yield f'<line x1="{_LEFT}" y1="{y}" x2="{_LEFT + _WIDTH}" y2="{y}" stroke="#eee"/>'
    yield f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(_name(group["layers"]))}</text>'
    for item in sorted(group["choices"], key=lambda item: item["format"] == group["chosen"]):
        fill = color[item["format"]] if item["format"] == group["chosen"] else "white"
        x = scale.at(item["sensitivity"])
        yield f'<circle cx="{x}" cy="{y}" r="5" fill="{fill}" stroke="{color[item["format"]]}" stroke-width="2"/>'
    shown = "bf16" if group["chosen"] == "none" else group["chosen"]
    yield f'<text x="{_LEFT + _WIDTH + 14}" y="{y + 4}">{escape(shown)}</text>'


def _name(layers: Sequence[str]) -> str:
    """One layer's name, or what several have in common with their last parts."""
    if len(layers) == 1:
        return layers[0].removeprefix("model.")
    parents = {layer.rpartition(".")[0] for layer in layers}
    leaves = sorted({layer.rpartition(".")[2] for layer in layers})
    if len(parents) == 1:
        return f"{parents.pop().removeprefix('model.')}.{{{','.join(leaves)}}}"
    first = min(parents).removeprefix("model.")
    return f"{first} and {len(parents) - 1} more: {','.join(leaves)}"
