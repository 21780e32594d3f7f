"""Files for readers that know only Transformers 4: rotary parameters under both names, tokenizers under the older."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from tiny import save_tokenizer
from trtbuild.compress.metadata import _add_older_rope_names, _use_older_tokenizer_names

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


def test_a_tokenizer_under_older_names_is_the_same_tokenizer(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    written = json.loads(path.read_text()) | {"extra_special_tokens": ["<|im_start|>"]}
    path.write_text(json.dumps(written))
    before = AutoTokenizer.from_pretrained(tmp_path)
    _use_older_tokenizer_names(path)
    found = json.loads(path.read_text())
    assert found.pop("additional_special_tokens") == written.pop("extra_special_tokens")
    assert found == written | {"tokenizer_class": "PreTrainedTokenizerFast"}
    after = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user 🎉 text<|im_end|>"
    assert after.encode(text) == before.encode(text)
    assert after.all_special_tokens == before.all_special_tokens
    assert after.get_vocab() == before.get_vocab()


def test_a_tokenizer_under_older_names_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text('{"tokenizer_class":"LlamaTokenizer", "extra_special_tokens": {"image_token": "<image>"}}')
    before = path.read_bytes()
    _use_older_tokenizer_names(path)
    assert path.read_bytes() == before
    _use_older_tokenizer_names(tmp_path / "absent.json")
    assert not (tmp_path / "absent.json").exists()
