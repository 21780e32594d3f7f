"""What comes out of the engine: values without behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trtbuild.errors import TrtbuildError

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of one token under the model's own distribution, before penalties and temperature.

    `rank` is 1 for the likeliest token; `top` holds the asked number of likeliest tokens, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times of one request (`time.monotonic_ns`; 0: never reached), its blocks of the KV cache, and its drafts.

    `acceptance_rate` is the share of verified draft tokens that were right; it and the counts are None without drafts.
    """

    arrival_time_ns: int = 0
    first_scheduled_time_ns: int = 0
    first_token_time_ns: int = 0
    last_token_time_ns: int = 0
    kv_cache_alloc_total_blocks: int = 0
    kv_cache_alloc_new_blocks: int = 0
    kv_cache_reused_block: int = 0
    kv_cache_missed_block: int = 0
    kv_cache_hit_rate: float = 0.0
    acceptance_rate: float | None = None
    total_accepted_draft_tokens: int | None = None
    total_draft_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """What is new of one request since its last output; the last one of a request has `finished` set.

    `stop_reason` is the stop token's id, or the last id of the stop word that ended the text; None for an end-of-text
    token. `prompt_logprobs` comes once, with the first output: one entry per prompt token, None for the first.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finished: bool = False
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: TrtbuildError | None = None
    metrics: RequestMetrics | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """All that one request produced. `cumulative_logprob` is None unless log-probabilities were asked for."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    cumulative_logprob: float | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment's counts. `cached_blocks` are free blocks whose contents can still be reused; they count as free too.

    `draft_tokens` were verified, `accepted_draft_tokens` of them were right.
    """

    total_blocks: int
    free_blocks: int
    used_blocks: int
    cached_blocks: int
    running: int
    waiting: int
    preemptions: int
    reused_blocks: int
    missed_blocks: int
    evicted_blocks: int
    steps: int
    generated_tokens: int
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What a loaded engine is; `notes` are sentences that a user should see at load.

    `path` is "fast", or "general: " and the reason why the fast path does not take the model. `speculation` is the
    method.
    """

    architecture: str
    vocab_size: int
    max_seq_len: int
    max_batch_size: int
    kv_cache_tokens: int
    tokens_per_block: int
    kv_cache_dtype: str
    device: str
    compute_dtype: str
    weights: str
    path: str
    eos_token_ids: tuple[int, ...]
    notes: tuple[str, ...] = ()
    speculation: str = "none"
