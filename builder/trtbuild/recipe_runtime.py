"""The recipe's sections `runtime` and `target`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from trtbuild.recipe_fields import (
    BuildIn,
    CapacityPolicy,
    Fraction,
    NonEmpty,
    PositiveInt,
    RuntimeKind,
    Section,
)


class KvCache(Section):
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


class CudaGraph(Section):
    """CUDA graphs for steps that only decode."""

    enabled: bool = Field(default=True, description="Whether graphs are captured at all.")
    batch_sizes: tuple[PositiveInt, ...] | None = Field(default=None, description="Batch sizes to capture.")
    max_batch_size: PositiveInt | None = Field(default=None, description="Largest batch size to capture.")
    enable_padding: bool | None = Field(default=None, description="Round batches up to the next captured size.")


class Moe(Section):
    """Mixture of experts."""

    backend: NonEmpty | None = Field(default=None, description="Which kernels run the experts, for example CUTLASS.")


class Lora(Section):
    """LoRA adapters."""

    max_lora_rank: PositiveInt | None = Field(default=None, description="Highest rank of an adapter.")
    lora_target_modules: tuple[NonEmpty, ...] = Field(
        default=(), description="TensorRT-LLM's names of the adapted modules, for example attn_q."
    )
    max_loras: PositiveInt | None = Field(default=None, description="Adapters in GPU memory at the same time.")
    max_cpu_loras: PositiveInt | None = Field(default=None, description="Adapters in host memory at the same time.")


class Runtime(Section):
    """What executes the engine, and its limits."""

    kind: RuntimeKind = Field(
        description="embedded, trtllm (PyTorch LLM API) or trtllm-engine (TensorRT engines, <= 1.2.x)."
    )
    version: NonEmpty | None = Field(default=None, description="Version of TensorRT-LLM, or a Triton container tag.")
    allow_unknown_version: bool = Field(
        default=False,
        description="Take a version that no table has, with the argument schema or the flags of its release line; for "
        "engines also one without a container.",
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


class Target(Section):
    """The GPUs that will serve."""

    gpu: NonEmpty | None = Field(default=None, description="Name of the GPU, for example H100.")
    count: PositiveInt | None = Field(default=None, description="How many; leave the section out for a CPU.")
