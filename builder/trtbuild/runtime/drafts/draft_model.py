"""A smaller model as drafter: it runs beside the model, over a paged cache of its own.

Every request has a mirror, the draft model's own sequence: it holds the request's tokens and, behind them, those that
were drafted last. What of these the model refused is overwritten; what it took is computed already, but for the last
token, which the draft model never fed back.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch

from trtbuild.runtime.config import EngineConfig
from trtbuild.runtime.drafts.draft import Ask, Draft
from trtbuild.runtime.drafts.growing import Growing, grow
from trtbuild.runtime.model import ModelRunner
from trtbuild.runtime.scheduler import Chunk
from trtbuild.runtime.sequence import Sequence, blank_sequence
from trtbuild.runtime.step_logits import StepLogits
from trtbuild.runtime.tables import BlockTables


@dataclass(slots=True)
class _Mirror:
    """The draft model's sequence of one request; the first `known` of its tokens are the request's own."""

    state: Sequence
    known: int = 0

    def follow(self, token_ids: Many[int]) -> None:
        """Take over what the request has by now: drafted tokens that it took stay computed."""
        mine, place = self.state.token_ids, self.known
        while place < len(mine) and place < len(token_ids) and mine[place] == token_ids[place]:
            place += 1
        mine[place:] = token_ids[place:]
        self.known = len(token_ids)
        # The last token is always computed: its logits choose the first draft.
        self.state.num_computed = min(self.state.num_computed, place, self.known - 1)


@dataclass(slots=True)
class _Drafting:
    """One request while its draft is made."""

    growing: Growing
    mirror: _Mirror

    @property
    def behind(self) -> int:
        """Tokens that the draft model has not computed."""
        return len(self.mirror.state.token_ids) - self.mirror.state.num_computed


class ModelDrafter:
    """Drafts with a loaded model, all requests of a step together."""

    def __init__(self, runner: ModelRunner, config: EngineConfig, vocab_size: int) -> None:
        self._runner = runner
        self._tables = BlockTables(config.kv_cache, runner.num_blocks)
        self._max_num_tokens = config.max_num_tokens
        self._vocab_size = vocab_size
        self._mirrors: dict[int, _Mirror] = {}

    def propose(self, asks: Many[Ask]) -> list[Draft | None]:
        """The draft model's own continuations; none yet for a request whose prompt it is still reading."""
        made = [_Drafting(Growing(ask), self._mirror(ask.sequence)) for ask in asks]
        chunks = self._catching_up(made)
        while chunks:
            step = self._runner.execute(list(chunks.values()))
            for chunk in chunks.values():
                chunk.sequence.num_computed = chunk.end
            drafting = [index for index, chunk in chunks.items() if chunk.is_last]
            self._choose([made[index] for index in drafting], _last_rows(chunks, step))
            chunks = {index: _newest(made[index]) for index in drafting if made[index].growing.wants_more}
        for one in made:
            self._tables.publish(one.mirror.state, min(one.mirror.state.num_computed, one.mirror.known))
        return [one.growing.draft() for one in made]

    def observe(self, chunks: Many[Chunk], step: StepLogits) -> None:
        """Nothing: a mirror follows its request when that asks."""

    def forget(self, sequence: Sequence) -> None:
        """Free a request's blocks."""
        mirror = self._mirrors.pop(sequence.request_id, None)
        if mirror is not None:
            self._tables.release(mirror.state)

    def release(self) -> None:
        """Give the draft model's memory back."""
        self._mirrors.clear()
        self._runner.release()

    def _mirror(self, sequence: Sequence) -> _Mirror:
        mirror = self._mirrors.get(sequence.request_id)
        if mirror is None:
            mirror = self._mirrors[sequence.request_id] = _Mirror(blank_sequence(sequence.request_id))
        mirror.follow(sequence.token_ids)
        return mirror

    def _catching_up(self, made: list[_Drafting]) -> dict[int, Chunk]:
        """The draft model's first step, by place in `made`: what it has not seen, the least first, where there is room.

        A prompt takes as many steps as it takes the model; a request without blocks for its whole draft waits.
        """
        chunks: dict[int, Chunk] = {}
        budget = self._max_num_tokens
        for index in sorted(range(len(made)), key=lambda place: made[place].behind):
            one = made[index]
            state = one.mirror.state
            if budget <= 0 or not self._tables.hold(state, len(state.token_ids) + one.growing.ask.count - 1):
                continue
            end = min(len(state.token_ids), state.num_computed + budget)
            chunks[index] = Chunk(state, state.num_computed, end, is_last=end == len(state.token_ids))
            budget -= end - state.num_computed
        return chunks

    def _choose(self, drafting: list[_Drafting], logits: torch.Tensor) -> None:
        """Put the next token of each request behind its draft, from `logits` [requests, V of the draft model]."""
        grow([one.growing for one in drafting], logits, self._vocab_size)
        for one in drafting:
            if not one.growing.is_broken:
                one.mirror.state.token_ids.append(one.growing.tokens[-1])


def _last_rows(chunks: dict[int, Chunk], step: StepLogits) -> torch.Tensor:
    """The logits behind the last token of each chunk that ends its sequence."""
    return step.logits[[rows.stop - 1 for chunk, rows in zip(chunks.values(), step.rows, strict=True) if chunk.is_last]]


def _newest(one: _Drafting) -> Chunk:
    length = len(one.mirror.state.token_ids)
    return Chunk(one.mirror.state, length - 1, length, is_last=True)
