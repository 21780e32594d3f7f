"""Prompt lookup: what followed the same few tokens before is what may follow them again.

The pool and its choices are those of TensorRT-LLM (NVIDIA/TensorRT-LLM tensorrt_llm/_torch/speculative/ngram.py
@02495765, `NGramPoolManager`): patterns of one token up to `max_matching_ngram_size`, each with the runs of at most
`max_draft_len` tokens that followed it, the longest pattern at the end of a text first. Ours forgets the oldest
patterns beyond a bound, since a pool that all requests share would otherwise grow for as long as the server runs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Many
from typing import TypeAlias

from trtbuild.runtime.drafts.config import SpeculativeConfig
from trtbuild.runtime.drafts.draft import Ask, Draft
from trtbuild.runtime.scheduler import Chunk
from trtbuild.runtime.sequence import Sequence
from trtbuild.runtime.step_logits import StepLogits

# Patterns of one pool; about 100 MB.
_MOST_PATTERNS = 2**18
# Runs that one pattern remembers.
_MOST_RUNS = 16

Tokens: TypeAlias = tuple[int, ...]


class Pool:
    """Patterns and the runs of tokens that followed them, oldest first."""

    def __init__(self, *, draft_len: int, pattern_len: int, keep_all: bool) -> None:
        self._draft_len, self._pattern_len, self._keep_all = draft_len, pattern_len, keep_all
        self._runs: OrderedDict[Tokens, OrderedDict[Tokens, None]] = OrderedDict()

    def add(self, tokens: Many[int], start: int) -> None:
        """Take in what follows every pattern of `tokens` that begins at `start` or later."""
        for size in range(1, self._pattern_len + 1):
            for place in range(start, len(tokens) - size):
                behind = place + size
                self._remember(tuple(tokens[place:behind]), tuple(tokens[behind : behind + self._draft_len]))

    def find(self, tokens: Many[int], *, oldest: bool) -> Tokens:
        """What followed the longest known end of `tokens`; nothing where no end of them is known."""
        for size in range(min(self._pattern_len, len(tokens)), 0, -1):
            runs = self._runs.get(tuple(tokens[-size:]))
            if runs:
                return next(iter(runs) if oldest else reversed(runs))
        return ()

    def _remember(self, pattern: Tokens, run: Tokens) -> None:
        runs = self._runs.setdefault(pattern, OrderedDict())
        if run in runs:
            return
        longest = max(map(len, runs), default=0)
        if len(run) < longest or (runs and not self._keep_all and len(run) == longest):
            return
        # Shorter runs are mostly the same one, from when less of the text was there.
        if len(run) > longest:
            runs.clear()
        runs[run] = None
        if len(runs) > _MOST_RUNS:
            runs.popitem(last=False)
        if len(self._runs) > _MOST_PATTERNS:
            self._runs.popitem(last=False)


class NgramDrafter:
    """Drafts from the texts of all requests, or from each request's own."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._config = config
        self._public = self._pool() if config.is_public_pool else None
        self._own: dict[int, Pool] = {}
        # How many tokens of each running request are in its pool.
        self._taken: dict[int, int] = {}

    def propose(self, asks: Many[Ask]) -> list[Draft | None]:
        """What followed the last tokens of each sequence before."""
        return [self._propose(ask.sequence, ask.count) for ask in asks]

    def observe(self, chunks: Many[Chunk], step: StepLogits) -> None:
        """Nothing: a sequence's tokens are looked at when it asks."""

    def forget(self, sequence: Sequence) -> None:
        """Let go of a request's own pool; what it gave to the public one stays."""
        self._own.pop(sequence.request_id, None)
        self._taken.pop(sequence.request_id, None)

    def release(self) -> None:
        """Forget everything."""
        self._public = None
        self._own.clear()
        self._taken.clear()

    def _propose(self, sequence: Sequence, count: int) -> Draft | None:
        pool = self._public
        if pool is None:
            pool = self._own.setdefault(sequence.request_id, self._pool())
        tokens, taken = sequence.token_ids, self._taken.get(sequence.request_id, 0)
        # Patterns whose runs were cut short by the end of the text are looked at once more.
        pool.add(tokens, max(0, taken - self._config.max_draft_len - self._config.max_matching_ngram_size + 1))
        self._taken[sequence.request_id] = len(tokens)
        found = pool.find(tokens, oldest=self._config.is_use_oldest)[:count]
        return Draft(list(found)) if found else None

    def _pool(self) -> Pool:
        config = self._config
        return Pool(
            draft_len=config.max_draft_len, pattern_len=config.max_matching_ngram_size, keep_all=config.is_keep_all
        )
