"""Progress lines: what, how much, and a time left that counts from the phase's own start."""

from __future__ import annotations

import io

import pytest

from trtbuild import console
from trtbuild.console import ConsoleReporter, table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_time_left_counts_from_the_start_of_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 100.0, 120.0])  # made, started, first of the phase, second
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    stream = Terminal()
    reporter = ConsoleReporter(stream)
    reporter.started("compress")
    reporter.progress(50, 100, "calibrate: sample 1 of 8")
    reporter.progress(60, 100, "calibrate: sample 2 of 8")
    assert stream.getvalue().endswith("compress: 60/100 calibrate: sample 2 of 8, 80 s left")


def test_plain_lines_elsewhere() -> None:
    stream = io.StringIO()
    reporter = ConsoleReporter(stream)
    reporter.started("engine")
    reporter.progress(1, 2, "x")
    reporter.finished("engine", "built", 1.25)
    assert stream.getvalue() == "engine: started\nengine: built (1.2 s)\n"


def test_table_aligns_columns() -> None:
    assert table([("a", "bb"), ("ccc", "d")]) == "a    bb\nccc  d"
    assert table([]) == ""
