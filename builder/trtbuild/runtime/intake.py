"""The door: checks a request against the engine's limits and makes the engine's own state of it."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trtbuild.errors import ArtifactError, RequestError
from trtbuild.runtime.config import EngineConfig
from trtbuild.runtime.model import ModelRunner
from trtbuild.runtime.sampling_params import SamplingParams, check_token_ids
from trtbuild.runtime.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Intake:
    """The limits of one engine and the tokens that end a text."""

    config: EngineConfig
    vocab_size: int
    capacity: int
    chunk_limit: int
    end_ids: frozenset[int]

    @classmethod
    def read(cls, engine_dir: Path, runner: ModelRunner, config: EngineConfig) -> Intake:
        """The limits of `runner`, with the end-of-text tokens of generation_config.json, else of config.json.

        Raises:
            ArtifactError: generation_config.json cannot be read.
        """
        return cls(
            config=config,
            vocab_size=runner.vocab_size,
            capacity=runner.num_blocks * runner.block_size,
            chunk_limit=runner.chunk_limit,
            end_ids=read_end_ids(engine_dir, runner.hf_config),
        )

    def check(self, prompt: tuple[int, ...], params: SamplingParams) -> None:
        """Refuse what can never run.

        Raises:
            RequestError: naming what is out of range, the limit and the remedy.
        """
        if not prompt:
            raise RequestError("the prompt is empty", "give at least one token")
        params.validate(self.vocab_size)
        check_token_ids("prompt_token_ids", prompt, self.vocab_size)
        length, limit = len(prompt), self.config.max_seq_len
        if length >= limit:
            raise RequestError(
                f"the prompt has {length} tokens and this engine takes at most {limit - 1} (max_seq_len {limit})",
                "shorten the prompt, or build the engine with a larger runtime.max_seq_len",
            )
        if length + params.max_tokens > limit:
            raise RequestError(
                f"max_tokens: {params.max_tokens} after a prompt of {length} tokens exceeds max_seq_len {limit}",
                f"ask for at most {limit - length} tokens, or build the engine with a larger runtime.max_seq_len",
            )
        if not self.config.enable_chunked_prefill and length > self.config.max_num_tokens:
            raise RequestError(
                f"the prompt has {length} tokens and a step takes at most {self.config.max_num_tokens} "
                "(max_num_tokens) while chunked prefill is off",
                "shorten the prompt, or build the engine with enable_chunked_prefill: true",
            )
        # The last generated token is never fed back, so it needs no place.
        if length + params.max_tokens - 1 > self.capacity:
            raise RequestError(
                f"prompt and output of {length + params.max_tokens} tokens do not fit into the KV cache, "
                f"which holds {self.capacity}",
                "ask for fewer tokens, or build the engine with a larger runtime.kv_cache.max_tokens",
            )

    def sequence(
        self, request_id: int, prompt: tuple[int, ...], params: SamplingParams, logits: list[torch.Tensor] | None
    ) -> Sequence:
        """The engine's state of a request that passed `check`."""
        sequence = Sequence(
            request_id=request_id,
            prompt_len=len(prompt),
            token_ids=list(prompt),
            params=params,
            end_ids=frozenset() if params.ignore_eos else self.end_ids,
            stop_ids=frozenset(params.stop_token_ids),
            rng=random.Random(params.seed),  # noqa: S311 - choosing tokens is no cryptography
            plain=params.is_plain and logits is None,
            logits=logits,
            arrival_ns=time.monotonic_ns(),
        )
        if sequence.wants_every_position:
            sequence.chunk_limit = self.chunk_limit
        if params.repetition_penalty != 1.0:
            sequence.seen_ids.update(dict.fromkeys(prompt))
        return sequence


def read_end_ids(engine_dir: Path, hf_config: Any) -> frozenset[int]:
    """The tokens that end a text: those of generation_config.json, else of config.json.

    Raises:
        ArtifactError: generation_config.json cannot be read.
    """
    path = engine_dir / "generation_config.json"
    found = None
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{path}: cannot be read ({error})", "build the package again") from error
    if found is None:
        found = getattr(hf_config, "eos_token_id", None)
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)
