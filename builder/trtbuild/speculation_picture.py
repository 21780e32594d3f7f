"""The picture of a study of speculation, as SVG: speed-up by draft length for each batch, and tokens a step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from trtbuild.speculation_advice import family, requests

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP, _BELOW = 230, 190, 50, 78, 56, 44
_COLORS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e")
_FONT = 'font-family="sans-serif" font-size="11"'
_GREY = 'fill="#555"'


def draw(study: Mapping[str, Any]) -> str:
    """An SVG document: one panel for each batch, and one with the tokens a step at the smallest.

    Args:
        study: as `Study.to_json` gives it.
    """
    rows: Sequence[Mapping[str, Any]] = study["rows"]
    color = dict(zip(dict.fromkeys(map(family, rows)), _COLORS * 3, strict=False))
    first = min((row["batch"] for row in rows), default=1)
    panels = [
        *(_Panel.of_batch(plain, rows, study["advice"]) for plain in study["without_drafts"]),
        _Panel.of_steps([row for row in rows if row["batch"] == first]),
    ]
    width = max(_LEFT + len(panels) * (_WIDTH + _GAP), 560)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_TOP + _HEIGHT + _BELOW}">',
        f'<rect width="100%" height="100%" fill="white"/><g {_FONT}>',
        f'<text x="10" y="20" font-size="14">{escape(_title(study))}</text>',
        *_legend(color),
    ]
    for place, panel in enumerate(panels):
        parts += panel.drawn(_LEFT + place * (_WIDTH + _GAP), color)
    return "\n".join([*parts, "</g></svg>", ""])


class _Panel:
    """Values by draft length, one line for each family; `level` is a line across, `chosen` a marked length."""

    def __init__(
        self, title: str, points: Mapping[str, Mapping[int, float]], level: float | None, chosen: tuple[str, int] | None
    ) -> None:
        self.title, self.points, self.level, self.chosen = title, points, level, chosen
        values = [value for line in points.values() for value in line.values()] + [1.0, level or 1.0]
        self.low = min(math.floor(min(values) * 4) / 4, 0.75)
        self.high = max(math.ceil(max(values) * 4) / 4, 1.25)
        self.lengths = sorted({length for line in points.values() for length in line})

    @classmethod
    def of_batch(
        cls, plain: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], advice: Mapping[str, Any] | None
    ) -> _Panel:
        """The speed-ups at one batch, above which level they count, and which length is advised."""
        batch = plain["batch"]
        points = _points([row for row in rows if row["batch"] == batch], "speed_up")
        level = None if advice is None else dict(advice["thresholds"])[batch]
        chosen = None
        if advice is not None and advice["section"] is not None and dict(advice["lengths"])[batch]:
            chosen = family(advice["section"]), dict(advice["lengths"])[batch]
        return cls(f"speed-up, {requests(batch)}", points, level, chosen)

    @classmethod
    def of_steps(cls, rows: Sequence[Mapping[str, Any]]) -> _Panel:
        """The tokens of a step."""
        batch = rows[0]["batch"] if rows else 1
        return cls(f"tokens a step, {requests(batch)}", _points(rows, "tokens_per_step"), None, None)

    def drawn(self, left: float, color: Mapping[str, str]) -> Iterator[str]:
        """The panel with its left edge at `left`."""
        yield f'<text x="{left}" y="{_TOP - 8}" font-size="12">{escape(self.title)}</text>'
        yield f'<rect x="{left}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#bbb"/>'
        yield from self._axes(left)
        for name, line in self.points.items():
            places = [(self._x(left, length), self._y(value), length, value) for length, value in sorted(line.items())]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
            yield f'<polyline points="{path}" fill="none" stroke="{color[name]}" stroke-width="1.5"/>'
            for x, y, length, value in places:
                fill = color[name] if self.chosen == (name, length) else "white"
                size = 6 if self.chosen == (name, length) else 3.5
                yield (
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{fill}" stroke="{color[name]}">'
                    f"<title>{escape(name)}, {length} drafted: {value:.2f}</title></circle>"
                )

    def _axes(self, left: float) -> Iterator[str]:
        step = 0.25 if self.high - self.low <= 2 else 0.5 if self.high - self.low <= 4 else 1.0
        tick = math.ceil(self.low / step) * step
        while tick <= self.high + 1e-9:
            y, stroke = self._y(tick), "#999" if tick == 1 else "#eee"
            yield f'<line x1="{left}" y1="{y:.1f}" x2="{left + _WIDTH}" y2="{y:.1f}" stroke="{stroke}"/>'
            yield f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end" {_GREY}>{tick:g}</text>'
            tick += step
        if self.level is not None:
            y = self._y(self.level)
            yield (
                f'<line x1="{left}" y1="{y:.1f}" x2="{left + _WIDTH}" y2="{y:.1f}" stroke="#c00" '
                f'stroke-dasharray="4 3"><title>gains count from here on: {self.level:.3f}</title></line>'
            )
        for length in self.lengths:
            x = self._x(left, length)
            yield f'<text x="{x:.1f}" y="{_TOP + _HEIGHT + 15}" text-anchor="middle" {_GREY}>{length}</text>'
        middle, below = left + _WIDTH / 2, _TOP + _HEIGHT + 31
        yield f'<text x="{middle}" y="{below}" text-anchor="middle" {_GREY}>tokens drafted</text>'

    def _x(self, left: float, length: int) -> float:
        most = max(self.lengths)
        return left + _WIDTH * (0.06 + 0.88 * (length - 1) / max(most - 1, 1))

    def _y(self, value: float) -> float:
        return _TOP + _HEIGHT * (1 - (value - self.low) / (self.high - self.low))


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, dict[int, float]]:
    points: dict[str, dict[int, float]] = {}
    for row in rows:
        if row[name] is not None:
            points.setdefault(family(row), {})[row["max_draft_len"]] = row[name]
    return points


def _title(study: Mapping[str, Any]) -> str:
    used, where = study["prompts"]["used"], study["measured_on"]
    return f"Speculation on {used} prompts, embedded engine, {where['compute_dtype']} on {where['device']}"


def _legend(color: Mapping[str, str]) -> Iterator[str]:
    left = 10
    for name, shade in color.items():
        yield f'<circle cx="{left + 5}" cy="40" r="4" fill="white" stroke="{shade}" stroke-width="2"/>'
        yield f'<text x="{left + 14}" y="44">{escape(name)}</text>'
        left += 34 + 7 * len(name)
    yield f'<text x="{left}" y="44" {_GREY}>filled: advised; red: gains count from here on</text>'
