"""LLM arguments against the schema of one version: the sentences that a user sees."""

from __future__ import annotations

from typing import Any

import pytest

from trtbuild.llm_schema import load_schema
from trtbuild.llm_validate import validate

OLD, NEW = "TensorRT-LLM 1.2.1", "TensorRT-LLM newest (00043967)"


def problems(document: dict[str, Any], schema: str = "1.2.1", **options: Any) -> list[str]:
    return [str(problem) for problem in validate(document, load_schema(schema), **({"partial": True} | options))]


@pytest.mark.parametrize(
    ("document", "schema", "sentence"),
    [
        ({"stream_intervall": 2}, "1.2.1", f"is not an argument of {OLD}; did you mean stream_interval?"),
        ({"qwertz": 2}, "1.2.1", f"qwertz: is not an argument of {OLD}; remove it"),
        ({"stream_interval": "2"}, "1.2.1", "stream_interval: '2' must be a whole number"),
        ({"stream_interval": True}, "1.2.1", "stream_interval: True must be a whole number"),
        ({"enable_attention_dp": 1}, "1.2.1", "enable_attention_dp: 1 must be true or false"),
        (
            {"model_kwargs": {}},
            "1.2.1",
            f"model_kwargs: is not an argument of {OLD}; it came with TensorRT-LLM 1.3.0rc3 (5978a465); remove it",
        ),
        (
            {"kv_cache_config": {"onboard_blocks": True}},
            "newest",
            f"kv_cache_config.onboard_blocks: is not an argument of {NEW}; it was removed after TensorRT-LLM 1.3.0rc3",
        ),
        ({"sleep_config": {}}, "1.2.1", f"sleep_config: is not an argument of {OLD}; there it is called enable_sleep"),
        (
            {"enable_sleep": True},
            "newest",
            f"enable_sleep: is not an argument of {NEW}; there it is called sleep_config",
        ),
        (
            {"moe_config": {"backend": "CUTLAS"}},
            "1.2.1",
            "allowed: CUTLASS, CUTEDSL, WIDEEP, TRTLLM, DEEPGEMM, VANILLA, TRITON; did you mean CUTLASS?",
        ),
        (
            {"kv_cache_config": {"max_tokens": "many"}},
            "1.2.1",
            f"kv_cache_config.max_tokens: 'many' is not allowed by {OLD}; allowed: a whole number, null",
        ),
        ({"kv_cache_config": 3}, "1.2.1", "kv_cache_config: 3 must be a section of its own; write its fields indented"),
        (
            {"kv_cache_config": {"max_attention_window": [1, "x"]}},
            "1.2.1",
            "kv_cache_config.max_attention_window.1: 'x' m",
        ),
        (
            {"scheduler_config": {"capacity_scheduler_policy": "GUARANTEED"}},
            "1.2.1",
            "allowed: MAX_UTILIZATION, GUARANTEED_NO_EVICT, STATIC_BATCH",
        ),
        (
            {"speculative_config": {"decoding_type": "Medusa"}},
            "1.2.1",
            "speculative_config.decoding_type: Medusa runs in TensorRT engines only, not on the PyTorch backend; allow",
        ),
        (
            {"speculative_config": {"decoding_type": "Eagle3"}},
            "1.2.1",
            f"speculative_config.decoding_type: 'Eagle3' is not known to {OLD}; allowed: MTP, Eagle, NGram, DraftTarge",
        ),
        (
            {"speculative_config": {"max_draft_len": 3}},
            "1.2.1",
            "speculative_config.decoding_type: is required; allowed",
        ),
        (
            {"speculative_config": {"decoding_type": "NGram", "max_draft": 3}},
            "1.2.1",
            "max_draft: is not an argument of",
        ),
    ],
)
def test_what_is_refused(document: dict[str, Any], schema: str, sentence: str) -> None:
    found = problems(document, schema)
    assert len(found) == 1
    assert sentence in found[0]


@pytest.mark.parametrize("schema", ["1.2.1", "1.3rc", "newest"])
def test_what_is_taken(schema: str) -> None:
    document = {
        "tensor_parallel_size": 2,
        "kv_cache_config": {"free_gpu_memory_fraction": 0.8, "max_tokens": None, "dtype": "fp8"},
        "cuda_graph_config": None,
        "scheduler_config": {"context_chunking_policy": "FIRST_COME_FIRST_SERVED"},
        "speculative_config": {"decoding_type": "NGram", "max_draft_len": 4},
        "lora_config": {"max_lora_rank": 8, "lora_target_modules": ["attn_q"]},
    }
    assert problems(document, schema) == []


def test_bounds() -> None:
    assert problems({"speculative_config": {"decoding_type": "NGram", "max_draft_len": -1}}, "newest") != []
    assert problems({"kv_cache_config": {"free_gpu_memory_fraction": 1.5}}, "newest") == [
        "kv_cache_config.free_gpu_memory_fraction: 1.5 must be at most 1"
    ]


def test_required_arguments_and_places() -> None:
    assert problems({}, partial=False) == [f"model: is required by {OLD}"]
    assert problems({"x": 1}, at="runtime.extra")[0].startswith("runtime.extra.x: ")
