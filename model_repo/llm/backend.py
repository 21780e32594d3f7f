"""What model.py needs of a runtime, and the values that come back from one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .contract import Sampling


class Handle(Protocol):
    """One running sequence."""

    def cancel(self) -> None:
        """Stop generating and free what it holds; does nothing when it has ended."""


@dataclass(frozen=True, slots=True)
class Gauges:
    """A moment's counts of one runtime: KV cache blocks, requests, draft tokens; None: this runtime does not tell."""

    max_blocks: int | None = None
    used_blocks: int | None = None
    free_blocks: int | None = None
    reusable_blocks: int | None = None
    running: int | None = None
    waiting: int | None = None
    draft_tokens: int | None = None
    accepted_draft_tokens: int | None = None


class Backend(Protocol):
    """One loaded runtime. `on_output` gets values with the fields of `Output`, in a thread of the runtime."""

    refused: Mapping[str, str]

    @property
    def summary(self) -> str:
        """What was loaded, in one line."""

    def submit(
        self, prompt: list[int], sampling: Sampling, bad_words: list[list[int]], on_output: Callable[[Any], None]
    ) -> Handle:
        """Queue one sequence; raises BadRequestError for what can never run."""

    def gauges(self) -> Gauges:
        """Counts of this moment."""

    def close(self) -> None:
        """Cancel what is in flight and free the memory."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of one token before penalties and temperature; rank 1 is the likeliest."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Metrics:
    """Times of one request in ns, its KV cache blocks, and what became of its drafts (None: nothing was drafted)."""

    arrival_time_ns: int = 0
    first_scheduled_time_ns: int = 0
    first_token_time_ns: int = 0
    last_token_time_ns: int = 0
    kv_cache_reused_block: int = 0
    kv_cache_missed_block: int = 0
    kv_cache_alloc_new_blocks: int = 0
    kv_cache_alloc_total_blocks: int = 0
    kv_cache_hit_rate: float = 0.0
    acceptance_rate: float | None = None
    total_accepted_draft_tokens: int | None = None
    total_draft_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """What is new of one sequence; the last one has `finished` set and holds the token that ended it, if one did."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finished: bool = False
    finish_reason: str | None = None
    stop_reason: int | None = None
    error: Exception | None = None
    metrics: Metrics | None = None
