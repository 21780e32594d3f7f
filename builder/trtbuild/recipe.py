"""The recipe: what the user wants, as strict and frozen values.

Loading is parse, override, migrate, validate. Nothing is filled in or rewritten here: an absent value stays absent, and
the plan says which default took its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1
# Tokens of a calibration sample, and of an evaluation.
MIN_CALIBRATION_LENGTH, MIN_EVALUATION_TOKENS = 16, 4096
# Files that text is read from.
TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")

Format = Literal["none", "fp8", "int4_awq"]
KvCacheFormat = Literal["none", "fp8"]
Sparsity = Literal["none", "2:4"]
RuntimeKind = Literal["embedded", "trtllm", "trtllm-engine"]
SpeculativeMethod = Literal["none", "ngram", "draft_target", "medusa", "eagle", "eagle3", "lookahead", "redrafter"]
CapacityPolicy = Literal["GUARANTEED_NO_EVICT", "MAX_UTILIZATION"]
BuildIn = Literal["auto", "docker", "podman", "enroot", "slurm", "script"]
DeployFile = Literal["dockerfile", "compose", "launch"]

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
NonEmpty = Annotated[str, Field(min_length=1)]
# Triton takes the directory's name as the model's name, and a name must be safe as both.
TritonName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(_Section):
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


class Calibration(_Section):
    """The text that decides scales and sparsity masks."""

    data: NonEmpty | None = Field(
        default=None, description="A .txt, .jsonl or .parquet file; by default the text that trtbuild ships."
    )
    column: NonEmpty | None = Field(
        default=None, description="Column of the file: text, or chat messages for the chat template."
    )
    count: PositiveInt = Field(default=128, description="Number of samples.")
    length: Annotated[int, Field(ge=MIN_CALIBRATION_LENGTH)] = Field(default=512, description="Tokens per sample.")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Which samples are drawn.")


class Compress(_Section):
    """What happens to the weights and to the KV cache."""

    format: Format = Field(default="none", description="Weight format: none keeps bf16.")
    group_size: PositiveInt | None = Field(
        default=None, description="Weights per INT4 scale along the input; int4_awq only."
    )
    kv_cache: KvCacheFormat = Field(default="none", description="Format of the KV cache: none keeps the compute type.")
    sparsity: Sparsity = Field(default="none", description="2:4 keeps two of every four weights along the input.")
    sparsity_method: Literal["sparsegpt", "magnitude"] | None = Field(
        default=None, description="How 2:4 chooses the weights to keep."
    )
    calibration: Calibration = Calibration()
    exclude: tuple[NonEmpty, ...] = Field(
        default=(), description="Module name patterns (shell wildcards) that stay in bf16."
    )
    max_memory: NonEmpty | None = Field(default=None, description="Upper bound on memory, for example 8GiB.")


class Speculative(_Section):
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


class KvCache(_Section):
    """The paged KV cache of the runtime."""

    free_gpu_memory_fraction: Fraction = Field(
        default=0.9, description="Share of the free GPU memory that the cache may take."
    )
    max_tokens: PositiveInt | None = Field(default=None, description="Capacity in tokens.")
    tokens_per_block: Annotated[int, Field(ge=1, le=1024)] = Field(default=32, description="Tokens per block.")
    enable_block_reuse: bool = Field(default=True, description="Share the blocks of equal prompt beginnings.")
    host_cache_size: PositiveInt | None = Field(
        default=None, description="trtllm: bytes of host memory that blocks are offloaded to."
    )
    max_attention_window: tuple[PositiveInt, ...] | None = Field(
        default=None, description="trtllm: tokens each layer attends to, repeated over the layers."
    )


class CudaGraph(_Section):
    """CUDA graphs for steps that only decode."""

    enabled: bool = Field(default=True, description="Whether graphs are captured at all.")
    batch_sizes: tuple[PositiveInt, ...] | None = Field(default=None, description="Batch sizes to capture.")
    max_batch_size: PositiveInt | None = Field(default=None, description="Largest batch size to capture.")
    enable_padding: bool | None = Field(default=None, description="Round batches up to the next captured size.")


class Moe(_Section):
    """Mixture of experts."""

    backend: NonEmpty | None = Field(default=None, description="Which kernels run the experts, for example CUTLASS.")


class Lora(_Section):
    """LoRA adapters."""

    max_lora_rank: PositiveInt | None = Field(default=None, description="Highest rank of an adapter.")
    lora_target_modules: tuple[NonEmpty, ...] = Field(
        default=(), description="TensorRT-LLM's names of the adapted modules, for example attn_q."
    )
    max_loras: PositiveInt | None = Field(default=None, description="Adapters in GPU memory at the same time.")
    max_cpu_loras: PositiveInt | None = Field(default=None, description="Adapters in host memory at the same time.")


class Runtime(_Section):
    """What executes the engine, and its limits."""

    kind: RuntimeKind = Field(
        description="embedded, trtllm (PyTorch LLM API) or trtllm-engine (TensorRT engines, <= 1.2.x)."
    )
    version: NonEmpty | None = Field(default=None, description="Version of TensorRT-LLM, or a Triton container tag.")
    allow_unknown_version: bool = Field(
        default=False, description="Take a version that no table has, with the argument schema of its release line."
    )
    build_in: BuildIn = Field(
        default="auto",
        description="trtllm-engine: what runs trtllm-build in its container. auto takes what works on this host, where "
        "it has the target's GPUs; script, or auto without them, leaves it to engine/build.sh.",
    )
    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = 1
    context_parallel_size: PositiveInt = Field(default=1, description="trtllm: ranks that share one long prompt.")
    moe_expert_parallel_size: PositiveInt | None = Field(
        default=None, description="trtllm: ranks that share the experts; divides tensor_parallel_size."
    )
    enable_attention_dp: bool = Field(default=False, description="trtllm: attention data parallel, experts sharded.")
    max_batch_size: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=8, description="Requests that run at the same time."
    )
    max_num_tokens: PositiveInt | None = Field(default=None, description="Tokens of one step over all requests.")
    max_seq_len: Annotated[int, Field(ge=2)] | None = Field(default=None, description="Prompt plus answer, in tokens.")
    kv_cache: KvCache = KvCache()
    capacity_scheduler_policy: CapacityPolicy = Field(
        default="GUARANTEED_NO_EVICT", description="Reserve to completion, or fill up and pre-empt when blocks run out."
    )
    context_chunking_policy: NonEmpty | None = Field(
        default=None, description="trtllm: how chunked prefill divides a step, for example EQUAL_PROGRESS."
    )
    enable_chunked_prefill: bool = Field(default=True, description="Split long prompts over several steps.")
    cuda_graph_config: CudaGraph = CudaGraph()
    attn_backend: Literal["TRTLLM", "FLASHINFER", "VANILLA"] | None = Field(
        default=None, description="trtllm: attention kernels."
    )
    moe_config: Moe = Moe()
    guided_decoding_backend: Literal["xgrammar", "llguidance"] | None = Field(
        default=None,
        description="trtllm: what follows a grammar or JSON schema; without one, such requests are refused.",
    )
    lora_config: Lora = Lora()
    stream_interval: PositiveInt | None = Field(default=None, description="trtllm: tokens per streamed answer.")
    return_perf_metrics: bool = Field(default=False, description="trtllm: times and cache counts of each request.")
    enable_iter_perf_stats: bool = Field(default=False, description="trtllm: statistics of each step, for the gauges.")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="embedded only: where the engine runs.")
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="embedded only: arithmetic type."
    )
    weights: Literal["auto", "expanded", "packed"] = Field(
        default="auto",
        description="embedded only: expanded is faster on a CPU, packed keeps the file's size in memory.",
    )
    extra: Mapping[str, Any] = Field(default={}, description="The vendor's own keys, passed through after a check.")


class Target(_Section):
    """The GPUs that will serve."""

    gpu: NonEmpty | None = Field(default=None, description="Name of the GPU, for example H100.")
    count: PositiveInt | None = Field(default=None, description="How many; leave the section out for a CPU.")


class Serving(_Section):
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


class Deploy(_Section):
    """Deployment files in the package."""

    image: NonEmpty | None = Field(
        default=None, description="Name of the container image that will be built from the package."
    )
    labels: Mapping[str, str] = Field(default={}, description="Labels of that image.")
    files: tuple[DeployFile, ...] = Field(
        default=("dockerfile", "compose", "launch"), description="Which files to write."
    )


class Quality(_Section):
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


class Recipe(_Section):
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
