"""The plan: recipe, model facts and tool versions turned into complete, hashed steps.

Pure: no files, no clock, no environment. Every value says where it came from, and nothing means "decide later".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from trtbuild.manifest import digest_json
from trtbuild.model import ModelFacts

SCHEMA_VERSION = 1
STEP_KINDS = ("fetch", "compress", "draft", "engine", "repository", "deploy", "evaluate")


@dataclass(frozen=True, slots=True)
class Value:
    """One setting as it will be used; `origin` is ``recipe``, ``--set``, ``default`` or the reason for the value."""

    path: str
    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Step:
    """One unit of work.

    Args:
        kind: one of `STEP_KINDS`.
        parameters: everything that decides the bytes, besides inputs and tools.
        inputs: kinds of the steps whose artifacts it reads.
        tools: versions of what decides the bytes; None where it is not installed here.
        files: the user's files and directories that it reads, by role; the key has their digests, not their places.
    """

    kind: str
    parameters: Mapping[str, Any]
    inputs: tuple[str, ...]
    tools: Mapping[str, str | None]
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the checkpoint comes from: a local directory, or a hub repository at a commit."""

    path: str
    repo_id: str | None = None
    commit: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One argument of a vendor's tool: the flag without dashes, its values (none for a switch), and why."""

    flag: str
    values: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Cell:
    """Whether one runtime has one thing that a recipe asks for; `detail` says why not, or under which name."""

    status: Literal["available", "not available", "renamed"]
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.status}: {self.detail}" if self.detail else self.status


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that a recipe asks for, in every column of a comparison."""

    what: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a recipe would get from other runtimes: a row for each thing that it asks for."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a build will do, in order.

    `comparison` is for runtimes of TensorRT-LLM, `arguments` are those of ``trtllm-build`` for an engine,
    `draft_arguments` for that of a draft model.
    """

    source: Source
    facts: ModelFacts
    values: tuple[Value, ...]
    steps: tuple[Step, ...]
    gates: Mapping[str, float | None]
    estimates: Mapping[str, int]
    warnings: tuple[str, ...]
    comparison: Comparison | None = None
    arguments: tuple[Choice, ...] = ()
    draft_arguments: tuple[Choice, ...] = ()

    def step(self, kind: str) -> Step:
        """The step of one kind."""
        return next(step for step in self.steps if step.kind == kind)

    def value(self, path: str) -> Any:
        """The value of one setting."""
        return next(value.value for value in self.values if value.path == path)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON; equal inputs give equal bytes."""
        facts = asdict(self.facts)
        identity = facts.pop("files")
        body = {
            "schema_version": SCHEMA_VERSION,
            "source": asdict(self.source) | {"files": identity},
            "facts": facts,
            "values": [asdict(value) for value in self.values],
            "steps": [asdict(step) for step in self.steps],
            "gates": dict(self.gates),
            "estimates": dict(self.estimates),
            "warnings": list(self.warnings),
        }
        if self.comparison is not None:
            body["comparison"] = asdict(self.comparison)
        if self.arguments:
            body["arguments"] = [asdict(choice) for choice in self.arguments]
        if self.draft_arguments:
            body["draft_arguments"] = [asdict(choice) for choice in self.draft_arguments]
        return body | {"digest": self.digest}

    @property
    def digest(self) -> str:
        """The plan's hash: the source's identity and every step; not the place where the source lies."""
        identity = [asdict(file) for file in self.facts.files]
        return plan_digest(identity, [asdict(step) for step in self.steps], self.gates)


def plan_digest(
    identity: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]], gates: Mapping[str, float | None]
) -> str:
    """The hash of a plan, from its parts as `Plan.to_json` writes them."""
    return digest_json({"identity": list(identity), "steps": list(steps), "gates": dict(gates)})


def step_key(step: Step, inputs: Mapping[str, str], file_digests: Mapping[str, str]) -> str:
    """The store key of one step, once its inputs are known.

    Args:
        step: the step as planned.
        inputs: digest of every input artifact, by kind.
        file_digests: digest of every entry of ``step.files``.
    """
    return digest_json(
        {
            "kind": step.kind,
            "parameters": dict(step.parameters),
            "inputs": {kind: inputs[kind] for kind in step.inputs},
            "tools": dict(step.tools),
            "files": {role: file_digests[role] for role in step.files},
        }
    )


def until(steps: Sequence[Step], kind: str | None) -> tuple[Step, ...]:
    """The steps that are needed to have `kind`; all of them without one."""
    if kind is None:
        return tuple(steps)
    needed = {kind}
    for step in reversed(steps):
        if step.kind in needed:
            needed.update(step.inputs)
    return tuple(step for step in steps if step.kind in needed)
