"""Which LLM argument says what a field of the recipe says, where the two differ in place or name.

Recipe fields carry the LLM API's names; what differs is the section they stand in.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_SAME = (
    *("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size", "moe_expert_parallel_size"),
    *(
        "enable_attention_dp",
        "max_batch_size",
        "max_num_tokens",
        "max_seq_len",
        "enable_chunked_prefill",
        "attn_backend",
    ),
    *("guided_decoding_backend", "stream_interval", "return_perf_metrics", "enable_iter_perf_stats"),
    *("cuda_graph_config.batch_sizes", "cuda_graph_config.max_batch_size", "cuda_graph_config.enable_padding"),
    *("moe_config.backend", "lora_config.max_lora_rank", "lora_config.lora_target_modules", "lora_config.max_loras"),
    "lora_config.max_cpu_loras",
)
_KV_CACHE = (
    *("free_gpu_memory_fraction", "max_tokens", "tokens_per_block", "enable_block_reuse", "host_cache_size"),
    "max_attention_window",
)
_SCHEDULER = ("capacity_scheduler_policy", "context_chunking_policy")

LLM_ARGUMENT: Mapping[str, str] = MappingProxyType(
    {
        "model.trust_remote_code": "trust_remote_code",
        "serving.max_input_tokens": "max_input_len",
        "compress.kv_cache": "kv_cache_config.dtype",
        "runtime.cuda_graph_config.enabled": "cuda_graph_config",
        **{f"runtime.{name}": name for name in _SAME},
        **{f"runtime.kv_cache.{name}": f"kv_cache_config.{name}" for name in _KV_CACHE},
        **{f"runtime.{name}": f"scheduler_config.{name}" for name in _SCHEDULER},
    }
)
# What the package itself decides: places, and the checkpoint's own quantization.
RESERVED: Mapping[str, str] = MappingProxyType(
    {
        "model": "the package holds the model",
        "tokenizer": "the package holds the tokenizer",
        "revision": "the package holds the model",
        "tokenizer_revision": "the package holds the tokenizer",
        "load_format": "the package's weights are loaded as they are",
        "backend": "trtbuild writes arguments for the pytorch backend",
        "enable_lora": "runtime.lora_config says it",
        "lora_config.lora_dir": "the package holds the adapters of model.adapters",
    }
)


def leaves(document: Mapping[str, object], path: str = "") -> list[tuple[str, object]]:
    """Every value of a nested document under its dotted path; an empty section is a value."""
    found: list[tuple[str, object]] = []
    for key, value in document.items():
        here = f"{path}.{key}" if path else str(key)
        found += leaves(value, here) if isinstance(value, Mapping) and value else [(here, value)]
    return found
