"""Pictures for the evidence, as SVG text: any browser shows them, and no library draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 420, 240, 56, 44, 92
_FONT = 'font-family="sans-serif" font-size="12"'
_TICKS = 4
_COLOURS = ("#1f77b4", "#d95f02", "#7a7a7a", "#2ca02c")


def training_picture(
    title: str, loss: Sequence[Sequence[float]], acceptance: Mapping[str, Mapping[str, Sequence[float]]]
) -> str:
    """The loss over the steps, and beside it the shares by position.

    Args:
        title: stands above both.
        loss: pairs of step and loss.
        acceptance: for each kind of prompts, `match` and `accepted` by position.
    """
    total = 2 * (_WIDTH + _LEFT) + _GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{_HEIGHT + _TOP + 48}" {_FONT}>',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="15">{escape(title)}</text>',
        *_curve(loss),
        *_bars(acceptance, _LEFT + _WIDTH + _GAP),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _curve(loss: Sequence[Sequence[float]]) -> list[str]:
    top = max((value for _, value in loss), default=1.0) or 1.0
    last = max((step for step, _ in loss), default=1.0)
    points = " ".join(
        f"{_LEFT + _WIDTH * step / last:.1f},{_TOP + _HEIGHT * (1 - value / top):.1f}" for step, value in loss
    )
    drawn = f'<polyline points="{points}" fill="none" stroke="{_COLOURS[0]}" stroke-width="1.5"/>'
    return [*_frame(_LEFT, "training loss", top), drawn, _below(_LEFT, f"step 1 to {last:.0f}")]


def _bars(acceptance: Mapping[str, Mapping[str, Sequence[float]]], left: float) -> list[str]:
    """Groups of bars, one group a position, one bar for each kind of prompts and share."""
    series = [
        (f"{kind.replace('_', ' ')}: {share}", acceptance[kind][share])
        for kind in acceptance
        for share in ("accepted", "match")
    ]
    parts = _frame(left, "share of tokens that the draft foresees", 1.0)
    count = max((len(values) for _, values in series), default=0)
    parts += [_below(left + _WIDTH / count * (place + 0.4), f"{place + 1} ahead") for place in range(count)]
    for place, (name, values) in enumerate(series):
        colour = _COLOURS[place % len(_COLOURS)]
        width = _WIDTH / max(count, 1) / (len(series) + 1)
        for position, value in enumerate(values):
            x = left + _WIDTH / count * position + width * (place + 0.5)
            height = _HEIGHT * value
            parts.append(
                f'<rect x="{x:.1f}" y="{_TOP + _HEIGHT - height:.1f}" width="{width:.1f}" height="{height:.1f}" '
                f'fill="{colour}"><title>{escape(name)}, {position + 1} ahead: {value:.3f}</title></rect>'
            )
        x, y = left + _WIDTH * (place % 2) / 2, _TOP + _HEIGHT + 30 + 14 * (place // 2)
        parts.append(f'<text x="{x + 90:.0f}" y="{y}" fill="{colour}">{escape(name)}</text>')
    return parts


def _frame(left: float, title: str, top: float) -> list[str]:
    """Axes with numbers at the left, from 0 to `top`."""
    parts = [
        f'<text x="{left}" y="{_TOP - 8}">{escape(title)}</text>',
        f'<rect x="{left}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#bbb"/>',
    ]
    for tick in range(_TICKS + 1):
        y = _TOP + _HEIGHT * (1 - tick / _TICKS)
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{top * tick / _TICKS:.3g}</text>')
    return parts


def _below(left: float, text: str) -> str:
    return f'<text x="{left}" y="{_TOP + _HEIGHT + 18}">{escape(text)}</text>'
