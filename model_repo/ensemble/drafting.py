"""Speculation with a draft model: rounds of drafted tokens that the engine verifies, as one answer.

Each round is two requests: the draft model continues what there is so far by a few tokens, the engine takes them as
``draft_input_ids`` and answers with those that it would have generated itself and one more. Tensors and their meaning
are those of upstream's loop (NVIDIA/TensorRT-LLM triton_backend/all_models/inflight_batcher_llm/tensorrt_llm_bls/1/lib/
decode.py `_spec_generate` @4db68284, triton_decoder.py @07f3e442). Ours differs where rounds would show in the answer:
`min_tokens` counts over all rounds, each round draws from another seed, stop words are found across rounds, numbers are
those of the whole answer, and an end token is told from a refused draft.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from model_repo.ensemble.words import unpack
from model_repo.llm.wire import Array

Outputs = dict[str, Array]
# Asks a model: inputs and output names in, its outputs back.
Ask = Callable[[Mapping[str, Array], tuple[str, ...]], Outputs]

_IDS = ("output_ids", "sequence_length")
# Numbers of a whole answer: what each round adds, and what the first round says.
_ADDED = (
    *("cum_log_probs", "kv_cache_alloc_new_blocks", "kv_cache_alloc_total_blocks", "kv_cache_reused_blocks"),
    *("total_accepted_draft_tokens", "total_draft_tokens"),
)
_FIRST = ("num_input_tokens", "arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns")
_RATE = "acceptance_rate"
_SEEDS = 2**64


@dataclass(frozen=True, slots=True)
class Drafted:
    """What the draft model proposes: tokens, and the logits that it chose them by where the engine is to have them."""

    tokens: list[int]
    logits: Array | None = None


@dataclass(slots=True)
class Rounds:
    """One answer.

    Args:
        target, draft: ask the two models.
        inputs: of the engine, with ``input_ids`` and ``request_output_len``; `streaming` is no part of them.
        outputs: what the engine is asked for.
        draft_tokens: how many are drafted at a time.
        use_draft_logits: whether the engine gets the draft model's logits too.
        wanted: whether somebody still wants the answer; asked before each round.
    """

    target: Ask
    draft: Ask
    inputs: Mapping[str, Array]
    outputs: tuple[str, ...]
    draft_tokens: int
    use_draft_logits: bool = False
    wanted: Callable[[], bool] = lambda: True
    _new: list[int] = field(default_factory=list)
    _sums: Outputs = field(default_factory=dict)

    def run(self) -> Iterator[Outputs]:
        """The new tokens of each round, with the numbers of the answer so far."""
        prompt = self.inputs["input_ids"].reshape(-1).tolist()
        room = int(self.inputs["request_output_len"].reshape(-1)[0])
        stops = unpack(self.inputs, "stop_words_list")
        number = 0
        while len(self._new) < room and self.wanted():
            drafted = self._draft([*prompt, *self._new], min(self.draft_tokens, room - len(self._new) - 1), number)
            answered = self._verify([*prompt, *self._new], drafted, number)
            if not answered:
                return
            tokens = _tokens(answered)
            # The engine's own token differs from the refused one: where there is none, an end token was in its place.
            ended = len(tokens) <= len(drafted.tokens) and tokens == drafted.tokens[: len(tokens)]
            kept = _until_stop(self._new, tokens, stops)
            self._new += tokens[:kept]
            yield self._counted(answered, kept)
            if ended or (kept and _until_stop(self._new[:-1], self._new[-1:], stops, whole=True)):
                return
            number += 1

    def _draft(self, context: Sequence[int], count: int, number: int) -> Drafted:
        """`count` tokens behind `context`; an end token is the engine's to say."""
        if count < 1:
            return Drafted([])
        inputs = self._request(context, count, number) | {"min_tokens": _scalar(count, np.int32)}
        more: tuple[str, ...] = ("generation_logits",) if self.use_draft_logits else ()
        inputs |= {"return_generation_logits": _scalar(value=True, dtype=np.bool_)} if self.use_draft_logits else {}
        for name in ("return_log_probs", "return_perf_metrics", "return_num_input_tokens", "return_num_output_tokens"):
            inputs.pop(name, None)
        found = self.draft(inputs, (*_IDS, *more))
        tokens = _tokens(found)[:count]
        logits = found.get("generation_logits")
        if logits is None or not tokens:
            return Drafted(tokens)
        rows = logits.reshape(-1, logits.shape[-1])  # one beam of one prompt
        return Drafted(tokens, rows[-len(tokens) :])

    def _verify(self, context: Sequence[int], drafted: Drafted, number: int) -> Outputs:
        inputs = self._request(context, len(drafted.tokens) + 1, number)
        least = self.inputs.get("min_tokens")
        if least is not None:
            left = max(int(least.reshape(-1)[0]) - len(self._new), 0)
            inputs["min_tokens"] = _scalar(left, np.int32)
        if drafted.tokens:
            inputs["draft_input_ids"] = np.array([drafted.tokens], dtype=np.int32)
        if drafted.logits is not None:
            inputs["draft_logits"] = drafted.logits[np.newaxis]
        return self.target(inputs, self.outputs)

    def _request(self, context: Sequence[int], room: int, number: int) -> dict[str, Array]:
        seed = int(self.inputs["seed"].reshape(-1)[0]) if "seed" in self.inputs else 0
        return dict(self.inputs) | {
            "input_ids": np.array([context], dtype=np.int32),
            "input_lengths": _scalar(len(context), np.int32),
            "request_output_len": _scalar(room, np.int32),
            "seed": _scalar((seed + number) % _SEEDS, np.uint64),
        }

    def _counted(self, answered: Outputs, kept: int) -> Outputs:
        """The outputs of one round as a part of the whole answer."""
        made = dict(answered) | {
            "output_ids": answered["output_ids"][..., :kept],
            "sequence_length": np.full_like(answered["sequence_length"], kept),
        }
        if "output_log_probs" in made:
            probs = made["output_log_probs"]
            made["output_log_probs"] = probs[..., :kept]
            if "cum_log_probs" in made:
                made["cum_log_probs"] = made["cum_log_probs"] - probs[..., kept:].sum(axis=-1, dtype=np.float32)
        if "num_output_tokens" in made:
            made["num_output_tokens"] = np.full_like(made["num_output_tokens"], kept)
        for name in _ADDED:
            if name in made:
                made[name] = made[name] + self._sums[name] if name in self._sums else made[name]
                self._sums[name] = made[name]
        for name in _FIRST:
            if name in made:
                made[name] = self._sums.setdefault(name, made[name])
        if _RATE in made and "total_draft_tokens" in made and "total_accepted_draft_tokens" in made:
            proposed = np.maximum(made["total_draft_tokens"], 1)
            made[_RATE] = (made["total_accepted_draft_tokens"] / proposed).astype(np.float32).reshape(made[_RATE].shape)
        return made


def _tokens(outputs: Mapping[str, Array]) -> list[int]:
    if not outputs:
        return []
    length = int(outputs["sequence_length"].reshape(-1)[0])
    found: list[int] = outputs["output_ids"].reshape(-1)[:length].tolist()
    return found


def _until_stop(
    before: Sequence[int], new: Sequence[int], stops: Sequence[Sequence[int]], *, whole: bool = False
) -> int:
    """How many of the new tokens there are up to the first stop word, which may have begun before them.

    Without a stop word all of them, or none with `whole`.
    """
    longest = max(map(len, stops), default=0)
    tail = list(before[-longest:]) if longest else []
    for count in range(1, len(new) + 1):
        seen = [*tail, *new[:count]]
        if any(seen[-len(word) :] == list(word) for word in stops):
            return count
    return 0 if whole else len(new)


def _scalar(value: float, dtype: type[np.generic]) -> Array:
    return np.array([[value]], dtype=dtype)
