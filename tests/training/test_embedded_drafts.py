"""The embedded engine drafts with what was trained: the same answers, and the acceptance that was measured."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from training_requests import make_request

from trtbuild.runtime import Engine, EngineConfig, KvCacheConfig, SamplingParams, SpeculativeConfig
from trtbuild.training.prompts import load_prompts
from trtbuild.training.request import parse_request


def answers(directory: Path, prompts: list[tuple[int, ...]], speculative: SpeculativeConfig | None) -> list[Any]:
    config = EngineConfig(
        max_batch_size=4, max_seq_len=64, kv_cache=KvCacheConfig(max_tokens=512), device="cpu", speculative=speculative
    )
    with Engine.load(directory, config=config) as engine:
        return engine.generate(prompts, SamplingParams(max_tokens=12))


@pytest.mark.parametrize("method", ["medusa", "eagle3"])
def test_the_embedded_engine_drafts_with_it(
    method: str, request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path
) -> None:
    draft, result = request.getfixturevalue(method)
    shutil.copytree(tiny_llama, tmp_path / "engine")
    shutil.copytree(draft, tmp_path / "engine" / "draft")
    asked = parse_request(make_request(tiny_llama, tmp_path, method))
    learned = list(load_prompts(asked).learned)[:4]
    plain = answers(tmp_path / "engine", learned, None)
    section = SpeculativeConfig(method=method, max_draft_len=2, draft="draft")
    drafted = answers(tmp_path / "engine", learned, section)
    assert [one.token_ids for one in drafted] == [one.token_ids for one in plain]
    proposed = sum(one.metrics.total_draft_tokens or 0 for one in drafted)
    accepted = sum(one.metrics.total_accepted_draft_tokens or 0 for one in drafted)
    # Measured at every place; the engine drafts at those alone where a step begins.
    measured = sum(result["acceptance"]["learned"]["accepted"]) / 2
    assert accepted / proposed == pytest.approx(measured, abs=0.25)
    assert accepted / proposed > 0.2
