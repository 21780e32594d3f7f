"""The picture of `format_quality.py`: divergence from the original model against bits per weight, as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

_LEFT, _TOP, _WIDTH, _HEIGHT = 70, 56, 560, 360
_RIGHT, _BELOW = 170, 56
_FROM_BITS, _TO_BITS = 4.0, 8.5
_ROW = 13  # pixels between names, at least
# The beginning of a case's name says its kind; the first that fits counts.
_KINDS = (
    ("by layer", "#e7298a", ("auto",)),
    ("2:4", "#666666", ("2to4",)),
    ("8-bit floats", "#1f77b4", ("fp8", "mxfp8")),
    ("INT8", "#1b9e77", ("int8",)),
    ("INT4", "#d95f02", ("int4", "w4a8")),
    ("FP4", "#7570b3", ("nvfp4", "w4a16", "mxfp4")),
)


def draw(results: Sequence[dict[str, Any]]) -> str:
    """An SVG document: a dot for each case with an ordinary KV cache, bf16 left out; lower and further left is better.

    Args:
        results: Rows of the benchmark: ``case``, ``kv_cache``, ``bits`` and, where it was measured, ``kl`` in ``ours``.
    """
    rows = [row for row in results if row["kv_cache"] == "none" and "ours" in row and row["bits"] < 16]
    logs = [math.log10(row["ours"]["kl"]) for row in rows]
    low, high = (math.floor(min(logs)), math.ceil(max(logs))) if rows else (-1, 0)

    def x(bits: float) -> float:
        return round(_LEFT + (bits - _FROM_BITS) / (_TO_BITS - _FROM_BITS) * _WIDTH, 1)

    def y(power: float) -> float:
        return round(_TOP + (high - power) / (high - low) * _HEIGHT, 1)

    width, height, bottom = _LEFT + _WIDTH + _RIGHT, _TOP + _HEIGHT + _BELOW, _TOP + _HEIGHT
    middle, halfway = _LEFT + _WIDTH // 2, _TOP + _HEIGHT // 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">',
        '<rect width="100%" height="100%" fill="white"/><g font-family="sans-serif" font-size="11">',
        '<text x="10" y="20" font-size="14">KL divergence from the original model against bits per weight</text>',
        *_legend([row["case"] for row in rows]),
    ]
    for bits in (4, 5, 6, 7, 8):
        parts.append(f'<line x1="{x(bits)}" y1="{_TOP}" x2="{x(bits)}" y2="{bottom}" stroke="#eee"/>')
        parts.append(f'<text x="{x(bits)}" y="{bottom + 16}" text-anchor="middle">{bits}</text>')
    for power in range(low, high + 1):
        parts.append(f'<line x1="{_LEFT}" y1="{y(power)}" x2="{_LEFT + _WIDTH}" y2="{y(power)}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(power) + 4}" text-anchor="end">{10.0**power:g}</text>')
    below = f'<text x="{middle}" y="{bottom + 36}" text-anchor="middle">'
    parts.append(f"{below}bits of a weight in the file, scales included</text>")
    beside = f'<text x="20" y="{halfway}" text-anchor="middle" transform="rotate(-90 20 {halfway})">'
    parts.append(f"{beside}KL divergence, nats a token</text>")
    dots = [(x(row["bits"]), y(math.log10(row["ours"]["kl"])), row["case"]) for row in rows]
    for left in (True, False):
        half = [dot for dot in dots if (dot[0] < middle) == left]
        parts += _dots(sorted(half, key=lambda dot: dot[1]))
    return "\n".join([*parts, "</g></svg>", ""])


def _dots(dots: Sequence[tuple[float, float, str]]) -> Iterator[str]:
    """Dots from top to bottom with their names to the right, pushed down where they would touch the one above."""
    above = -math.inf
    for x, y, name in dots:
        above = max(y + 4, above + _ROW)
        side = max(other for other, _, _ in dots) + 26
        yield f'<line x1="{x}" y1="{y}" x2="{side - 3}" y2="{above - 4}" stroke="#bbb"/>'
        yield f'<circle cx="{x}" cy="{y}" r="5" fill="{_color(name)}"/>'
        yield f'<text x="{side}" y="{above}">{escape(name)}</text>'


def _color(name: str) -> str:
    return next((color for _, color, starts in _KINDS if name.startswith(starts)), "black")


def _legend(names: Sequence[str]) -> Iterator[str]:
    left, seen = 10, {_color(name) for name in names}
    for shown, color, _ in _KINDS:
        if color not in seen:
            continue
        yield f'<circle cx="{left + 5}" cy="36" r="5" fill="{color}"/>'
        yield f'<text x="{left + 15}" y="40">{escape(shown)}</text>'
        left += 32 + 7 * len(shown)
