"""Speculation as the engine drives it: which sequences get drafts, how long these are, and what became of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Many

import torch

from trtbuild.runtime.config import EngineConfig
from trtbuild.runtime.drafts.config import SpeculativeConfig
from trtbuild.runtime.drafts.draft import Ask, Drafter
from trtbuild.runtime.scheduler import Chunk, Scheduler
from trtbuild.runtime.sequence import Sequence
from trtbuild.runtime.step_logits import StepLogits

logger = logging.getLogger(__name__)


class Speculation:
    """One engine's drafter and its bookkeeping; the engine's thread alone uses it, but for the counts."""

    def __init__(self, config: SpeculativeConfig, drafter: Drafter, limits: EngineConfig) -> None:
        self.drafted = 0
        self.accepted = 0
        self._config = config
        self._limits = limits
        self._drafter: Drafter | None = drafter

    def propose(self, scheduler: Scheduler) -> None:
        """Give the sequences that only lack their newest token a draft for the step that comes."""
        decoding = scheduler.decoding if self._drafter is not None else []
        room = self._share(scheduler, len(decoding))
        length = min(self._config.length_at(len(scheduler.running)), room)
        if self._drafter is None or length == 0:
            return
        # A draft and the token behind it are all that may come: then no key needs more room than the answer does.
        asks = [Ask(one, min(length, one.tokens_left - 1), room) for one in decoding]
        try:
            with torch.inference_mode():
                drafts = self._drafter.propose(asks)
        except Exception as error:  # noqa: BLE001  drafts save time and decide nothing: the answers go on without them
            self._give_up(error)
            return
        for ask, draft in zip(asks, drafts, strict=True):
            ask.sequence.draft = draft if draft is not None and draft.tokens else None

    def observe(self, chunks: Many[Chunk], step: StepLogits) -> None:
        """Count what a finished step has verified, and let the drafter see it."""
        for chunk in chunks:
            if chunk.draft is not None:
                self.drafted += len(chunk.draft.tokens)
                self.accepted += chunk.draft.accepted
        if self._drafter is None:
            return
        try:
            with torch.inference_mode():
                self._drafter.observe(chunks, step)
        except Exception as error:  # noqa: BLE001  as above
            self._give_up(error)

    def forget(self, sequence: Sequence) -> None:
        """Let go of what is held for a sequence that has ended."""
        if self._drafter is not None:
            self._drafter.forget(sequence)

    def release(self) -> None:
        """Give the drafter's memory back."""
        if self._drafter is not None:
            self._drafter.release()
            self._drafter = None

    def _give_up(self, error: Exception) -> None:
        logger.error("drafting failed; nothing more is drafted", exc_info=error)
        self.release()

    def _share(self, scheduler: Scheduler, drafting: int) -> int:
        """Tokens of a step for each draft: what one token a sequence leaves, half of it while prompts want some too."""
        prompts = bool(scheduler.waiting) or drafting < len(scheduler.running)
        # A prompt that must run in one step would wait for those that draft to end.
        if drafting == 0 or (prompts and not self._limits.enable_chunked_prefill):
            return 0
        spare = self._limits.max_num_tokens - len(scheduler.running)
        if prompts:
            spare //= 2
        return spare // drafting
