"""What a training is asked to do, and the key under which an unfinished one goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trtbuild.compress.identity import host_facts
from trtbuild.manifest import digest_json

_SAVE_SECONDS = 60.0
_PLACES = ("checkpoint", "prompts", "output", "work", "save_seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One training; every field of the recipe's ``speculative.train`` has its name here.

    `checkpoint` is the target as it will be served, with its tokenizer; `weights` names the bytes of the original
    model, `format` how they are stored in it. `captured` are the layers that a draft of EAGLE-3 reads. Unfinished files
    lie in `work`, and `key` names the bytes of all inputs. The state is saved at most every `save_seconds`.
    """

    method: str
    checkpoint: Path
    prompts: Path
    output: Path
    work: Path
    key: str
    weights: str
    format: str
    column: str | None
    samples: int
    held_out: float
    max_seq_len: int
    max_answer_tokens: int
    epochs: int
    batch_size: int
    learning_rate: float
    num_layers: int
    seed: int
    device: str
    trust_remote_code: bool
    num_heads: int = 0
    ttt_steps: int = 0
    draft_vocab_size: int | None = None
    captured: tuple[int, ...] | None = None
    save_seconds: float = _SAVE_SECONDS

    @property
    def positions(self) -> int:
        """How many tokens ahead the draft proposes."""
        return self.num_heads if self.method == "medusa" else self.ttt_steps


def parse_request(raw: Mapping[str, Any]) -> Request:
    """`raw`, which a planned step has filled in, as a `Request`."""
    places = {name: Path(raw[name]) for name in ("checkpoint", "prompts", "output", "work")}
    captured = raw.get("captured")
    return Request(**dict(raw) | places | {"captured": None if captured is None else tuple(captured)})


def resume_key(request: Request, device: torch.device) -> str:
    """A digest of everything that decides the result, and of how this host computes."""
    fields = {name: value for name, value in asdict(request).items() if name not in _PLACES}
    return digest_json({"request": fields, "host": host_facts(device)})
