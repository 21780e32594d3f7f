"""What a loaded engine says of itself."""

from __future__ import annotations

from trtbuild.runtime.config import EngineConfig
from trtbuild.runtime.model import ModelRunner
from trtbuild.runtime.outputs import EngineFacts


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
    )


def _weights_form(config: EngineConfig, runner: ModelRunner) -> str:
    """What `weights: auto` means on this device (checkpoint.py decides the same)."""
    if config.weights != "auto":
        return config.weights
    return "expanded" if runner.device.type == "cpu" else "packed"
