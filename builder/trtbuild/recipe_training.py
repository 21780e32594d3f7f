"""The recipe's section `speculative.train`: heads or a draft, trained for the model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trtbuild.recipe_fields import Fraction, NonEmpty, PositiveInt, Section

# Tokens of a prompt with its answer.
MIN_TRAINING_LENGTH = 16
_MOST_HEADS = 16


class Train(Section):
    """Heads of Medusa or the draft of EAGLE-3, trained on answers of the model itself to the user's prompts."""

    prompts: NonEmpty = Field(
        description="A .txt or .md (one prompt a line), .jsonl or .parquet file: prompts like those to be served."
    )
    column: NonEmpty | None = Field(
        default=None, description="Column of the file: text, taken as it is, or chat messages for the chat template."
    )
    samples: Annotated[int, Field(ge=2)] = Field(
        default=128, description="At most so many prompts; some of them are held out."
    )
    held_out: Fraction = Field(default=0.1, description="Share of the prompts that acceptance is measured on.")
    max_seq_len: Annotated[int, Field(ge=MIN_TRAINING_LENGTH)] | None = Field(
        default=None, description="Tokens of a prompt with its answer; by default 256. Longer prompts are left out."
    )
    max_answer_tokens: PositiveInt | None = Field(
        default=None, description="Tokens that the model answers with; by default half of max_seq_len."
    )
    epochs: PositiveInt = Field(default=3, description="How often every answer is seen.")
    batch_size: PositiveInt = Field(default=4, description="Answers in a step.")
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="The highest one; by default 0.001 (medusa), 0.0005 (eagle3)."
    )
    num_heads: Annotated[int, Field(ge=1, le=_MOST_HEADS)] | None = Field(
        default=None, description="medusa: heads, each for one more token ahead; by default 3."
    )
    num_layers: PositiveInt = Field(default=1, description="medusa: layers of a head; eagle3: layers of the draft.")
    ttt_steps: Annotated[int, Field(ge=1, le=_MOST_HEADS)] | None = Field(
        default=None, description="eagle3: tokens ahead that the draft is trained for; by default 3."
    )
    draft_vocab_size: PositiveInt | None = Field(
        default=None, description="eagle3: the most frequent tokens alone are drafted; by default all."
    )
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Which prompts are drawn, and in which order.")
