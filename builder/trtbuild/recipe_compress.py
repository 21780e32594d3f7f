"""The recipe's section `compress`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from trtbuild.recipe_fields import (
    MIN_CALIBRATION_LENGTH,
    Format,
    KvCacheFormat,
    NonEmpty,
    PositiveInt,
    Section,
    Sparsity,
)

# What `format: auto` chooses from where the recipe does not say it: what is measured on a CPU too.
AUTO_FORMATS: tuple[Format, ...] = ("fp8", "int4_awq")


class Calibration(Section):
    """The text that decides scales and sparsity masks."""

    data: NonEmpty | None = Field(
        default=None,
        description="A .txt, .md, .jsonl or .parquet file, a directory of them, a data set on disk, or self: sampled "
        "from the model; by default the text that trtbuild ships.",
    )
    column: NonEmpty | None = Field(
        default=None, description="Column of the data: text, or chat messages for the chat template."
    )
    split: NonEmpty | None = Field(default=None, description="Split of a data set on disk; train where it has one.")
    count: PositiveInt = Field(default=128, description="Number of samples.")
    length: Annotated[int, Field(ge=MIN_CALIBRATION_LENGTH)] = Field(default=512, description="Tokens per sample.")
    packing: Literal["packed", "padded"] = Field(
        default="packed",
        description="packed: documents one after another, full samples. padded: a document in a sample.",
    )
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Which samples are drawn.")


class Compress(Section):
    """What happens to the weights and to the KV cache."""

    format: Literal[Format, "auto"] = Field(
        default="none", description="Weight format: none keeps bf16, auto chooses one for each layer by measurement."
    )
    target_bits: Annotated[float, Field(gt=0.0, le=16.0)] | None = Field(
        default=None, description="format: auto: bits that a weight may take on average, with its share of the scales."
    )
    auto_formats: tuple[Format, ...] | None = Field(
        default=None, min_length=1, description="format: auto: what to choose from; none (bf16) is always a choice."
    )
    auto_method: Literal["gradient", "kl_div"] | None = Field(
        default=None, description="format: auto: how a layer's sensitivity is measured."
    )
    overrides: Mapping[NonEmpty, Format] = Field(
        default={},
        description="Module name patterns (shell wildcards) with the format of what they match; the last one counts.",
    )
    checkpoint: Literal["modelopt", "compressed-tensors"] = Field(
        default="modelopt", description="Form of the files: compressed-tensors is what vLLM reads in INT4."
    )
    group_size: PositiveInt | None = Field(
        default=None, description="Weights per INT4 scale along the input; int4_awq, int4_gptq and w4a8_awq only."
    )
    kv_cache: KvCacheFormat = Field(default="none", description="Format of the KV cache: none keeps the compute type.")
    sparsity: Sparsity = Field(default="none", description="2:4 keeps two of every four weights along the input.")
    sparsity_method: Literal["sparsegpt", "magnitude"] | None = Field(
        default=None, description="How 2:4 chooses the weights to keep; sparsegpt changes these too."
    )
    calibration: Calibration = Calibration()
    exclude: tuple[NonEmpty, ...] = Field(
        default=(), description="Module name patterns (shell wildcards) that stay in bf16."
    )
    max_memory: NonEmpty | None = Field(default=None, description="Upper bound on memory, for example 8GiB.")

    @property
    def formats(self) -> tuple[str, ...]:
        """Every weight format that layers may have, bf16 left out, in the order in which the recipe names them."""
        named = (
            (self.auto_formats or AUTO_FORMATS) if self.format == "auto" else (self.format, *self.overrides.values())
        )
        return tuple(dict.fromkeys(name for name in named if name != "none"))
