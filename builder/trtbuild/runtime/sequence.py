"""The engine's own state of one request: its tokens, its blocks, how far it is computed."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import torch

from trtbuild.runtime.drafts.draft import Draft
from trtbuild.runtime.outputs import RequestMetrics, TokenLogprob
from trtbuild.runtime.sampling_params import SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """One request as the scheduler, the runner and the sampler see it; only the engine thread touches it."""

    request_id: int
    prompt_len: int
    token_ids: list[int]
    params: SamplingParams
    end_ids: frozenset[int]
    stop_ids: frozenset[int]
    rng: random.Random
    # The likeliest tokens and nothing else; asked once, not at every token.
    plain: bool = False
    # Every position's logits are wanted, and nothing is generated.
    logits: list[torch.Tensor] | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    chunk_limit: int | None = None

    num_computed: int = 0
    # How many of the last `token_ids` are still on the device, with 0 in their places, and the row of the newest step
    # whose choice the last of them is.
    unknown: int = 0
    row: int = 0
    finished: bool = False
    block_table: list[int] = field(default_factory=list)
    table_version: int = 0  # changes whenever `block_table` does
    hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0
    # The first slot where the block table is one run, else None; `slots` then lists the slots of all its blocks.
    base: int | None = 0
    slots: torch.Tensor | None = None

    # What may come next, for the step that is being scheduled; then how many such tokens were verified, and were right.
    draft: Draft | None = None
    drafted: int = 0
    accepted: int = 0

    output_counts: Counter[int] = field(default_factory=Counter)
    seen_ids: dict[int, None] = field(default_factory=dict)

    arrival_ns: int = 0
    scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    reused_blocks: int = 0
    missed_blocks: int = 0
    new_blocks: int = 0

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.prompt_len

    @property
    def tokens_left(self) -> int:
        """How many tokens may still be generated."""
        return self.params.max_tokens - self.num_output if self.logits is None else 0

    @property
    def wants_every_position(self) -> bool:
        """Whether the logits of prompt positions are needed, so that none may come from the prefix cache."""
        return self.logits is not None or self.params.prompt_logprobs is not None

    @property
    def final_length(self) -> int:
        """The most positions that will ever be computed: the last generated token is never fed back."""
        return self.prompt_len if self.logits is not None else self.prompt_len + self.params.max_tokens - 1

    @property
    def is_spent(self) -> bool:
        """Whether all tokens that were asked for are chosen or on their way."""
        return len(self.token_ids) - self.prompt_len >= self.params.max_tokens

    def may_stop(self, token_id: int) -> bool:
        """Whether the text may end with `token_id`, which is still to be looked at."""
        return token_id in self.end_ids or token_id in self.stop_ids or len(self.params.stop_words) > 0

    def promise(self, row: int) -> None:
        """Keep a place for the token that the step just launched will choose in `row`."""
        self.token_ids.append(0)
        self.unknown += 1
        self.row = row

    def append(self, token_id: int) -> None:
        """Add a generated token."""
        self.token_ids.append(token_id)
        if self.params.presence_penalty or self.params.frequency_penalty:
            self.output_counts[token_id] += 1
        if self.params.repetition_penalty != 1.0:
            self.seen_ids[token_id] = None

    def metrics(self) -> RequestMetrics:
        """The times and block counts so far."""
        full = self.reused_blocks + self.missed_blocks
        return RequestMetrics(
            arrival_time_ns=self.arrival_ns,
            first_scheduled_time_ns=self.scheduled_ns,
            first_token_time_ns=self.first_token_ns,
            last_token_time_ns=self.last_token_ns,
            kv_cache_alloc_total_blocks=self.new_blocks + self.reused_blocks,
            kv_cache_alloc_new_blocks=self.new_blocks,
            kv_cache_reused_block=self.reused_blocks,
            kv_cache_missed_block=self.missed_blocks,
            kv_cache_hit_rate=self.reused_blocks / full if full else 0.0,
            acceptance_rate=self.accepted / self.drafted if self.drafted else None,
            total_accepted_draft_tokens=self.accepted if self.drafted else None,
            total_draft_tokens=self.drafted or None,
        )


def blank_sequence(request_id: int) -> Sequence:
    """A drafter's own sequence of a request, without tokens; what is wanted of the answer does not concern it."""
    return Sequence(
        request_id=request_id,
        prompt_len=0,
        token_ids=[],
        params=SamplingParams(),
        end_ids=frozenset(),
        stop_ids=frozenset(),
        rng=random.Random(0),  # noqa: S311 - never drawn from
    )
