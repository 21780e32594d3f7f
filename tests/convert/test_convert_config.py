"""Keys of ``config.json`` that no other test reads, by family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic import plain
from test_roundtrip import convert

from trtbuild.errors import CompatibilityError

FACTORS = [1.0 + index / 10 for index in range(16)]
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": FACTORS, "long_factor": FACTORS[::-1],
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def config_of(name: str, path: Path, **changes: Any) -> dict[str, Any]:
    convert(plain(path / "plain", name, **changes), path / "out", 2, 1)
    return json.loads((path / "out" / "config.json").read_text(encoding="utf-8"))


def test_long_contexts_of_phi3(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "max_position_embeddings": 131072,
        "rope_parameters": LONG,
        "original_max_position_embeddings": 4096,
    }
    wanted = {
        "position_embedding_type": "long_rope", "original_max_position_embeddings": 4096, "rotary_scaling": None,
        "longrope_scaling_short_factors": FACTORS, "longrope_scaling_long_factors": FACTORS[::-1],
        "max_position_embeddings": 131072, "hidden_act": "swiglu",
    }  # fmt: skip
    assert wanted.items() <= config_of("phi3", tmp_path, **changes).items()
    changes["max_position_embeddings"] = 8192
    with pytest.raises(CompatibilityError, match="uses them from 128000 tokens on"):
        config_of("phi3", tmp_path / "short", **changes)


def test_gemma(tmp_path: Path) -> None:
    two = config_of("gemma2", tmp_path / "2")
    wanted: dict[str, Any] = {
        "architecture": "Gemma2ForCausalLM", "inter_layernorms": True, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256, "hidden_act": "gelu_pytorch_tanh",
    }  # fmt: skip
    assert wanted.items() <= two.items()
    wanted = {
        "architecture": "Gemma3ForCausalLM", "sliding_window_pattern": 2, "_sliding_window_pattern": 2,
        "sliding_window": 32, "rope_local_base_freq": 3000.0, "rotary_base": 50000.0, "qk_layernorm": True,
    }  # fmt: skip
    assert wanted.items() <= config_of("gemma3", tmp_path / "3").items()


def test_experts(tmp_path: Path) -> None:
    qwen = config_of("qwen3_moe", tmp_path / "qwen")
    assert qwen["moe"] == {"num_experts": 4, "top_k": 2, "normalization_mode": 1}
    assert (qwen["qwen_type"], qwen["moe_intermediate_size"], qwen["hidden_act"]) == ("qwen3_moe", 256, "swiglu")
    assert (qwen["mapping"]["moe_tp_size"], qwen["mapping"]["moe_ep_size"]) == (2, 1)
    mixtral = config_of("mixtral", tmp_path / "mixtral")
    assert mixtral["moe"] == {"num_experts": 4, "top_k": 2, "normalization_mode": 1}
    plain_softmax = config_of("qwen3_moe", tmp_path / "plain", norm_topk_prob=False)
    assert plain_softmax["moe"]["normalization_mode"] == 0
