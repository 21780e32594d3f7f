"""What the sections of a recipe are made of: the strict base class and the types of its values."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# Tokens of a calibration sample, and of an evaluation.
MIN_CALIBRATION_LENGTH, MIN_EVALUATION_TOKENS = 16, 4096
# Files that text is read from.
TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
# `compress.calibration.data` for text that the model itself writes.
SELF = "self"

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
NonEmpty = Annotated[str, Field(min_length=1)]
# Triton takes the directory's name as the model's name, and a name must be safe as both.
TritonName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]

Format = Literal[
    "none", "fp8", "fp8_per_channel_per_token", "fp8_block", "int8_sq", "int8_weight_only", "int4_awq", "int4_gptq",
    "w4a8_awq", "nvfp4", "nvfp4_awq", "w4a16_nvfp4", "mxfp4", "mxfp8",
]  # fmt: skip
KvCacheFormat = Literal["none", "fp8", "nvfp4", "int8"]
Sparsity = Literal["none", "2:4"]
RuntimeKind = Literal["embedded", "trtllm", "trtllm-engine"]
SpeculativeMethod = Literal[
    "none", "ngram", "draft_target", "medusa", "eagle", "eagle3", "mtp", "lookahead", "redrafter"
]
CapacityPolicy = Literal["GUARANTEED_NO_EVICT", "MAX_UTILIZATION"]
BuildIn = Literal["auto", "docker", "podman", "enroot", "slurm", "script"]
DeployFile = Literal["dockerfile", "compose", "launch"]


class Section(BaseModel):
    """A part of a recipe: no unknown key, no guessed type, no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
