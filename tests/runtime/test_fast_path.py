"""The fast path on an NVIDIA GPU: the same tokens however a request is run, and those of the general path.

Sums are added up in another order for another batch size, so two likely tokens may change places. A token is right
where its logit in float64 is as near to the likeliest as the errors of both allow; these are measured and bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from runtime.conftest import engine_config
from runtime.fp8 import fp8_checkpoint
from runtime.gpu import error, needs_gpu
from runtime.int4 import int4_checkpoint
from runtime.test_greedy import BLOCK, TOKENS, make_prompts, run_every_way
from trtbuild.runtime import Engine, SamplingParams

pytestmark = needs_gpu
SHAPE = {"head_dim": 32, "num_hidden_layers": 2}
LONG = {"hidden_size": 192, "intermediate_size": 384, "num_attention_heads": 6, "head_dim": 64}
FREE = SamplingParams(max_tokens=TOKENS, ignore_eos=True)


@dataclass
class Reference:
    """The logits of the checkpoint in float64, on the CPU's general path: the format's own numerics."""

    engine: Engine
    worst: float = 0.0
    different: int = 0
    compared: int = 0

    def check(self, fast: Engine, prompt: list[int], output: tuple[int, ...], limit: float) -> None:
        """Every token of `output` is the likeliest but for ties; the logits of its text are right up to `limit`."""
        text = prompt + list(output)
        expected = self.engine.logits(text).double()
        found = fast.logits(text).cpu().double()
        assert error(found, expected) < limit
        tie = 3 * float((found - expected).abs().max())
        scores = expected[len(prompt) - 1 : -1]
        gaps = scores.max(dim=-1).values - scores.gather(1, torch.tensor(output)[:, None]).squeeze(1)
        assert float(gaps.max()) <= tie
        self.worst = max(self.worst, float(gaps.max()))
        self.different += int((gaps > 0).sum())
        self.compared += len(output)


@pytest.fixture
def load() -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(path: Path, **config: object) -> Engine:
        settings = {"device": "cuda", "compute_dtype": "auto", "tokens_per_block": BLOCK} | config
        made.append(Engine.load(path, config=engine_config(**settings)))
        return made[-1]

    yield make
    for one in made:
        one.close()


MODELS = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "fp8", "fp8 kv", "int4", "bf16 over fp8 kv", "odd"]


def model(name: str, checkpoint: Callable[..., Path], tmp_path: Path) -> tuple[Path, dict[str, str], float]:
    """The checkpoint of a case, what the engine is told of its cache, and how far its logits may be off."""
    if name.startswith("fp8"):
        path = fp8_checkpoint(checkpoint("llama", **SHAPE), tmp_path / "fp8", kv=name == "fp8 kv")
        return path, {"dtype": "fp8"} if name == "fp8 kv" else {}, 0.16
    if name == "int4":
        return int4_checkpoint(checkpoint("llama", **SHAPE), tmp_path / "int4"), {}, 0.06
    if name == "bf16 over fp8 kv":
        return checkpoint("llama", **SHAPE), {"dtype": "fp8"}, 0.06
    if name == "odd":
        return checkpoint("llama", num_key_value_heads=3, vocab_size=317, num_hidden_layers=3, **LONG), {}, 0.06
    return checkpoint(name, **SHAPE), {}, 0.03


@pytest.mark.parametrize("name", MODELS)
def test_greedy_however_it_is_run(
    load: Callable[..., Engine], checkpoint: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    path, cache, limit = model(name, checkpoint, tmp_path)
    prompts = make_prompts(0)
    prompts = [[token % 300 for token in prompt] for prompt in prompts]
    with Engine.load(path, config=engine_config(weights="packed", **cache)) as exact:
        reference = Reference(exact)
        # Pre-emption, reuse, chunks of 24 tokens, batches of changing sizes.
        pressed = load(
            path, max_tokens=28 * BLOCK, max_num_tokens=24, capacity_scheduler_policy="MAX_UTILIZATION", **cache
        )
        assert pressed.facts.path == "fast"
        assert "the model runs on the fast path" in pressed.facts.notes
        ways = {"pressed": run_every_way(pressed, prompts)}
        roomy = load(path, max_num_tokens=512, max_batch_size=8, **cache)
        assert roomy._runner.fast.graphs.sizes == [1, 2, 4, 8]
        ways["together"] = [one.token_ids for one in roomy.generate(prompts, FREE)]
        ways["again, from reused blocks"] = [one.token_ids for one in roomy.generate(prompts, FREE)]
        assert roomy.stats().reused_blocks > 0
        ways["alone"] = [roomy.generate([prompt], FREE)[0].token_ids for prompt in prompts]
        fast = roomy._runner.fast
        fast.execute = fast.execute_packed
        ways["kernel by kernel"] = [one.token_ids for one in roomy.generate(prompts, FREE)]
        for outputs in ways.values():
            for prompt, output in zip(prompts, outputs, strict=True):
                reference.check(roomy, prompt, output, limit)
        assert reference.compared == len(ways) * 5 * TOKENS
        assert reference.different < 2 * limit * reference.compared, reference
        assert len({token for outputs in ways.values() for output in outputs for token in output}) > 50


@pytest.mark.parametrize("name", MODELS)
def test_both_paths_agree_on_one_model(
    load: Callable[..., Engine], checkpoint: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """The same weights and the same cache under both paths, also taking turns within one sequence."""
    path, cache, limit = model(name, checkpoint, tmp_path)
    one = load(path, max_num_tokens=32, **cache)
    prompt = [(7 * place + 3) % 300 for place in range(200)]
    fast = one.logits(prompt).double()
    runner = one._runner
    quick, runner.execute = runner.execute, runner.execute_general  # type: ignore[method-assign]
    general = one.logits(prompt).double()
    turns = [quick, runner.execute_general]
    runner.execute = lambda chunks: turns[chunks[0].start // 32 % 2](chunks)  # type: ignore[method-assign]
    mixed = one.logits(prompt).double()
    assert error(fast, general) < limit
    assert error(mixed, general) < limit
    assert not torch.equal(fast, general)  # else one of them did not run


def test_a_full_batch_beside_prompts(load: Callable[..., Engine], checkpoint: Callable[..., Path]) -> None:
    """More sequences than fit at once, prompts in the same steps as single tokens, sizes between the graphs'."""
    path = checkpoint("llama", **SHAPE)
    prompts = [[(place * 13 + row * 7) % 300 + 3 for place in range(1 + row * 5 % 70)] for row in range(40)]
    with Engine.load(path, config=engine_config()) as exact:
        reference = Reference(exact)
        one = load(path, max_batch_size=21, max_num_tokens=64, max_tokens=8192)
        assert one._runner.fast.graphs.sizes == [1, 2, 4, 8, 16, 21]
        outputs = [done.token_ids for done in one.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))]
        for prompt, output in zip(prompts, outputs, strict=True):
            reference.check(one, prompt, output, 0.03)
        assert reference.compared == 40 * 20


