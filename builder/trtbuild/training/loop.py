"""The training loop: one step after another, its state saved so that a killed run goes on in the middle."""

from __future__ import annotations

import contextlib
import io
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trtbuild.errors import ToolError
from trtbuild.training.answers import Answered
from trtbuild.training.batches import Batch, make_batch, schedule
from trtbuild.training.request import Request

_STATE = "training.pt"
_WARM_UP = 0.05  # of all steps
_LAST = 0.1  # of the highest learning rate
_CLIP = 1.0
_WEIGHT_DECAY = 0.0
_SAVE_SHARE = 20  # times as long as saving takes is trained in between


class Training:
    """Heads or a draft being trained.

    `losses` has one number for each finished step; `resumed` is how many an earlier run had finished.
    """

    def __init__(
        self, model: Any, learning: nn.Module, answered: Sequence[Answered], request: Request, key: str
    ) -> None:
        self._model, self._learning, self._answered, self._request, self._key = model, learning, answered, request, key
        self._steps = schedule(len(answered), request)
        self._optimizer = torch.optim.AdamW(
            learning.parameters(), lr=request.learning_rate, weight_decay=_WEIGHT_DECAY, betas=(0.9, 0.95)
        )
        self.losses: list[float] = []
        self.resumed = self._resume()

    @property
    def total(self) -> int:
        """How many steps there are."""
        return len(self._steps)

    def run(self, advance: Callable[[str], None]) -> None:
        """Train to the end; `advance` is told of each step.

        Raises:
            ToolError: the loss is no longer a number.
        """
        self._model.train()
        often = self._request.save_seconds
        saved, wait = time.monotonic(), often
        for number in range(self.resumed, self.total):
            self.losses.append(self._step(number))
            if time.monotonic() - saved >= wait or number == self.total - 1:
                begun = time.monotonic()
                self._save()
                saved = time.monotonic()
                wait = max(often, _SAVE_SHARE * (saved - begun)) if often else often
            advance(f"step {number + 1} of {self.total}, loss {self.losses[-1]:.3f}")
        self._model.eval()

    def _step(self, number: int) -> float:
        batch = make_batch([self._answered[index] for index in self._steps[number]], self._model.device)
        for group in self._optimizer.param_groups:
            group["lr"] = self._request.learning_rate * _rate(number, self.total)
        with _mixed(self._model.device):
            loss = _loss(self._model, batch, self._request.method)
        value = float(loss.detach())
        if not math.isfinite(value):
            message = f"the loss of step {number + 1} is no number"
            raise ToolError(message, "lower speculative.train.learning_rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._learning.parameters(), _CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return value

    def _save(self) -> None:
        state = {
            "key": self._key,
            "losses": self.losses,
            "learning": self._learning.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        save_whole(state, self._request.work / _STATE)

    def _resume(self) -> int:
        state = load_whole(self._request.work / _STATE)
        if state is None or state["key"] != self._key:
            return 0
        self._learning.load_state_dict(state["learning"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.losses = list(state["losses"])
        return len(self.losses)


def _rate(number: int, total: int) -> float:
    """Up in the first steps, then down in a straight line to a tenth."""
    warm = max(1, round(_WARM_UP * total))
    left = 1 - number / total
    return min((number + 1) / warm, _LAST + (1 - _LAST) * left)


def _mixed(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """On a GPU the target computes in bf16; what learns keeps float32 and is cast for each product."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _loss(model: Any, batch: Batch, method: str) -> Tensor:
    """ModelOpt's own loss of the method.

    Medusa's takes labels that are the next tokens already, and moves them on by one for each head.
    """
    if method == "medusa":
        loss: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.following).loss
        return loss
    # Kept for each step of the training, whatever the length of the sequences was when it was made.
    model._cached_attn_blk_masks.clear()  # noqa: SLF001
    drafted: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask, loss_mask=batch.foreseen).loss
    return drafted


def save_whole(state: dict[str, Any], path: Path) -> None:
    """Put a state in place at once: a reader sees the old one or the new one."""
    temporary = path.with_suffix(".new")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_whole(path: Path) -> dict[str, Any] | None:
    """A saved state, without running anything that a file could carry; None where there is none that can be read."""
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except Exception:  # noqa: BLE001  torch has no class of errors for a damaged file: the training starts over
        return None
    return state
