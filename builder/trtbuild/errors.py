"""The errors that a user can meet, and the exit code of each.

Every message says where, what is wrong and what is allowed; the hint says what to do.
This module imports nothing, so that every layer can raise what the command line understands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class TrtbuildError(Exception):
    """Base of all errors that are shown as one sentence instead of a traceback."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong at one place: ``path: message; hint``."""

    path: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.path}: {self.message}" if self.path else self.message
        return f"{text}; {self.hint}" if self.hint else text


class RecipeError(TrtbuildError):
    """The recipe or the command line is wrong; carries every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


class RequestError(TrtbuildError):
    """One generation request is wrong; other requests go on."""

    exit_code = 2


class CompatibilityError(TrtbuildError):
    """Two things that do not go together: a format and a runtime, a model and a version."""

    exit_code = 3


class ToolError(TrtbuildError):
    """A tool or a child process that we called has failed."""

    exit_code = 4


class ArtifactError(TrtbuildError):
    """A checkpoint, artifact or package is damaged or incomplete."""

    exit_code = 5


class HostError(TrtbuildError):
    """This host lacks something: a package, a library, disk space, a GPU, a free port."""

    exit_code = 6


class GateError(TrtbuildError):
    """A measured number misses a threshold of the recipe's ``quality`` section."""

    exit_code = 7