def test_a_long_sequence_and_a_table_of_many_blocks(
    load: Callable[..., Engine], checkpoint: Callable[..., Path]
) -> None:
    path = checkpoint("llama", max_position_embeddings=4096, **SHAPE)
    prompt = [(11 * place + place // 300) % 300 + 3 for place in range(3000)]
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    with Engine.load(path, config=engine_config(max_seq_len=4096, max_num_tokens=512)) as exact:
        reference = Reference(exact)
        one = load(path, max_seq_len=4096, max_num_tokens=512, max_tokens=8192)
        reference.check(one, prompt, one.generate([prompt], params)[0].token_ids, 0.03)


def test_requests_that_need_more_than_the_likeliest_token(
    load: Callable[..., Engine], checkpoint: Callable[..., Path]
) -> None:
    one = load(checkpoint("llama", **SHAPE), max_num_tokens=64)
    prompt = list(range(5, 40))
    free = one.generate([prompt], FREE)[0].token_ids
    banned = one.generate([prompt], SamplingParams(max_tokens=20, ignore_eos=True, bad_words=[[free[3]]]))[0].token_ids
    assert banned[:3] == free[:3]
    assert free[3] not in banned
    hot = SamplingParams(max_tokens=30, ignore_eos=True, temperature=1.5, top_k=50, top_p=0.95, seed=5, logprobs=2)
    drawn = one.generate([prompt] * 2, [hot, FREE])
    assert drawn[0].token_ids == one.generate([prompt], hot)[0].token_ids != free[:30]
    assert drawn[1].token_ids == free
    assert drawn[0].logprobs is not None
    logits = one.logits(prompt + list(drawn[0].token_ids))[len(prompt) - 1 : -1].double().cpu()
    found = torch.tensor([entry.logprob for entry in drawn[0].logprobs])
    expected = logits.log_softmax(-1).gather(1, torch.tensor(drawn[0].token_ids)[:, None]).squeeze(1)
    assert (found - expected).abs().max() < 0.1
    scored = one.generate([prompt], SamplingParams(max_tokens=1, prompt_logprobs=0))[0].prompt_logprobs
    assert scored is not None
    assert len(scored) == len(prompt)


@pytest.mark.parametrize(
    ("name", "config", "why"),
    [
        ("gemma3", {}, "Gemma3ForCausalLM is not one of LlamaForCausalLM"),
        ("llama", {"compute_dtype": "float32"}, "compute_dtype is float32"),
        ("phi", {}, "PhiForCausalLM is not one of"),
    ],
)
def test_what_is_not_taken_runs_on_the_general_path(
    load: Callable[..., Engine], checkpoint: Callable[..., Path], name: str, config: dict[str, str], why: str
) -> None:
    one = load(checkpoint(name), **config)
    assert one.facts.path.startswith("general: ")
    assert why in one.facts.path
    assert any(why in note for note in one.facts.notes)
    assert len(one.generate([[5, 6, 7]], FREE)[0].token_ids) == TOKENS
