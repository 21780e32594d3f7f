"""How the command line shows a build and a plan: progress on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TextIO

from trtbuild.init_recipe import human_bytes, human_count
from trtbuild.migrate.legacy import Unset
from trtbuild.migrate.translate import Row
from trtbuild.plan import Comparison, Plan

_PLAIN_INTERVAL_S = 10.0
_CELL = 40


class ConsoleReporter:
    """Shows the events of a build on standard error; see `trtbuild.report.Reporter`."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._step = ""
        self._started = self._shown = time.monotonic()
        self._phase, self._done_before = "", 0

    def started(self, step: str) -> None:
        """A step begins."""
        self._step, self._phase = step, ""
        self._started = self._shown = time.monotonic()
        if not self._live:
            self._line(f"{step}: started")

    def progress(self, done: int, total: int, what: str) -> None:
        """Show how much is done, how fast, and how long the rest takes."""
        now = time.monotonic()
        phase = what.split(":", maxsplit=1)[0]
        if phase != self._phase:
            self._phase, self._started, self._done_before = phase, now, done
        elapsed, fresh = now - self._started, done - self._done_before
        left = f", {(total - done) * elapsed / fresh:.0f} s left" if fresh > 0 and elapsed > 1 else ""
        text = f"{self._step}: {done}/{total} {what}{left}" if self._step else f"{done}/{total} {what}{left}"
        if self._live:
            self._stream.write(f"\r\033[K{text}")
            self._stream.flush()
        elif now - self._shown >= _PLAIN_INTERVAL_S:
            self._shown = now
            self._line(text)

    def finished(self, step: str, status: str, seconds: float) -> None:
        """A step ended."""
        self._line(f"{step}: {status} ({seconds:.1f} s)")

    def note(self, text: str) -> None:
        """Show one sentence."""
        self._line(text)

    def done(self) -> None:
        """Clear the progress line before something else is printed."""
        if self._live:
            self._stream.write("\r\033[K")
            self._stream.flush()

    def _line(self, text: str) -> None:
        self._stream.write(f"\r\033[K{text}\n" if self._live else f"{text}\n")
        self._stream.flush()


def table(rows: Iterable[Sequence[str]]) -> str:
    """Rows with aligned columns."""
    rows = [tuple(row) for row in rows]
    if not rows:
        return ""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def plan_text(plan: Plan) -> str:
    """A plan for people: the model, every value with its origin, the steps and the sizes to expect."""
    facts = plan.facts
    where = f"{plan.source.repo_id} at {plan.source.commit}" if plan.source.repo_id else plan.source.path
    size = f"{human_count(facts.parameters)} parameters, {human_bytes(facts.weight_bytes)} of weights ({facts.dtype})"
    head = [f"model     {where}", f"          {facts.architecture}, {size}", f"plan      {plan.digest}"]
    values = table((value.path, _show(value.value), value.origin) for value in plan.values)
    steps = table((step.kind, "reads " + ", ".join(step.inputs) if step.inputs else "") for step in plan.steps)
    sizes = table((name.replace("_", " "), human_bytes(size)) for name, size in plan.estimates.items())
    gates = table((name, "off" if limit is None else f"{limit:g}") for name, limit in plan.gates.items())
    sections = [("values", values), ("steps", steps), ("expected sizes", sizes), ("gates", gates)]
    for title, choices in (("", plan.arguments), (" of the draft model", plan.draft_arguments)):
        rows = [(f"--{choice.flag}", " ".join(choice.values), choice.reason) for choice in choices]
        sections += [(f"trtllm-build{title}", table(rows))] if rows else []
    if plan.comparison is not None:
        sections.append(("what runs where", _comparison(plan.comparison)))
    warnings = "".join(f"\nwarning: {warning}" for warning in plan.warnings)
    return "\n".join(head) + "".join(f"\n\n{title}\n{_indent(text)}" for title, text in sections) + warnings


def migration_text(rows: Sequence[Row], unset: Sequence[Unset]) -> str:
    """What became of every setting of an older deployment, losses last, and what it left open."""
    order = {kind: index for index, kind in enumerate(("kept", "renamed", "computed", "dropped", "not recognized"))}
    shown = sorted(rows, key=lambda row: (row.is_loss, order[row.kind]))
    lines = [("", "old", "value", "new", "value", "from", "note")]
    lines += [
        (row.kind, row.old or "-", _cut(row.old_value), row.field or "-", _cut(row.value), row.where or "-", row.note)
        for row in shown
    ]
    left = "".join(f"\nunset: {one.name} ({one.where}): {one.text or 'empty'}" for one in unset)
    return table(lines) + left


def _cut(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _CELL else flat[: _CELL - 3] + "..."


def _comparison(comparison: Comparison) -> str:
    rows = [(row.what, *map(str, row.cells)) for row in comparison.rows]
    return table([("this recipe on", *comparison.columns), *rows])


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _show(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return ", ".join(str(item) for item in value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items()) or "-"
    return str(value)
