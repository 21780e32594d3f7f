"""The LLM API's results as the values that the rest of this model reads.

Facts of NVIDIA/TensorRT-LLM: tensorrt_llm/executor/result.py @a678b91a (1.2) and as of August 2026
(Maxritz/TensorRT-LLM-RDNA4 @123741b1); tensorrt_llm/executor/base_worker.py @000bd1a6 for prompt log-probabilities.
Drafts: before pull request 17082 of July 2026 no sampler of the PyTorch backend but TRTLLMSampler, which has no drafts,
fills `speculative_decoding` of a request's metrics; it stays at zero. But every version counts a request's steps, the
prompt's included (`py_decoding_iter`, tensorrt_llm/_torch/speculative/spec_sampler_base.py @006567a7 and
tensorrt_llm/_torch/pyexecutor/sampler.py @00026bd1), and each step gives one token and the accepted drafts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np

from .backend import Metrics, Output, TokenLogprob
from .contract import Sampling

_UNKNOWN = float("nan")


class Reader:
    """One request's results, from the LLM API's growing lists to what is new."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling, ends: Sequence[int], *, drafts: bool = False) -> None:
        self._prompt = prompt
        self._sampling = sampling
        self._ends = () if sampling.ignore_eos else tuple(ends)
        self._drafts = drafts
        self._tokens = 0
        self._prompt_told = sampling.prompt_logprobs is None

    def read(self, result: Any) -> Output:
        """What is new since the last call.

        Raises:
            RuntimeError: the result is an error, or lacks what was asked for.
        """
        error = getattr(result, "error", None)
        if error:
            raise RuntimeError(f"TensorRT-LLM: {error}")
        completion = result.outputs[0]
        ids = tuple(completion.token_ids[self._tokens :])
        reason, stop = self._ending(completion, ids) if result.finished else (None, None)
        logprobs = self._logprobs(completion, ids)
        if reason == "stop" and stop is None and self._ends and (not ids or ids[-1] not in self._ends):
            # The token that ends an answer belongs to it here, whether or not this version shows it.
            ids += (self._ends[0],)
            logprobs = None if logprobs is None else (*logprobs, TokenLogprob(self._ends[0], _UNKNOWN, 0))
        self._tokens += len(ids)
        return Output(
            token_ids=ids,
            logprobs=logprobs,
            prompt_logprobs=self._prompt_logprobs(result, completion),
            finished=bool(result.finished),
            finish_reason=reason,
            stop_reason=stop,
            metrics=self._metrics(result) if result.finished else None,
        )

    def _metrics(self, result: Any) -> Metrics | None:
        found = getattr(result.outputs[0], "request_perf_metrics", None)
        steps = getattr(result, "decoding_iter", 0) if self._drafts else 0
        return None if found is None else _metrics(found, max(0, self._tokens - steps) if steps else None)

    def _ending(self, completion: Any, ids: Sequence[int]) -> tuple[str, int | None]:
        """Why it has ended, and the stop token that did it; the LLM API calls a stop token at the limit "length"."""
        reason = completion.finish_reason
        if reason == "cancelled":
            return "cancelled", None
        if reason not in ("stop", "length"):
            raise RuntimeError(f"TensorRT-LLM ended the request with the reason {reason!r}; send it again")
        last = ids[-1] if ids else None
        if last in self._ends:
            return "stop", None
        if last in self._sampling.stop_token_ids:
            return "stop", last
        return reason, None

    def _logprobs(self, completion: Any, ids: Sequence[int]) -> tuple[TokenLogprob, ...] | None:
        if self._sampling.logprobs is None:
            return None
        entries = completion.logprobs[self._tokens : self._tokens + len(ids)]
        if len(entries) != len(ids):
            raise RuntimeError(f"TensorRT-LLM gave {len(entries)} log-probabilities for {len(ids)} tokens")
        return tuple(_entry(token, entry, self._sampling.logprobs) for token, entry in zip(ids, entries, strict=True))

    def _prompt_logprobs(self, result: Any, completion: Any) -> tuple[TokenLogprob | None, ...] | None:
        if self._prompt_told:
            return None
        top = self._sampling.prompt_logprobs or 0
        entries, logits = completion.prompt_logprobs, result.context_logits
        if not entries and logits is None:
            if result.finished and completion.finish_reason != "cancelled":
                raise RuntimeError("TensorRT-LLM gave no log-probabilities of the prompt")
            return None
        rows = entries or _rows(logits)
        if len(rows) != len(self._prompt):
            raise RuntimeError(
                f"TensorRT-LLM gave {len(rows)} log-probabilities for a prompt of {len(self._prompt)} tokens: blocks "
                "that are reused have none; build the package with runtime.kv_cache.enable_block_reuse: false"
            )
        self._prompt_told = True
        make = _entry if entries else _from_logits
        # A row tells of the token behind it; the last one of the first generated token.
        return (None, *(make(token, row, top) for token, row in zip(self._prompt[1:], rows, strict=False)))


def _entry(token: int, entry: Mapping[int, Any], top: int) -> TokenLogprob:
    chosen = entry.get(token)
    if chosen is None:
        raise RuntimeError(f"TensorRT-LLM gave no log-probability of the token {token}")
    ranked = sorted(entry.items(), key=lambda item: item[1].rank)[:top]
    best = tuple((other, float(value.logprob)) for other, value in ranked)
    return TokenLogprob(token, float(chosen.logprob), int(chosen.rank), best)


def _rows(logits: Any) -> Any:
    """A tensor of shape (tokens, vocabulary), or with a leading 1, as a float32 array."""
    array = np.asarray(logits.float().cpu().numpy() if hasattr(logits, "cpu") else logits, dtype=np.float32)
    return array[0] if array.ndim == 3 else array


def _from_logits(token: int, row: Any, top: int) -> TokenLogprob:
    shifted = row - row.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    places = np.argsort(-logprobs, kind="stable")[:top] if top else ()
    best = tuple((int(other), float(logprobs[other])) for other in places)
    rank = int((logprobs > logprobs[token]).sum()) + 1
    return TokenLogprob(token, float(logprobs[token]), rank, best)


def _metrics(found: Any, accepted: int | None) -> Metrics:
    """The numbers of `RequestPerfMetrics` (the fields that upstream's own llmapi model.py @044a90d2 reads).

    `accepted` are the accepted drafts by the count of steps, for versions that do not say how many were drafted.
    """
    blocks, times, drafts = found.kv_cache_metrics, found.timing_metrics, found.speculative_decoding
    drafted = drafts is not None and drafts.total_draft_tokens > 0
    return Metrics(
        arrival_time_ns=_ns(times.arrival_time),
        first_scheduled_time_ns=_ns(times.first_scheduled_time),
        first_token_time_ns=_ns(times.first_token_time),
        last_token_time_ns=_ns(times.last_token_time),
        kv_cache_reused_block=blocks.num_reused_blocks,
        kv_cache_missed_block=blocks.num_missed_blocks,
        kv_cache_alloc_new_blocks=blocks.num_new_allocated_blocks,
        kv_cache_alloc_total_blocks=blocks.num_total_allocated_blocks,
        kv_cache_hit_rate=blocks.kv_cache_hit_rate,
        acceptance_rate=drafts.acceptance_rate if drafted else None,
        total_accepted_draft_tokens=drafts.total_accepted_draft_tokens if drafted else accepted,
        total_draft_tokens=drafts.total_draft_tokens if drafted else None,
    )


def _ns(time: timedelta) -> int:
    return time // timedelta(microseconds=1) * 1000
