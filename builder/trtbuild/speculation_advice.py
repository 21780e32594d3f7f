"""From measured speed-ups to one setting of speculation, or to the answer that nothing helps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# A gain counts from here on, or from what two equal runs differ by, if that is more.
MARGIN = 0.05
# Settings whose speeds differ by less than this share are taken for equal: the one that costs less is chosen.
TIE = 0.02
_LEAST_RUNS = 2


@dataclass(frozen=True, slots=True)
class Candidate:
    """One method with one draft length; `section` is what a recipe says of it, without the length."""

    section: Mapping[str, Any]
    length: int

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.section["method"])

    @property
    def family(self) -> str:
        """The name of its family."""
        return family(self.section)


def family(section: Mapping[str, Any]) -> str:
    """The name of a section's method with what it matches."""
    method, size = str(section["method"]), section.get("max_matching_ngram_size")
    return method if size is None else f"{method}, {size} matched"


@dataclass(frozen=True, slots=True)
class Measured:
    """One candidate at one batch: the speed-up of each of its runs, and their median."""

    candidate: Candidate
    batch: int
    speed_up: float
    speed_ups: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Advice:
    """What to write into a recipe, None where nothing helps.

    `lengths` and `speed_ups` are by batch, 0 and 1.0 where nothing is drafted; `off_from` is the smallest measured
    batch from which nothing should be drafted, None where the largest still gains.
    """

    section: Mapping[str, Any] | None
    lengths: Mapping[int, int]
    speed_ups: Mapping[int, float]
    thresholds: Mapping[int, float]
    off_from: int | None
    sentence: str

    def to_json(self) -> dict[str, Any]:
        """For programs; JSON has no numbers as keys, so batches are pairs."""
        return {
            "section": None if self.section is None else _plain(self.section),
            "lengths": [list(pair) for pair in self.lengths.items()],
            "speed_ups": [list(pair) for pair in self.speed_ups.items()],
            "thresholds": [list(pair) for pair in self.thresholds.items()],
            "off_from": self.off_from,
            "sentence": self.sentence,
        }


@dataclass(frozen=True, slots=True)
class _Plan:
    """One family with its best length at each batch."""

    section: Mapping[str, Any]
    lengths: Mapping[int, int]
    speed_ups: Mapping[int, float]

    @property
    def score(self) -> float:
        """The gain over all batches alike, as the logarithm of a mean factor."""
        return sum(map(math.log, self.speed_ups.values())) / len(self.speed_ups)


def advise(rows: Sequence[Measured], noise: Mapping[int, float | None]) -> Advice:
    """The setting that gains most over all measured batches.

    A gain counts where it is above the margin and the noise of its batch, and where every one of at least two runs was
    faster. A recipe's schedule begins with its longest draft at one request, so a family must gain at the smallest
    batch, and no larger one gets a longer draft. Of equal settings the first family and the shortest draft are taken.

    Args:
        rows: of every candidate and batch that was measured, families in the order of what they cost.
        noise: what equal runs differ by, by batch; None where only one was run.
    """
    batches = sorted(noise)
    thresholds = {batch: 1 + max(MARGIN, noise[batch] or 0.0) for batch in batches}
    families = dict.fromkeys(row.candidate.family for row in rows)
    plans = [
        plan
        for name in families
        if (plan := _plan([row for row in rows if row.candidate.family == name], batches, thresholds)) is not None
    ]
    if not plans:
        none, ones = dict.fromkeys(batches, 0), dict.fromkeys(batches, 1.0)
        return Advice(None, none, ones, thresholds, batches[0] if batches else None, _nothing(rows, thresholds))
    best = max(plan.score for plan in plans)
    plan = next(plan for plan in plans if plan.score >= best - math.log1p(TIE))
    idle = [batch for batch in batches if not any(plan.lengths[later] for later in batches if later >= batch)]
    off_from = idle[0] if idle else None
    return Advice(
        _section(plan), plan.lengths, plan.speed_ups, thresholds, off_from, _sentence(plan, thresholds, off_from)
    )


def _plan(rows: Sequence[Measured], batches: Sequence[int], thresholds: Mapping[int, float]) -> _Plan | None:
    """The lengths of one family, None where it does not gain at the smallest batch."""
    lengths: dict[int, int] = {}
    speed_ups: dict[int, float] = {}
    most = math.inf
    for batch in batches:
        good = [
            row
            for row in rows
            if row.batch == batch and row.candidate.length <= most and _helps(row, thresholds[batch])
        ]
        best = max((row.speed_up for row in good), default=1.0)
        near = [row for row in good if row.speed_up * (1 + TIE) >= best]
        chosen = min(near, key=lambda row: row.candidate.length, default=None)
        lengths[batch] = 0 if chosen is None else chosen.candidate.length
        speed_ups[batch] = 1.0 if chosen is None else chosen.speed_up
        if batch == batches[0]:
            most = lengths[batch]
    return _Plan(rows[0].candidate.section, lengths, speed_ups) if most else None


def _helps(row: Measured, threshold: float) -> bool:
    return len(row.speed_ups) >= _LEAST_RUNS and min(row.speed_ups) > 1 and row.speed_up >= threshold


def _section(plan: _Plan) -> dict[str, Any]:
    """The section of a recipe: a schedule where the batches differ, from one request on."""
    batches = sorted(plan.lengths)
    section = dict(plan.section) | {"max_draft_len": plan.lengths[batches[0]]}
    schedule: dict[int, int] = {}
    for batch in batches:
        if not schedule or plan.lengths[batch] != list(schedule.values())[-1]:
            schedule[batch if schedule else 1] = plan.lengths[batch]
    return section | ({"draft_len_schedule": schedule} if len(schedule) > 1 else {})


def _sentence(plan: _Plan, thresholds: Mapping[int, float], off_from: int | None) -> str:
    gains = ", ".join(
        f"{plan.speed_ups[batch]:.2f}x with {length} {'token' if length == 1 else 'tokens'} at {requests(batch)}"
        for batch, length in plan.lengths.items()
        if length
    )
    name = family(plan.section)
    if off_from is None:
        return f"best: {name}: {gains}"
    need = thresholds[off_from]
    return f"best: {name}: {gains}; off from {requests(off_from)} on, where no length is {need - 1:.1%} faster"


def _nothing(rows: Sequence[Measured], thresholds: Mapping[int, float]) -> str:
    if not rows:
        return "nothing was measured"
    best = max(rows, key=lambda row: row.speed_up)
    need = ", ".join(f"{value:.2f}x at {requests(batch)}" for batch, value in sorted(thresholds.items()))
    nearest = (
        f"{best.candidate.family}, {best.candidate.length} drafted, {best.speed_up:.2f}x at {requests(best.batch)}"
    )
    return (
        "nothing helps: on these prompts no method is so much faster than without drafts that it counts "
        f"({need}, and every run above 1); the nearest was {nearest}"
    )


def requests(batch: int) -> str:
    """A number of requests in words."""
    return "1 request" if batch == 1 else f"{batch} requests"


def _plain(section: Mapping[str, Any]) -> dict[str, Any]:
    schedule = section.get("draft_len_schedule")
    return dict(section) | ({} if schedule is None else {"draft_len_schedule": [list(one) for one in schedule.items()]})
