"""A draft model beside the model: its cache, its catching up, what it may be, and that answers stay the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.fp8 import fp8_checkpoint
from runtime.oracle import own_drafts
from runtime.test_speculation import FREE, TIGHT, make_prompts, run
from trtbuild.errors import ArtifactError, CompatibilityError
from trtbuild.runtime import Engine, EngineConfig, KvCacheConfig, SamplingParams, SpeculativeConfig
from trtbuild.runtime.drafts.load import draft_bytes
from trtbuild.runtime.model import ModelRunner

Load = Callable[..., Engine]
SECTION = SpeculativeConfig("draft_target", max_draft_len=4, draft="draft")


@pytest.fixture
def pair(checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`pair(draft)`: an engine directory of the llama checkpoint with a draft below it."""

    def make(draft: Path, model: Path | None = None) -> Path:
        target = tmp_path / "engine"
        shutil.copytree(model or checkpoint("llama"), target)
        shutil.copytree(draft, target / "draft")
        return target

    return make


@pytest.mark.parametrize("draft", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("limits", [{}, TIGHT], ids=["roomy", "tight"])
def test_answers_are_the_same(
    engine: Load, checkpoint: Callable[..., Path], pair: Callable[..., Path], draft: str, limits: dict[str, Any]
) -> None:
    prompts = make_prompts(0)
    expected = run(engine(), prompts)
    path = pair(checkpoint(draft, int(draft != "llama"), num_hidden_layers=3 if draft == "llama" else 2))
    one = engine(path=path, speculative=SECTION, **limits)
    for _ in range(2):
        assert [found.token_ids for found in run(one, prompts)] == [found.token_ids for found in expected]
    stats, tables = one.stats(), one._speculation._drafter._tables
    assert (stats.free_blocks, tables.blocks.num_free) == (stats.total_blocks, tables.blocks.num_blocks)
    assert one._speculation._drafter._mirrors == {}
    if draft == "llama":  # the model itself: every draft is right, wherever the room for it was
        assert stats.accepted_draft_tokens == stats.draft_tokens > 60
        assert stats.steps < 2 * 0.75 * len(prompts) * 24


def test_quantized_model_with_a_plain_draft_and_seeds(
    engine: Load, checkpoint: Callable[..., Path], pair: Callable[..., Path], tmp_path: Path
) -> None:
    quantized = fp8_checkpoint(checkpoint("llama"), tmp_path / "fp8", kv=True)
    prompts = make_prompts(1)
    kinds = [FREE, *(SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.8, seed=seed) for seed in range(4))]
    expected = run(engine(path=quantized, dtype="fp8"), prompts, kinds)
    one = engine(path=pair(checkpoint("llama"), quantized), dtype="fp8", speculative=SECTION)
    assert [found.token_ids for found in run(one, prompts, kinds)] == [found.token_ids for found in expected]
    assert one.stats().accepted_draft_tokens > 10


def test_drawn_drafts_of_the_model_itself_are_all_taken(
    engine: Load, checkpoint: Callable[..., Path], pair: Callable[..., Path]
) -> None:
    one = engine(path=pair(checkpoint("llama")), speculative=SECTION)
    run(one, make_prompts(2), SamplingParams(max_tokens=24, ignore_eos=True, temperature=1.3, top_p=0.9))
    assert one.stats().accepted_draft_tokens == one.stats().draft_tokens > 60


def test_late_drafts_are_those_of_a_text_that_begins_there(
    engine: Load, checkpoint: Callable[..., Path], pair: Callable[..., Path]
) -> None:
    """After drafts that were taken in part and refused, and in blocks that another request has left."""
    path = pair(checkpoint("qwen2", 1, num_hidden_layers=2))
    used, fresh = (engine(path=path, speculative=SECTION, tokens_per_block=4) for _ in range(2))
    prompt = make_prompts(2)[0]
    text = prompt + list(run(used, [prompt])[0].token_ids)
    tables = used._speculation._drafter._tables
    publish = tables.publish

    def watched(state: Any, tokens: int) -> None:
        assert state.token_ids[:tokens] == text[:tokens], "drafted tokens are offered for reuse"
        publish(state, tokens)

    tables.publish = watched
    late = own_drafts(used, prompt, 20, text)
    tables.publish = publish
    assert used._speculation._drafter is not None
    assert used.stats().accepted_draft_tokens > 8
    for length in list(late)[1:5]:
        assert own_drafts(fresh, text[: length - 1], 6)[length] == late[length]
        assert own_drafts(used, text[: length - 1], 6)[length] == late[length]


def test_a_draft_without_room_waits(engine: Load, checkpoint: Callable[..., Path], pair: Callable[..., Path]) -> None:
    prompts = make_prompts(3)
    expected = run(engine(), prompts)
    one = engine(path=pair(checkpoint("llama")), speculative=SECTION, tokens_per_block=8)
    tables = one._speculation._drafter._tables
    held = tables.blocks.take(tables.blocks.num_free - 8)
    assert [found.token_ids for found in run(one, prompts)] == [found.token_ids for found in expected]
    assert one.stats().draft_tokens > 0
    tables.blocks.release(held)
    assert tables.blocks.num_free == tables.blocks.num_blocks


def test_drafts_that_do_not_fit(engine: Load, checkpoint: Callable[..., Path], pair: Callable[..., Path]) -> None:
    with pytest.raises(ArtifactError, match="draft: holds no draft model; build the package again"):
        engine(speculative=SECTION)
    with pytest.raises(CompatibilityError, match="the draft has a vocabulary of 400, and the model's has 320"):
        engine(path=pair(checkpoint("llama", vocab_size=400)), speculative=SECTION)


def test_free_memory_is_shared_with_the_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are set aside, and of the rest its cache gets its share; a GPU is not asked."""
    (tmp_path / "draft").mkdir()
    for name, size in (("a.safetensors", 150), ("b.safetensors", 50), ("config.json", 1000)):
        (tmp_path / "draft" / name).write_bytes(bytes(size))
    section = SpeculativeConfig("draft_target", draft="draft", draft_kv_cache_share=0.25)
    cache = KvCacheConfig(max_tokens=None, free_gpu_memory_fraction=0.5)
    drafting, plain = EngineConfig(kv_cache=cache, speculative=section), EngineConfig(kv_cache=cache)
    assert (draft_bytes(tmp_path, drafting), draft_bytes(tmp_path, plain)) == (200, 0)
    runner = object.__new__(ModelRunner)
    runner.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 9999))
    assert runner._tokens_in_free_memory(10, drafting, 200) == 30
    assert runner._tokens_in_free_memory(10, plain, 0) == 50
