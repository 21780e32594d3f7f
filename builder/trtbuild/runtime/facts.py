"""What a loaded engine says of itself."""

from __future__ import annotations

from trtbuild.runtime.config import EngineConfig
from trtbuild.runtime.drafts.speculation import Speculation
from trtbuild.runtime.model import ModelRunner
from trtbuild.runtime.outputs import EngineFacts, EngineStats
from trtbuild.runtime.scheduler import Scheduler


def engine_facts(runner: ModelRunner, config: EngineConfig, end_ids: frozenset[int]) -> EngineFacts:
    """What the engine over `runner` is."""
    return EngineFacts(
        architecture=type(runner.model).__name__,
        vocab_size=runner.vocab_size,
        max_seq_len=config.max_seq_len,
        max_batch_size=config.max_batch_size,
        kv_cache_tokens=runner.num_blocks * runner.block_size,
        tokens_per_block=runner.block_size,
        kv_cache_dtype=runner.kv_form or str(runner.dtype).removeprefix("torch."),
        device=str(runner.device),
        compute_dtype=str(runner.dtype).removeprefix("torch."),
        weights=_weights_form(config, runner),
        path=runner.path,
        eos_token_ids=tuple(sorted(end_ids)),
        notes=tuple(runner.notes),
        speculation="none" if config.speculative is None else config.speculative.method,
    )


def engine_stats(
    scheduler: Scheduler, speculation: Speculation | None, *, waiting: int, steps: int, generated: int
) -> EngineStats:
    """The counts of this moment; `waiting` requests are not running yet."""
    blocks = scheduler.blocks
    free = blocks.num_free
    return EngineStats(
        total_blocks=blocks.num_blocks,
        free_blocks=free,
        used_blocks=blocks.num_blocks - free,
        cached_blocks=blocks.num_cached,
        running=len(scheduler.running),
        waiting=waiting,
        preemptions=scheduler.preemptions,
        reused_blocks=scheduler.reused_blocks,
        missed_blocks=scheduler.missed_blocks,
        evicted_blocks=blocks.evicted,
        steps=steps,
        generated_tokens=generated,
        draft_tokens=speculation.drafted if speculation else 0,
        accepted_draft_tokens=speculation.accepted if speculation else 0,
    )


def _weights_form(config: EngineConfig, runner: ModelRunner) -> str:
    """What `weights: auto` means on this device (checkpoint.py decides the same)."""
    if config.weights != "auto":
        return config.weights
    return "expanded" if runner.device.type == "cpu" else "packed"
