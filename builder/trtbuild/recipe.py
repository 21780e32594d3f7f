"""The recipe: what the user wants, as strict and frozen values.

Loading is parse, override, migrate, validate. Nothing is filled in or rewritten here: an absent value stays absent, and
the plan says which default took its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from trtbuild.recipe_compress import Compress
from trtbuild.recipe_fields import (
    MIN_EVALUATION_TOKENS,
    DeployFile,
    NonEmpty,
    PositiveInt,
    Section,
    TritonName,
)
from trtbuild.recipe_runtime import Runtime, Target
from trtbuild.recipe_speculative import Speculative

SCHEMA_VERSION = 1


class Model(Section):
    """Where the model comes from."""

    path: NonEmpty = Field(description="A checkpoint directory, or a Hugging Face hub id such as org/name.")
    revision: NonEmpty | None = Field(
        default=None, description="Branch, tag or commit of a hub id; the plan resolves it to a commit."
    )
    tokenizer: NonEmpty | None = Field(
        default=None, description="A directory with another tokenizer; by default the model's own."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that the checkpoint carries (auto_map)."
    )
    adapters: tuple[NonEmpty, ...] = Field(default=(), description="LoRA adapters to serve with the model.")


class Serving(Section):
    """The Triton model repository."""

    layout: Literal["llm", "ensemble", "tokens"] = Field(
        default="llm",
        description="llm is one model; ensemble is TensorRT-LLM's five (inflight_batcher_llm); tokens is the engine's "
        "model of those alone, token ids in and out (trtllm-engine).",
    )
    model_name: TritonName = "tensorrt_llm"
    streaming: bool = Field(default=True, description="Decoupled: answers may be streamed.")
    max_input_tokens: PositiveInt | None = Field(default=None, description="Longest prompt that is accepted.")
    max_output_tokens: PositiveInt | None = Field(default=None, description="Longest answer that may be asked for.")
    default_max_tokens: PositiveInt = Field(default=128, description="Answer length when a request does not say.")
    model_py: Literal["trtbuild", "upstream"] = Field(
        default="trtbuild",
        description="trtllm: whose model files serve; upstream stands for the container's own llmapi.",
    )
    gpu_device_ids: tuple[tuple[Annotated[int, Field(ge=0)], ...], ...] = Field(
        default=(),
        description="trtllm, trtllm-engine: one list of GPU numbers for each model instance; by default one instance.",
    )
    backend: Literal["tensorrtllm", "python"] | None = Field(
        default=None,
        description="trtllm-engine: tensorrtllm (C++) or python (the container's own model) executes the engine.",
    )
    communication_mode: Literal["leader", "orchestrator"] | None = Field(
        default=None,
        description="trtllm-engine: leader is one server for each rank; orchestrator is one server that starts a "
        "worker for each rank, also of several instances.",
    )


class Deploy(Section):
    """Deployment files in the package."""

    image: NonEmpty | None = Field(
        default=None, description="Name of the container image that will be built from the package."
    )
    labels: Mapping[str, str] = Field(default={}, description="Labels of that image.")
    files: tuple[DeployFile, ...] = Field(
        default=("dockerfile", "compose", "launch"), description="Which files to write."
    )


class Quality(Section):
    """Thresholds that stop a build; null switches a gate off."""

    max_perplexity_ratio: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Engine over original model."
    )
    max_kl_divergence: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Mean per token, in nats."
    )
    min_top1_agreement: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="Share of equal best tokens."
    )
    tokens: Annotated[int, Field(ge=MIN_EVALUATION_TOKENS)] = Field(
        default=4096, description="Held-out tokens to evaluate."
    )
    data: NonEmpty | None = Field(
        default=None, description="A held-out text file; by default the text that trtbuild ships."
    )


class Recipe(Section):
    """One recipe: from a checkpoint to a package."""

    schema_version: Literal[1]
    model: Model
    compress: Compress = Compress()
    speculative: Speculative = Speculative()
    runtime: Runtime
    target: Target = Target()
    serving: Serving = Serving()
    deploy: Deploy = Deploy()
    quality: Quality = Quality()
    store: NonEmpty | None = Field(
        default=None, description="Directory of the artifact store; by default in the user's cache."
    )


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors."""
    schema = Recipe.model_json_schema()
    return schema | {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "trtbuild recipe"}
