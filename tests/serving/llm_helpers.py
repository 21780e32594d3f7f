"""What several serving tests share beside fixtures."""

from __future__ import annotations

import http.client
from typing import Any

import numpy as np
from model_repo.llm.wire import INPUTS

from trtbuild.adapters.triton import RepositorySpec

START_S = 120.0
ENGINE = {
    "schema_version": 1,
    "runtime": "embedded",
    "max_batch_size": 8,
    "max_num_tokens": 512,
    "max_seq_len": 512,
    "kv_cache": {"dtype": "auto", "tokens_per_block": 32, "max_tokens": 4096},
    "device": "cpu",
    # Drafts change no answer, so that every test of a server is one of speculation too.
    "speculative": {"method": "ngram", "max_draft_len": 3},
}


def spec(**changes: Any) -> RepositorySpec:
    settings: dict[str, Any] = {
        "model_name": "tensorrt_llm",
        "runtime": "embedded",
        "layout": "llm",
        "streaming": True,
        "max_seq_len": 512,
        "max_input_tokens": 400,
        "max_output_tokens": 300,
        "default_max_tokens": 16,
    }
    return RepositorySpec(**settings | changes)


def gauge(server: Any, family: str, kind: str) -> float:
    """One number from the server's metrics port."""
    connection = http.client.HTTPConnection(server.address, server.ports.metrics, timeout=10)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    lines = [line for line in text.splitlines() if line.startswith(family + "{") and f'"{kind}"' in line]
    assert len(lines) == 1, text
    return float(lines[0].rsplit(" ", 1)[1])


DTYPES: dict[str, Any] = {
    "TYPE_STRING": object, "TYPE_INT32": np.int32, "TYPE_FP32": np.float32, "TYPE_BOOL": np.bool_,
    "TYPE_UINT64": np.uint64,
}  # fmt: skip


def arrays(**inputs: Any) -> dict[str, Any]:
    """Inputs as Triton hands them over: 1-D, of the declared type, text as bytes."""
    made = {}
    for name, value in inputs.items():
        values = value if isinstance(value, list) else [value]
        encoded = [item.encode() if isinstance(item, str) else item for item in values]
        made[name] = np.array(encoded, dtype=DTYPES[INPUTS[name]])
    return made
