"""The recipe's section `speculative`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trtbuild.recipe_fields import (
    Fraction,
    NonEmpty,
    PositiveInt,
    Section,
    SpeculativeMethod,
)


class Speculative(Section):
    """Speculative decoding."""

    method: SpeculativeMethod = Field(
        default="none",
        description="How tokens are drafted; medusa, eagle, lookahead and redrafter: trtllm-engine only.",
    )
    draft: NonEmpty | None = Field(
        default=None,
        description="Checkpoint of the draft model; of medusa, eagle and redrafter TensorRT-LLM's own, with the heads.",
    )
    max_draft_len: PositiveInt | None = Field(
        default=None, description="draft_target: tokens that are drafted at a time; by default 5."
    )
    draft_kv_cache_share: Fraction | None = Field(
        default=None,
        description="draft_target: the draft's share of the KV cache's memory; by default by bytes a token.",
    )
    choices: tuple[tuple[Annotated[int, Field(ge=0)], ...], ...] | None = Field(
        default=None, description="medusa, eagle: paths through the tree of drafts, for example [[0], [0, 0], [1]]."
    )
    max_window_size: PositiveInt | None = Field(default=None, description="lookahead: n-grams that are looked for.")
    max_ngram_size: PositiveInt | None = Field(default=None, description="lookahead: tokens of an n-gram.")
    max_verification_set_size: PositiveInt | None = Field(
        default=None, description="lookahead: n-grams that are verified."
    )
