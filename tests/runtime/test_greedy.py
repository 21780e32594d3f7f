"""Greedy output equals Transformers' own: every architecture, 20 seeds, two types, every way of being scheduled."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from runtime.conftest import engine_config
from trtbuild.runtime import Engine, SamplingParams

SEEDS = 20
TOKENS = 64
TIE = 1e-4
BLOCK = 8
LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}


@dataclass
class Agreement:
    """How many tokens were compared, how many were not Transformers' likeliest, and the widest gap among these."""

    compared: int = 0
    different: int = 0
    widest_gap: float = 0.0


def reference_model(path: Path, dtype: torch.dtype) -> Any:
    """Transformers' own model; its grouped experts know no float64, so the plain ones are taken."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    return model


def make_prompts(seed: int) -> list[list[int]]:
    """Five prompts of different lengths; the last begins like the first and like the fourth."""
    numbers = random.Random(seed)
    first = [numbers.randrange(3, tiny.VOCAB_SIZE) for _ in range(2 * BLOCK + 3)]
    others = [[numbers.randrange(3, tiny.VOCAB_SIZE) for _ in range(length)] for length in (1, 7, 41)]
    return [first, *others, first[: 2 * BLOCK] + others[2][:5]]


def run_every_way(engine: Engine, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """The first prompt alone, then the rest together in a cache too small for them.

    The small pool forces pre-emption, the steps of 24 tokens force chunks, the shared beginnings force reuse.
    """
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    alone = engine.generate(prompts[:1], params)
    together = engine.generate(prompts[1:], params)
    stats = engine.stats()
    assert together[-1].metrics.kv_cache_reused_block >= 2
    assert stats.preemptions > 0
    assert stats.free_blocks == stats.total_blocks
    return [one.token_ids for one in alone + together]


def compare(model: Any, prompts: list[list[int]], outputs: list[tuple[int, ...]], found: Agreement) -> None:
    """Hold each token against Transformers' likeliest one after the same beginning (one forward pass over all).

    A sequence whose every token is the likeliest after its own beginning is, by induction, the greedy sequence.
    """
    texts = [prompt + list(output) for prompt, output in zip(prompts, outputs, strict=True)]
    longest = max(map(len, texts))
    # Padding comes last, where no earlier token sees it.
    batch = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    with torch.inference_mode():
        logits = model(input_ids=batch, use_cache=False).logits
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        assert len(output) == TOKENS
        scores = logits[row, len(prompt) - 1 : len(prompt) + TOKENS - 1]
        chosen = scores.gather(1, torch.tensor(output)[:, None]).squeeze(1)
        gaps = scores.max(dim=-1).values - chosen
        found.compared += TOKENS
        found.different += int((gaps > 0).sum())
        found.widest_gap = max(found.widest_gap, float(gaps.max()))


def overrides(name: str) -> dict[str, Any]:
    """Two layers for speed; where layers alternate, one of each kind."""
    return LAYERS if name == "gemma3" else {"num_hidden_layers": 2}


@pytest.mark.parametrize("name", [*tiny.ARCHITECTURES])
def test_greedy_equals_transformers(checkpoint: Callable[..., Path], name: str) -> None:
    exact, single = Agreement(), Agreement()
    distinct = 0
    for seed in range(SEEDS):
        path = checkpoint(name, seed, **overrides(name))
        prompts = make_prompts(seed)
        for dtype, found in ((torch.float64, exact), (torch.float32, single)):
            config = engine_config(
                compute_dtype=str(dtype).removeprefix("torch."), tokens_per_block=BLOCK, max_tokens=28 * BLOCK,
                max_num_tokens=24, capacity_scheduler_policy="MAX_UTILIZATION",
            )  # fmt: skip
            with Engine.load(path, config=config) as engine:
                outputs = run_every_way(engine, prompts)
            compare(reference_model(path, dtype), prompts, outputs, found)
            distinct += sum(len(set(output)) for output in outputs)
    assert exact.compared == single.compared == SEEDS * 5 * TOKENS
    assert exact.different == 0, exact
    assert single.widest_gap < TIE, single
    assert single.different <= 0.01 * single.compared, single
    # A model that repeats one token would make this test empty.
    assert distinct > 4 * 2 * 5 * SEEDS


@pytest.mark.parametrize("name", [*tiny.ARCHITECTURES, *tiny.MORE_ARCHITECTURES])
def test_greedy_equals_generate(checkpoint: Callable[..., Path], name: str) -> None:
    """The same against `generate` itself, with its cache and its padding; reserved blocks, no small pool."""
    path = checkpoint(name)
    prompts = make_prompts(0)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model = reference_model(path, torch.float64)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    with Engine.load(path, config=engine_config(max_num_tokens=32)) as engine:
        together = engine.generate(prompts, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
        alone = engine.generate(prompts[:1], SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    assert [list(one.token_ids) for one in together] == expected[:, longest:].tolist()
    assert alone[0].token_ids == together[0].token_ids
