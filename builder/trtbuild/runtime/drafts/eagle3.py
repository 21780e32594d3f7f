"""EAGLE-3 as drafter: a place of a text is drafted for once the model has computed it and the token after it is known.

The draft's place t reads what the model's captured layers gave at position t, and the token at t + 1. Behind the last
known place it reads its own hidden state instead; those places are computed again when the model has been there. Where
the model itself took blocks from the prefix cache, the draft sees the text from behind them on.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import torch

from trtbuild.runtime.attention import Segment, Step
from trtbuild.runtime.config import KvCacheConfig
from trtbuild.runtime.drafts.draft import Ask, Draft
from trtbuild.runtime.drafts.eagle3_model import Eagle3Model
from trtbuild.runtime.drafts.growing import Growing, grow
from trtbuild.runtime.places import segment_of, slots_of
from trtbuild.runtime.scheduler import Chunk
from trtbuild.runtime.sequence import Sequence, blank_sequence
from trtbuild.runtime.step_logits import StepLogits
from trtbuild.runtime.tables import BlockTables


@dataclass(slots=True)
class _Seen:
    """One request: the blocks of its places, and what the model gave of places that the draft has not computed yet.

    `state.num_computed` counts the places that are computed for good; the first of them may lie anywhere in the text.
    """

    state: Sequence
    next_place: int = 0
    places: list[int] = field(default_factory=list)
    features: list[torch.Tensor] = field(default_factory=list)

    def take(self, first: int, features: torch.Tensor) -> None:
        """Keep `features` [count, H] of the places from `first` on, but for those that came before."""
        start = max(first, self.next_place)
        new = features[start - first :]
        if len(new):
            self.places += range(start, start + len(new))
            self.features.append(new)
            self.next_place = start + len(new)


@dataclass(slots=True)
class _Feed:
    """What one request adds to a step of the draft: `count` places from the cache's place `start` on."""

    growing: Growing
    state: Sequence
    start: int
    token_ids: list[int]
    features: torch.Tensor
    places: list[int]

    @property
    def end(self) -> int:
        """Behind the last place, in the cache."""
        return self.start + len(self.places)


class Eagle3Drafter:
    """Drafts for all requests of a step together."""

    def __init__(self, model: Eagle3Model, cache: KvCacheConfig, num_blocks: int, vocab_size: int) -> None:
        self._model, self._vocab_size = model, vocab_size
        # A place depends on the model's states too: blocks with equal tokens are not the same.
        plain = KvCacheConfig(tokens_per_block=cache.tokens_per_block, enable_block_reuse=False)
        self._tables = BlockTables(plain, num_blocks)
        self._seen: dict[int, _Seen] = {}

    def propose(self, asks: Many[Ask]) -> list[Draft | None]:
        """The draft's tokens behind each text; none where the model has computed nothing new, or no block is free."""
        made = [Growing(ask) for ask in asks]
        feeds = [feed for one in made if (feed := self._known(one)) is not None]
        for feed in feeds:
            feed.state.num_computed = feed.end
        while feeds:
            hidden = self._run(feeds)
            grow([feed.growing for feed in feeds], self._model.logits(hidden), self._vocab_size)
            feeds = [_behind(feed, hidden[row : row + 1]) for row, feed in enumerate(feeds) if feed.growing.wants_more]
        return [one.draft() for one in made]

    def observe(self, chunks: Many[Chunk], step: StepLogits) -> None:
        """Keep what the model's captured layers gave at the places of right tokens."""
        states = None if step.states is None else step.states.layers
        if states is None:
            return
        features, row = self._model.features(states), 0
        for chunk in chunks:
            sequence, count = chunk.sequence, chunk.end - chunk.start
            right = count - chunk.num_drafted + (0 if chunk.draft is None else chunk.draft.accepted)
            if not sequence.finished and sequence.logits is None:
                seen = self._seen.setdefault(sequence.request_id, _Seen(blank_sequence(sequence.request_id)))
                seen.take(chunk.start, features[row : row + right])
            row += count

    def forget(self, sequence: Sequence) -> None:
        """Free a request's blocks."""
        seen = self._seen.pop(sequence.request_id, None)
        if seen is not None:
            self._tables.release(seen.state)

    def release(self) -> None:
        """Give the draft's memory back."""
        self._seen.clear()
        self._model.release()

    def _known(self, growing: Growing) -> _Feed | None:
        """The places of a request that became known, if there are any and they and its draft have room."""
        sequence = growing.ask.sequence
        seen = self._seen.get(sequence.request_id)
        if seen is None or not seen.places:
            return None
        state = seen.state
        tokens = state.num_computed + len(seen.places) + growing.ask.count - 1
        if not self._tables.hold(state, tokens):
            return None
        # The newest token ends the text, so that every place has one behind it.
        token_ids = [sequence.token_ids[place + 1] for place in seen.places]
        feed = _Feed(growing, state, state.num_computed, token_ids, torch.cat(seen.features), seen.places)
        seen.places, seen.features = [], []
        return feed

    def _run(self, feeds: list[_Feed]) -> torch.Tensor:
        """The draft's hidden states [feeds, H] at the last place of each."""
        size, device = self._tables.block_size, feeds[0].features.device
        segments: list[Segment] = []
        slots: list[int] = []
        last: list[int] = []
        for feed in feeds:
            segments.append(segment_of(feed.state, feed.start, feed.end, len(slots), block_size=size, device=device))
            slots += slots_of(feed.state, feed.start, feed.end, size)
            last.append(len(slots) - 1)
        step = Step(segments, torch.tensor(slots, device=device))
        token_ids = [token for feed in feeds for token in feed.token_ids]
        places = [place for feed in feeds for place in feed.places]
        return self._model.run(token_ids, torch.cat([feed.features for feed in feeds]), places, step)[last]


def _behind(feed: _Feed, hidden: torch.Tensor) -> _Feed:
    """The place behind the last one of `feed`, which reads the draft's own hidden state [1, H] and newest token."""
    return _Feed(feed.growing, feed.state, feed.end, feed.growing.tokens[-1:], hidden, [feed.places[-1] + 1])
