"""Configs for readers that know only Transformers 4: the rotary parameters under both names."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from trtbuild.compress.metadata import _add_older_rope_names

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
          "original_max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize(
    ("written", "older"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, {"rope_theta": 1e5}),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 1e4},
        ),
        ({"rope_theta": 1e5}, {}),
        ({"rope_theta": 1e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, {}),
        ({"rope_parameters": {"rope_type": "default"}}, {}),
        ({}, {}),
    ],
)
def test_older_names_are_added_and_nothing_is_changed(written: dict[str, Any], older: dict[str, Any]) -> None:
    section = {"model_type": "llama", **written}
    _add_older_rope_names(section)
    assert section == {"model_type": "llama", **written, **older}


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_transformers_5_reads_the_same_config(name: str) -> None:
    """The names of Transformers 4 beside its own change nothing for Transformers 5."""
    parameters: Any = {**LLAMA3, "rope_theta": 5e5}
    if name == "gemma3_text":
        parameters = {"full_attention": parameters, "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}
    plain = {"rope_parameters": parameters, "num_hidden_layers": 6}
    both = {**plain}
    _add_older_rope_names(both)
    assert both != plain
    assert AutoConfig.for_model(name, **both).rope_parameters == AutoConfig.for_model(name, **plain).rope_parameters
