"""Every candidate at every batch, between runs without drafts, for as long as the time lasts.

At one batch all candidates run once, then the fastest of them again. Each run stands between two runs without drafts,
at most `_BETWEEN` runs apart, and its speed-up is taken against the mean of these two: what else the machine does
meanwhile slows all of them. What two neighbouring runs without drafts differ by is the noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol

from trtbuild.speculate.bench import Run, TokenIds

_BETWEEN = 3
_AGAIN = 4
_MOST_TOKENS, _FEWEST_TOKENS, _WARM_TOKENS = 64, 16, 4
_ALONE = 4  # prompts that a run answers where the batch is smaller


class Runs(Protocol):
    """What answers prompts; see `Bench.run`."""

    def run(self, index: int | None, prompts: Sequence[TokenIds], *, batch: int, tokens: int) -> Run:
        """Answer all prompts, `batch` at a time, with the candidate of this number, or without drafts."""


@dataclass(slots=True)
class Row:
    """One candidate at one batch, over its runs."""

    candidate: int
    batch: int
    runs: list[Run] = field(default_factory=list)
    speed_ups: list[float] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The row for the table: shares and means over all runs, medians of speeds."""
        counts = [run.counts for run in self.runs]
        turns, drafts = sum(one.turns for one in counts), sum(one.drafts for one in counts)
        drafted, accepted = sum(one.drafted for one in counts), sum(one.accepted for one in counts)
        behind_first = sum(run.tokens - len(run.answers) for run in self.runs)
        return {
            "candidate": self.candidate,
            "batch": self.batch,
            "speed_up": statistics.median(self.speed_ups),
            "speed_ups": self.speed_ups,
            "tokens_per_second": statistics.median(run.speed for run in self.runs),
            "drafted": drafted,
            "accepted": accepted,
            "acceptance": accepted / drafted if drafted else None,
            "accepted_length": accepted / drafts if drafts else None,
            "tokens_per_step": behind_first / turns if turns else None,
            "same_answers": sum(self.same) / len(self.same),
        }


@dataclass(slots=True)
class BatchResult:
    """All rows of one batch, and the runs without drafts between them; `missed` candidates found no time."""

    batch: int
    prompts: int
    tokens: int
    plain: list[Run] = field(default_factory=list)
    rows: dict[int, Row] = field(default_factory=dict)
    missed: int = 0

    @property
    def noise(self) -> float | None:
        """What two neighbouring runs without drafts differ by, as a share: the median."""
        pairs = zip(self.plain, self.plain[1:], strict=False)
        found = [abs(one.speed / other.speed - 1) for one, other in pairs]
        return statistics.median(found) if found else None

    def plain_json(self) -> dict[str, Any]:
        """What was measured without drafts."""
        return {
            "batch": self.batch,
            "prompts": self.prompts,
            "max_tokens": self.tokens,
            "tokens_per_second": statistics.median(run.speed for run in self.plain) if self.plain else None,
            "noise": self.noise,
            "runs": len(self.plain),
            "missed": self.missed,
        }


def measure_batch(
    bench: Runs,
    prompts: Sequence[TokenIds],
    batch: int,
    order: Sequence[int],
    *,
    seconds: float,
    on_run: Callable[[str], None],
    rounds: int,
) -> BatchResult:
    """Measure the candidates, those that `order` names first before the others, in about `seconds`."""
    ends = monotonic() + seconds
    started = monotonic()
    first = _some(prompts, batch, 0)
    for index in (None, order[0]):  # what is compiled, loaded or grown at its first use
        bench.run(index, first, batch=batch, tokens=_WARM_TOKENS)
    each = (monotonic() - started) / 2 / _WARM_TOKENS / -(-len(first) // batch)
    waves, tokens = _fitting(each, seconds / (len(order) + 2 * _AGAIN), batch)
    result = BatchResult(batch, max(batch, waves), tokens)
    going = list(order)
    for number in range(rounds):
        asked = _some(prompts, result.prompts, number * result.prompts)
        result.missed += _round(bench, result, going, asked, ends, on_run)
        if monotonic() > ends:
            break
        going = sorted(result.rows, key=lambda one: -statistics.median(result.rows[one].speed_ups))[:_AGAIN]
    return result


def _round(
    bench: Runs,
    result: BatchResult,
    going: Sequence[int],
    asked: Sequence[TokenIds],
    ends: float,
    on_run: Callable[[str], None],
) -> int:
    """Run each candidate once; returns how many of those that were never measured found no time."""

    def plain() -> Run:
        on_run("without drafts")
        result.plain.append(bench.run(None, asked, batch=result.batch, tokens=result.tokens))
        return result.plain[-1]

    before = plain()
    for start in range(0, len(going), _BETWEEN):
        if monotonic() > ends:
            return sum(one not in result.rows for one in going[start:])
        runs = []
        for candidate in going[start : start + _BETWEEN]:
            on_run(f"candidate {candidate + 1}")
            runs.append((candidate, bench.run(candidate, asked, batch=result.batch, tokens=result.tokens)))
        after = plain()
        for candidate, run in runs:
            row = result.rows.setdefault(candidate, Row(candidate, result.batch))
            row.runs.append(run)
            row.speed_ups.append(2 * run.speed / (before.speed + after.speed))
            row.same += [one == other for one, other in zip(run.answers, before.answers, strict=True)]
        before = after
    return 0


def _some(prompts: Sequence[TokenIds], count: int, start: int) -> list[TokenIds]:
    """`count` prompts from `start` on, round and round."""
    return [prompts[(start + place) % len(prompts)] for place in range(count)]


def _fitting(step_seconds: float, run_seconds: float, batch: int) -> tuple[int, int]:
    """How many prompts and tokens of each a run may have: fewer of both on a slow machine."""
    affordable = run_seconds / step_seconds
    prompts = max(batch, _ALONE)
    while prompts > batch and affordable < _FEWEST_TOKENS * -(-prompts // batch):
        prompts -= 1
    waves = -(-prompts // batch)
    return prompts, max(_FEWEST_TOKENS, min(_MOST_TOKENS, int(affordable / waves)))
