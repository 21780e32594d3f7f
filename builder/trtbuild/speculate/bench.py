"""Two engines over one model, one that drafts and one that does not, and single runs of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from trtbuild.errors import ToolError
from trtbuild.runtime import Engine, EngineConfig, SamplingParams, SpeculativeConfig
from trtbuild.runtime.capture import Capture
from trtbuild.runtime.drafts.draft import Drafter
from trtbuild.runtime.drafts.load import load_drafter
from trtbuild.runtime.drafts.speculation import Speculation
from trtbuild.runtime.intake import Intake
from trtbuild.runtime.model import ModelRunner
from trtbuild.speculate.dial import Counts, Dial

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """Prompts answered once: what came out, how long it took, and what was drafted on the way."""

    answers: tuple[TokenIds, ...]
    seconds: float
    counts: Counts = field(default_factory=Counts)

    @property
    def tokens(self) -> int:
        """Tokens of all answers."""
        return sum(map(len, self.answers))

    @property
    def speed(self) -> float:
        """Tokens a second, prompts included in the time."""
        return self.tokens / self.seconds


class Bench:
    """One loaded model that answers with and without drafts; a context manager.

    Where the model runs on the fast path and drafts do not, it is loaded twice: each side runs as it would be served.
    """

    def __init__(self, model: Path, config: EngineConfig, sections: Sequence[SpeculativeConfig]) -> None:
        """Load the model and every draft.

        Raises:
            ArtifactError, CompatibilityError, HostError: as `Engine.load`.
        """
        self.sections = sections
        self._model, self._config = model, replace(config, speculative=sections[0])
        plain = ModelRunner.load(model, config)
        # A path of its own, if speculation has one, shows at load alone.
        self._runner = plain if plain.fast is None else ModelRunner.load(model, self._config)
        self._drafters: dict[str, tuple[Drafter, Capture | None]] = {}
        for section in sections:
            if section.draft is not None and section.method not in self._drafters:
                self._drafters[section.method] = self._load(section), self._runner.capture
        self._runner.capture = None
        self._dial = Dial(self._load(sections[0]) if sections[0].draft is None else self._drafter(sections[0]))
        longest = replace(sections[0], max_draft_len=max(section.max_draft_len for section in sections))
        speculation = Speculation(_always(longest), self._dial, self._config)
        self._plain = Engine(plain, config, Intake.read(model, plain, config))
        self._drafting = Engine(self._runner, self._config, Intake.read(model, self._runner, self._config), speculation)
        self.facts = self._plain.facts

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for engine in (self._plain, self._drafting):
            engine.close()

    def run(self, index: int | None, prompts: Sequence[TokenIds], *, batch: int, tokens: int) -> Run:
        """Answer all prompts, `batch` at a time, with the section of this number, or without drafts.

        Raises:
            ToolError: the drafter has failed; its log says why.
        """
        engine, params = self._plain, SamplingParams(max_tokens=tokens)
        self._runner.capture = None
        if index is not None:
            engine, section = self._drafting, self.sections[index]
            self._dial.turn(self._drafter(section), section.max_draft_len)
        answers: list[TokenIds] = []
        started = time.perf_counter()
        for first in range(0, len(prompts), batch):
            answers += [one.token_ids for one in engine.generate(prompts[first : first + batch], params)]
        seconds = time.perf_counter() - started
        if self._dial.failed:
            raise ToolError(f"drafting with {self.sections[index or 0].method} has failed", "see the lines above")
        return Run(tuple(answers), seconds, self._dial.counts if index is not None else Counts())

    def _drafter(self, section: SpeculativeConfig) -> Drafter:
        """A loaded draft; or a new drafter, which has not seen the answers of the run before."""
        if section.method not in self._drafters:
            return self._load(section)
        drafter, self._runner.capture = self._drafters[section.method]
        return drafter

    def _load(self, section: SpeculativeConfig) -> Drafter:
        return load_drafter(self._model, section, replace(self._config, speculative=section), self._runner)


def _always(section: SpeculativeConfig) -> SpeculativeConfig:
    """The section without what would switch drafting off."""
    return replace(section, draft_len_schedule=None, max_concurrency=None)
