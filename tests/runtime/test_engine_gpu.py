"""The engine on an NVIDIA GPU: same tokens as Transformers there, memory-derived cache, FP8 KV, bf16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from runtime.conftest import engine_config
from runtime.test_greedy import BLOCK, TOKENS, Agreement, make_prompts, overrides, run_every_way
from trtbuild.runtime import Engine, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU, or PyTorch without CUDA"),
]
SEEDS = 3


def compare_on_gpu(path: Path, prompts: list[list[int]], outputs: list[tuple[int, ...]], found: Agreement) -> None:
    """As `runtime.test_greedy.compare`, with the reference on the GPU."""
    from runtime.test_greedy import reference_model

    model = reference_model(path, torch.float64).cuda()
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            ids = torch.tensor([prompt + list(output)], device="cuda")
            scores = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        gaps = scores.max(dim=-1).values - scores.gather(1, torch.tensor(output, device="cuda")[:, None]).squeeze(1)
        found.compared += TOKENS
        found.different += int((gaps > 0).sum())


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "qwen3_moe"])
def test_greedy_equals_transformers_on_the_gpu(checkpoint: Callable[..., Path], name: str) -> None:
    found = Agreement()
    for seed in range(SEEDS):
        path = checkpoint(name, seed, **overrides(name))
        prompts = make_prompts(seed)
        config = engine_config(
            device="cuda", tokens_per_block=BLOCK, max_tokens=28 * BLOCK, max_num_tokens=24,
            capacity_scheduler_policy="MAX_UTILIZATION",
        )  # fmt: skip
        with Engine.load(path, config=config) as engine:
            assert engine.facts.device.startswith("cuda")
            outputs = run_every_way(engine, prompts)
        compare_on_gpu(path, prompts, outputs, found)
    assert found.compared == SEEDS * 5 * TOKENS
    assert found.different == 0


def test_the_cache_takes_its_share_of_the_free_memory(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("llama")
    before, total = torch.cuda.mem_get_info()
    config = engine_config(device="cuda", compute_dtype="auto", max_tokens=None, free_gpu_memory_fraction=0.1)
    with Engine.load(path, config=config) as engine:
        taken = before - torch.cuda.mem_get_info()[0]
        assert engine.facts.compute_dtype == "bfloat16"
        assert 0.08 * before < taken < 0.13 * before
        assert len(engine.generate([[5, 6, 7]], SamplingParams(max_tokens=8, ignore_eos=True))[0].token_ids) == 8
    assert total > before


def test_fp8_cache_on_both_devices(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("llama")
    prompt = make_prompts(0)[0]
    logits = {}
    for device in ("cpu", "cuda"):
        with Engine.load(path, config=engine_config(device=device, dtype="fp8")) as engine:
            logits[device] = engine.logits(prompt).cpu()
    # Codes are the same but where a rounding boundary falls into the last bit of the rotary tables.
    assert (logits["cpu"] - logits["cuda"]).abs().max() < 0.05 * logits["cpu"].abs().max()
