"""A study of speculation as text for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from trtbuild.console import table
from trtbuild.recipe_edit import section_lines
from trtbuild.speculation_study import Study


def study_text(study: Study) -> str:
    """The table, the notes, and the advice with the section of the recipe that it is."""
    timed = study.advice is not None
    heads = ("requests", "method", "drafted", "acceptance", "accepted length", "tokens a step")
    lines = [(*heads, "tokens/s", "speed-up", "runs") if timed else heads, *_rows(study, timed=timed)]
    parts = [table(lines), *(f"note: {note}" for note in study.notes)]
    if study.advice is not None:
        parts.append(study.advice.sentence)
        if study.advice.section is not None:
            parts += section_lines("speculative", study.advice.section)
    return "\n".join(parts)


def _rows(study: Study, *, timed: bool) -> Iterator[tuple[str, ...]]:
    measured = study.measured
    for plain in measured["plain"]:
        batch = plain["batch"]
        if timed:
            speed = f"{plain['tokens_per_second']:.1f}"
            yield (str(batch), "none", "0", "-", "-", "1.00", speed, "1.00", str(plain["runs"]))
        for row in (row for row in measured["rows"] if row["batch"] == batch):
            candidate = study.candidates[row["candidate"]]
            shares = (_number(row[name]) for name in ("acceptance", "accepted_length", "tokens_per_step"))
            found = (str(batch), candidate.family, str(candidate.length), *shares)
            seconds = (f"{row['tokens_per_second']:.1f}", f"{row['speed_up']:.2f}", str(len(row["speed_ups"])))
            yield (*found, *seconds) if timed else found


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
