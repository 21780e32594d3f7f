"""What a build tells whoever watches it."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Receives the events of a build; the command line shows them, tests record them."""

    def started(self, step: str) -> None:
        """A step begins work."""

    def progress(self, done: int, total: int, what: str) -> None:
        """The running step has done `done` of `total`."""

    def finished(self, step: str, status: str, seconds: float) -> None:
        """A step ended; status is ``built`` or ``reused``."""

    def note(self, text: str) -> None:
        """Something the user should know."""


class Silent:
    """A reporter that tells nobody."""

    def started(self, step: str) -> None:
        """Ignore."""

    def progress(self, done: int, total: int, what: str) -> None:
        """Ignore."""

    def finished(self, step: str, status: str, seconds: float) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""
