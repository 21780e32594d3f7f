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
from trtbuild.recipe_training import Train


class Speculative(Section):
    """Speculative decoding."""

    method: SpeculativeMethod = Field(
        default="none",
        description="How tokens are drafted; draft_target: all runtimes; ngram and eagle3: embedded and trtllm; "
        "medusa: embedded and trtllm-engine; mtp: trtllm only; eagle, lookahead and redrafter: trtllm-engine only.",
    )
    draft: NonEmpty | None = Field(
        default=None,
        description="Checkpoint of the draft model; of medusa, eagle and redrafter TensorRT-LLM's own, with the heads; "
        "for embedded, Medusa heads alone or ModelOpt's export.",
    )
    train: Train | None = Field(
        default=None, description="medusa, eagle3: heads or draft are trained for this model, instead of `draft`."
    )
    max_draft_len: PositiveInt | None = Field(
        default=None,
        description="Tokens drafted at a time; by default 5 (draft_target), 4 (ngram), 3 (eagle3), 1 (mtp).",
    )
    draft_kv_cache_share: Fraction | None = Field(
        default=None,
        description="draft_target: the draft's share of the KV cache's memory; by default by bytes a token.",
    )
    choices: tuple[tuple[Annotated[int, Field(ge=0)], ...], ...] | None = Field(
        default=None, description="medusa, eagle: paths through the tree of drafts, for example [[0], [0, 0], [1]]."
    )
    max_concurrency: PositiveInt | None = Field(
        default=None, description="embedded, trtllm: no drafts while more requests than this run at once."
    )
    draft_len_schedule: dict[PositiveInt, Annotated[int, Field(ge=0)]] | None = Field(
        default=None,
        description="embedded, trtllm: draft length by the least number of running requests, for example {1: 4, 8: 2, "
        "32: 0}.",
    )
    allow_advanced_sampling: bool | None = Field(
        default=None,
        description="trtllm: sampled requests are sampled where one engine has model and draft; by default true.",
    )
    max_matching_ngram_size: PositiveInt | None = Field(
        default=None, description="ngram: longest run of tokens that is looked up."
    )
    is_keep_all: bool | None = Field(default=None, description="ngram: keep every match of a run, not only one.")
    is_use_oldest: bool | None = Field(default=None, description="ngram: draft from the oldest match, not the newest.")
    is_public_pool: bool | None = Field(default=None, description="ngram: requests share what they have seen.")
    eagle3_one_model: bool | None = Field(
        default=None, description="eagle3: model and draft in one engine; false takes two."
    )
    eagle3_layers_to_capture: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None,
        min_length=1,
        description="eagle3: the model's layers whose outputs the draft reads; by default as it says.",
    )
    num_nextn_predict_layers: PositiveInt | None = Field(
        default=None, description="mtp: what max_draft_len is called up to TensorRT-LLM 1.3.0rc15."
    )
    max_window_size: PositiveInt | None = Field(default=None, description="lookahead: n-grams that are looked for.")
    max_ngram_size: PositiveInt | None = Field(default=None, description="lookahead: tokens of an n-gram.")
    max_verification_set_size: PositiveInt | None = Field(
        default=None, description="lookahead: n-grams that are verified."
    )
