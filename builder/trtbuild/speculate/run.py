"""What speculation brings on the user's prompts: the request, the loaded engines, and the measured table."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtbuild.compress.textdata import load_tokenizer
from trtbuild.errors import Problem, RecipeError
from trtbuild.runtime import EngineConfig, KvCacheConfig, SpeculativeConfig
from trtbuild.speculate.bench import Bench
from trtbuild.speculate.measure import BatchResult, measure_batch
from trtbuild.speculate.prompts import read_prompts
from trtbuild.worker import Progress

_ANSWER = 64


def run(request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Measure every candidate at every batch that fits.

    Args:
        request: ``model`` (directory), ``prompts`` (file), ``count`` (prompts at most), ``batches`` (rising),
            ``candidates`` (sections as in engine.json, `draft` a directory), ``limit_s`` (seconds in all), ``rounds``,
            ``engine`` (fields of `EngineConfig` but for the cache), ``kv_cache`` (its `dtype`, `tokens_per_block`, and
            `max_tokens` or None: as many as are needed).
        progress: called with (runs done, runs expected, what).

    Raises:
        RecipeError: the prompts are wrong, or too long, or no prompt leaves room for an answer.
        ArtifactError, CompatibilityError, HostError: the model or the draft cannot be loaded.
        ToolError: drafting has failed.
    """
    ends = time.monotonic() + request["limit_s"]
    model, engine = Path(request["model"]), dict(request["engine"])
    tokenizer = load_tokenizer(model, trust_remote_code=engine["trust_remote_code"])
    longest = engine["max_seq_len"] - _ANSWER
    if longest < 1:
        message = f"{engine['max_seq_len']} leaves no room for answers of {_ANSWER} tokens"
        raise RecipeError([Problem("runtime.max_seq_len", message, f"raise it above {_ANSWER}")])
    prompts = read_prompts(Path(request["prompts"]), tokenizer, count=request["count"], longest=longest)
    batches, left_out = _fitting(request, max(map(len, prompts.ids)))
    sections = [SpeculativeConfig.of(each) for each in request["candidates"]]
    progress(0, 1, "loading the model")
    with Bench(model, _config(request, batches[-1], max(map(len, prompts.ids))), sections) as bench:
        order, results = list(range(len(sections))), []
        rounds = request["rounds"]
        meter = _Meter(progress, len(batches), len(sections))
        for number, batch in enumerate(batches):
            if time.monotonic() > ends:
                left_out.append(f"{_requests(batch)}: no time was left")
                continue
            share = (ends - time.monotonic()) / (len(batches) - number)
            meter.start(number, batch)
            found = measure_batch(bench, prompts.ids, batch, order, seconds=share, on_run=meter, rounds=rounds)
            results.append(found)
            # The fastest first: where the time is short, they are measured at all.
            order.sort(key=lambda one, found=found: -_speed_up(found, one))  # type: ignore[misc]
        facts = bench.facts
    lengths = [len(ids) for ids in prompts.ids]
    return {
        "device": facts.device,
        "compute_dtype": facts.compute_dtype,
        "path": facts.path,
        "prompts": {
            "used": len(lengths), "too_long": prompts.too_long, "most_tokens": max(lengths), "longest_taken": longest,
        },
        "plain": [found.plain_json() for found in results],
        "rows": [found.rows[one].to_json() for found in results for one in sorted(found.rows)],
        "left_out": left_out,
    }  # fmt: skip


class _Meter:
    """Tells how far the runs have come; how many there will be is an upper bound."""

    def __init__(self, progress: Progress, batches: int, candidates: int) -> None:
        self._progress, self._done, self._what = progress, 0, ""
        self._each = 2 * candidates + 16
        self._total = self._each * batches

    def start(self, number: int, batch: int) -> None:
        """A batch begins."""
        self._done, self._what = self._each * number, _requests(batch)

    def __call__(self, what: str) -> None:
        self._progress(min(self._done, self._total - 1), self._total, f"{self._what}: {what}")
        self._done += 1


def _requests(batch: int) -> str:
    return "1 request" if batch == 1 else f"{batch} requests"


def _speed_up(found: BatchResult, candidate: int) -> float:
    row = found.rows.get(candidate)
    return max(row.speed_ups) if row else 0.0


def _fitting(request: Mapping[str, Any], longest: int) -> tuple[list[int], list[str]]:
    """The batches that the KV cache holds at once, at least the smallest, and a sentence for each other one."""
    held, block = request["kv_cache"]["max_tokens"], request["kv_cache"]["tokens_per_block"]
    each = _blocks(longest, block) * block
    fitting = [batch for batch in request["batches"] if held is None or batch * each <= held]
    left_out = [
        f"{_requests(batch)}: runtime.kv_cache.max_tokens {held} does not hold {batch} x {each} tokens"
        for batch in request["batches"]
        if batch not in fitting
    ]
    return (fitting, left_out) if fitting else (request["batches"][:1], left_out[1:])


def _blocks(longest: int, block: int) -> int:
    return -(-(longest + _ANSWER) // block) + 1


def _config(request: Mapping[str, Any], batch: int, longest: int) -> EngineConfig:
    """The recipe's engine with a cache for what is measured; no prompt finds another's keys, or its own of before."""
    block = request["kv_cache"]["tokens_per_block"]
    cache = KvCacheConfig(
        dtype=request["kv_cache"]["dtype"],
        tokens_per_block=block,
        max_tokens=batch * _blocks(longest, block) * block,
        enable_block_reuse=False,
    )
    return EngineConfig(max_batch_size=batch, kv_cache=cache, **request["engine"])
