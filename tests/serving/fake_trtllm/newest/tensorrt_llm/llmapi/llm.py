"""`LLM` with the signatures of tensorrt_llm/llmapi/llm.py in arusli-nv/TensorRT-LLM @99a813ec (2026)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fake_trtllm import BaseLLM, Flavour, GenerationResult

_ARGUMENTS = frozenset(
    [
        "_mpi_session",
        "attn_backend",
        "backend",
        "context_parallel_size",
        "cuda_graph_config",
        "disable_overlap_scheduler",
        "enable_chunked_prefill",
        "enable_iter_perf_stats",
        "enable_lora",
        "generation_config",
        "gpus_per_node",
        "guided_decoding_backend",
        "kv_cache_config",
        "lora_config",
        "max_batch_size",
        "max_beam_width",
        "max_num_tokens",
        "max_seq_len",
        "moe_config",
        "peft_cache_config",
        "pipeline_parallel_size",
        "return_perf_metrics",
        "revision",
        "scheduler_config",
        "speculative_config",
        "stream_interval",
    ]
)


class LLM(BaseLLM):
    flavour = Flavour(
        honours=frozenset(["bad", "min_p", "min_tokens", "penalties", "seed"]),
        reports_sampled_token=True,
        raises_errors=False,
        counts_drafts=True,
        arguments=_ARGUMENTS,
    )

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.start(model, tokenizer, kwargs)

    def generate_async(
        self,
        inputs: Any,
        sampling_params: Any = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
        kv_cache_retention_config: Any = None,
        disaggregated_params: Any = None,
        trace_headers: Any = None,
        _postproc_params: Any = None,
        scheduling_params: Any = None,
        conversation_params: Any = None,
        cache_salt: str | None = None,
        priority: float = 0.5,
    ) -> GenerationResult:
        return self.begin(inputs, sampling_params, lora_request, streaming, cache_salt)

    def get_stats_async(self, timeout: float | None = 2) -> AsyncIterator[dict[str, Any]]:
        return self.stats(timeout or 2)
