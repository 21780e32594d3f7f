"""What both flavours of the fake TensorRT-LLM share: a tiny deterministic model, its executor, results, an event log.

A flavour says what its sampler honours and how it reports; that and the signatures follow upstream's sources, which
each flavour names. Tokens come from the embedded engine over the same checkpoint, or, where trtbuild cannot be
imported, from a table. Two inputs are told by their first tokens: ERROR ends with an error, SLOW takes its time.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ERROR, SLOW = [13, 13, 13], [17, 17, 17]
BLOCK, BLOCKS = 32, 64


def log(**event: Any) -> None:
    """Append one event for the test to read."""
    path = os.environ.get("FAKE_TENSORRT_LLM_LOG")
    if path:
        with Path(path).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(event | {"pid": os.getpid()}, default=str) + "\n")


@dataclass(frozen=True)
class Flavour:
    """What the sampler of one version does, and how it reports."""

    honours: frozenset[str]
    reports_sampled_token: bool
    raises_errors: bool
    counts_drafts: bool
    arguments: frozenset[str]


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass
class CompletionOutput:
    """Fields of `CompletionOutput` that both versions have."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    request_perf_metrics: Any = None


class Network:
    """Log-probabilities of the next token for any sequence."""

    def __init__(self, model: Path) -> None:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        self.vocab_size = config["vocab_size"]
        self._engine = self._load(model)
        log(event="network", kind="table" if self._engine is None else "engine", python=sys.version_info[:2])

    def next(self, tokens: Sequence[int]) -> Any:
        if self._engine is None:
            draw = np.random.default_rng([tokens[-1], len(tokens)])
            scores = draw.normal(size=self.vocab_size) * 2
            scores[:3] -= 50  # special tokens end no text by chance
            return scores - np.log(np.exp(scores).sum())
        from trtbuild.runtime import SamplingParams

        params = SamplingParams(max_tokens=1, logprobs=self.vocab_size, ignore_eos=True)
        (entry,) = self._engine.submit(list(tokens), params).result().logprobs
        row = np.empty(self.vocab_size)
        for token, value in entry.top:
            row[token] = value
        return row

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    @staticmethod
    def _load(model: Path) -> Any:
        try:
            from trtbuild.runtime import Engine
        except ImportError:
            return None
        return Engine.load(model)


class GenerationResult:
    """An awaitable result: iterated in the loop in which it was asked for, as in executor/result.py."""

    def __init__(self, llm: BaseLLM, prompt: list[int], params: Any, streaming: bool) -> None:
        self._llm, self._params, self._streaming = llm, params, streaming
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._done = self.is_aborted = False
        self.prompt_token_ids = prompt
        self.outputs = [CompletionOutput(0)]
        self.context_logits: Any = None
        self.reused = self.decoding_iter = 0
        self.error: str | None = None

    @property
    def finished(self) -> bool:
        return self._done

    def abort(self) -> None:
        log(event="abort", prompt=self.prompt_token_ids[:3])
        self.is_aborted = True

    def put(self, response: dict[str, Any]) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, response)

    def __aiter__(self) -> GenerationResult:
        return self

    async def __anext__(self) -> GenerationResult:
        if self._done:
            raise StopAsyncIteration
        response = await self._queue.get()
        if "error" in response:
            if self._llm.flavour.raises_errors:
                raise RuntimeError(response["error"])
            self.error, self._done = response["error"], True
            return self
        output, reason = self.outputs[0], response["reason"]
        output.token_ids += response["tokens"]
        output.logprobs += response["logprobs"]
        output.prompt_logprobs = response["prompt_logprobs"] or output.prompt_logprobs
        if response["context_logits"] is not None:
            self.context_logits = response["context_logits"]
        if reason is not None:
            self._end(output, reason, response)
        return self

    def _end(self, output: CompletionOutput, reason: str, response: dict[str, Any]) -> None:
        self._done = True
        self.decoding_iter = response["steps"]
        output.request_perf_metrics = response["metrics"]
        output.finish_reason = {"end_id": "stop", "stop_words": "stop"}.get(reason, reason)
        if reason == "stop_words":
            output.stop_reason = output.token_ids[-1]
            if not self._params.include_stop_str_in_output:
                output.token_ids = output.token_ids[:-1]


class BaseLLM:
    """Both versions' LLM without its signatures."""

    flavour: Flavour

    def start(self, model: Any, tokenizer: Any, kwargs: dict[str, Any]) -> None:
        unknown = sorted(set(kwargs) - self.flavour.arguments)
        if unknown:
            raise ValueError(f"LLM got invalid argument: {unknown[0]}")
        self.args = kwargs
        visible = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "TRTLLM_VISIBLE_DEVICES")}
        log(event="start", model=str(model), tokenizer=str(tokenizer), args=kwargs, visible=visible)
        self._draft_len = self._drafting(kwargs.get("speculative_config"))
        self._tokenizer_dir = tokenizer
        self._network = Network(Path(model))
        self._live: dict[int, int] = {}
        self._cached: set[tuple[Any, ...]] = set()
        self._stats: asyncio.Queue[dict[str, Any]] | None = None
        self._stats_loop: asyncio.AbstractEventLoop | None = None

    def _drafting(self, config: dict[str, Any] | None) -> int:
        """The longest draft. What the validators of `EagleDecodingConfig`, `DraftTargetDecodingConfig`,
        `NGramDecodingConfig` and `MTPDecodingConfig` ask for, in 1.2's and the newest llm_args.py alike.
        """
        if config is None:
            return 0
        length = config.get("max_draft_len")
        if config["decoding_type"] == "MTP":
            length = config.get("num_nextn_predict_layers", length or 1)
        if not length:
            raise ValueError(f"max_draft_len must be > 0 for {config['decoding_type']}")
        if config["decoding_type"] in ("Eagle", "Eagle3", "DraftTarget", "Draft_Target"):
            place = config.get("speculative_model") or config.get("speculative_model_dir")
            if place is None:
                raise ValueError("Draft model must be provided for EAGLE")
            draft = json.loads((Path(place) / "config.json").read_text(encoding="utf-8"))
            log(event="draft", place=str(place), architecture=draft["architectures"][0])
        return int(length)

    def begin(self, prompt: list[int], params: Any, lora: Any, streaming: bool, salt: str | None) -> GenerationResult:
        if params.guided_decoding is not None and not self.args.get("guided_decoding_backend"):
            raise ValueError("guided decoding needs guided_decoding_backend")
        if params.end_id is None:
            params._setup(self._tokenizer())
        if params.bad is not None and params._bad_word_ids is None:
            raise RuntimeError("SamplingParams.bad is not processed by tokenizer, please call the setup method.")
        named = {name: getattr(params, name) for name in type(params).__slots__ if name in _SHOWN}
        log(
            event="generate",
            prompt=prompt[:3],
            streaming=streaming,
            params=named,
            lora=None if lora is None else [lora.lora_name, lora.lora_int_id, lora.lora_path, lora.lora_ckpt_source],
        )
        result = GenerationResult(self, prompt, params, streaming)
        result.reused = self._reused(prompt, salt)
        threading.Thread(target=self._generate, args=(result, prompt, params, lora), daemon=True).start()
        return result

    def shutdown(self) -> None:
        log(event="shutdown")
        self._network.close()

    async def stats(self, wait_s: float) -> AsyncIterator[dict[str, Any]]:
        if self._stats is None:
            self._stats, self._stats_loop = asyncio.Queue(), asyncio.get_running_loop()
        while True:
            try:
                yield await asyncio.wait_for(self._stats.get(), wait_s)
            except TimeoutError:
                return

    def _reused(self, prompt: list[int], salt: str | None) -> int:
        """How many of the prompt's tokens lie in cached blocks, which give no logits; the last token never does."""
        ends = range(BLOCK, len(prompt), BLOCK)
        keys = [(salt, *prompt[:end]) for end in ends]
        found = sum(key in self._cached for key in keys) * BLOCK
        self._cached.update(keys)
        return found if (self.args.get("kv_cache_config") or {}).get("enable_block_reuse", True) else 0

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._tokenizer_dir)

    def _generate(self, result: GenerationResult, prompt: list[int], params: Any, lora: Any) -> None:
        try:
            self._run(result, prompt, params, lora)
        except Exception as error:
            result.put({"error": f"{type(error).__name__}: {error}"})
            raise
        finally:
            self._live.pop(id(result), None)

    def _run(self, result: GenerationResult, prompt: list[int], params: Any, lora: Any) -> None:
        times = [time.monotonic()]
        context = self._context(prompt, params, result.reused)
        held: dict[str, list[Any]] = {"tokens": [], "logprobs": []}
        for token, entries, reason in self._tokens(result, prompt, params, lora):
            times.append(time.monotonic())
            if token is not None:
                held["tokens"].append(token)
                held["logprobs"] += entries
            if prompt[:3] == ERROR and len(times) > 2:
                result.put({"error": "the device is lost"})
                return
            if prompt[:3] == SLOW:
                time.sleep(0.05)
            if result._streaming or reason is not None:
                metrics = self._metrics(prompt, params, times, len(times) - 1) if reason else None
                ending = {"reason": reason, "metrics": metrics, "steps": self._steps(len(times) - 1)}
                result.put(held | context | ending)
                held, context = {"tokens": [], "logprobs": []}, dict.fromkeys(context)

    def _tokens(
        self, result: GenerationResult, prompt: list[int], params: Any, lora: Any
    ) -> Iterator[tuple[int | None, list[Any], str | None]]:
        """Token, its log-probabilities and why it is the last; the order of the reasons is upstream's."""
        tokens, guided = list(prompt), self._guided(params)
        draw = np.random.default_rng(params.seed if "seed" in self.flavour.honours else None)
        while True:
            self._tell(result, len(tokens))
            if result.is_aborted:
                yield None, [], "cancelled"
                return
            row = self._network.next(tokens)
            row = row if lora is None else np.roll(row, lora.adapter_id)
            token = guided.pop(0) if guided else self._choose(row, tokens, len(prompt), params, draw)
            tokens.append(token)
            count = len(tokens) - len(prompt)
            reason = None
            if token == params.end_id and not params.ignore_eos:
                reason = "end_id"
            elif count >= params.max_tokens:
                reason = "length"
            elif token in (params.stop_token_ids or ()):
                reason = "stop_words"
            yield token, self._entries(row, token, params.logprobs), reason
            if reason is not None:
                return

    def _choose(self, row: Any, tokens: list[int], prompt: int, params: Any, draw: Any) -> int:
        honours, row = self.flavour.honours, row.copy()
        if "penalties" in honours and params.repetition_penalty:
            row[list(set(tokens))] *= params.repetition_penalty  # log-probabilities are negative
        if "bad" in honours:
            for word in params._bad_word_ids or []:
                if tokens[len(tokens) - len(word) + 1 :] == word[:-1]:
                    row[word[-1]] = -np.inf
        if "min_tokens" in honours and params.min_tokens and len(tokens) - prompt < params.min_tokens:
            row[params.end_id] = -np.inf
        if params.top_k == 1 or (params.temperature is None and params.top_k is None and params.top_p is None):
            return int(row.argmax())
        order = np.argsort(-row)[: params.top_k or None]
        scaled = np.exp((row[order] - row[order[0]]) / (params.temperature or 1.0))
        return int(draw.choice(order, p=scaled / scaled.sum()))

    def _entries(self, row: Any, token: int, top: int | None) -> list[dict[int, Logprob]]:
        """One entry; none in the version that takes 0 for "no log-probabilities"."""
        if top is None or (top == 0 and not self.flavour.reports_sampled_token):
            return []
        order = np.argsort(-row, kind="stable")
        entry = {int(other): Logprob(float(row[other]), rank) for rank, other in enumerate(order[:top], 1)}
        if self.flavour.reports_sampled_token and token not in entry:
            entry[token] = Logprob(float(row[token]), int((row > row[token]).sum()) + 1)
        return [entry]

    def _context(self, prompt: list[int], params: Any, reused: int) -> dict[str, Any]:
        wanted = params.prompt_logprobs
        asked = wanted is not None if self.flavour.reports_sampled_token else bool(wanted)
        if not asked and not params.return_context_logits:
            return {"prompt_logprobs": None, "context_logits": None}
        rows = [self._network.next(prompt[: end + 1]) for end in range(reused, len(prompt))]
        logits = np.stack(rows)[None] if params.return_context_logits else None
        if not asked:
            return {"prompt_logprobs": None, "context_logits": logits}
        # As upstream pairs them, from the first token on, whatever the first row is of.
        followers = [*prompt[1:], int(rows[-1].argmax())]
        entries = [
            entry for row, token in zip(rows, followers, strict=False) for entry in self._entries(row, token, wanted)
        ]
        return {"prompt_logprobs": entries, "context_logits": logits}

    def _guided(self, params: Any) -> list[int]:
        guide = params.guided_decoding
        if guide is None:
            return []
        texts = {"json": '{"b": 2}', "regex": "fox", "grammar": "dog", "structural_tag": "lazy"}
        kinds = [name for name in texts if getattr(guide, name) is not None]
        text = '{"a": 1}' if guide.json_object else texts[kinds[0]]
        return [*self._tokenizer().encode(text, add_special_tokens=False), params.end_id]

    def _steps(self, tokens: int) -> int:
        """Steps that so many tokens have taken: the prompt's gives one, each other one as if half a draft held."""
        return 1 + -(-(tokens - 1) // (1 + self._draft_len // 2))

    def _metrics(self, prompt: list[int], params: Any, times: list[float], steps: int) -> Any:
        if not params.return_perf_metrics:
            return None
        blocks = -(-(len(prompt) + steps) // BLOCK)
        drafted = self._draft_len * (self._steps(steps) - 1) if self.flavour.counts_drafts else 0
        accepted = steps - self._steps(steps) if drafted else 0
        moments = [timedelta(seconds=times[place]) for place in (0, 0, 1, -1)]
        names = ("arrival_time", "first_scheduled_time", "first_token_time", "last_token_time")
        return SimpleNamespace(
            kv_cache_metrics=SimpleNamespace(
                num_reused_blocks=0, num_missed_blocks=blocks, num_new_allocated_blocks=blocks,
                num_total_allocated_blocks=blocks, kv_cache_hit_rate=0.0,
            ),
            timing_metrics=SimpleNamespace(**dict(zip(names, moments, strict=True))),
            speculative_decoding=SimpleNamespace(
                acceptance_rate=accepted / drafted if drafted else 0.0, total_accepted_draft_tokens=accepted,
                total_draft_tokens=drafted,
            ),
        )  # fmt: skip

    def _tell(self, result: GenerationResult, length: int) -> None:
        self._live[id(result)] = -(-length // BLOCK)
        if self._stats is None or self._stats_loop is None:
            return
        used = sum(self._live.values())
        blocks = {
            "maxNumBlocks": BLOCKS,
            "usedNumBlocks": used,
            "freeNumBlocks": BLOCKS - used,
            "tokensPerBlock": BLOCK,
        }
        stats = {"kvCacheStats": blocks, "numActiveRequests": len(self._live), "numQueuedRequests": 0}
        self._stats_loop.call_soon_threadsafe(self._stats.put_nowait, stats)


_SHOWN = frozenset(
    ("end_id", "max_tokens", "bad", "_bad_word_ids", "stop_token_ids", "include_stop_str_in_output", "n", "top_k",
     "top_p", "seed", "temperature", "min_tokens", "repetition_penalty", "presence_penalty", "frequency_penalty",
     "min_p", "logprobs", "prompt_logprobs", "return_context_logits", "return_perf_metrics", "ignore_eos", "detokenize",
     "prompt_ignore_length")
)  # fmt: skip


def validate(params: Any) -> None:
    """What both versions' `_validate` refuses."""
    if params.top_p is not None and not 0 <= params.top_p <= 1:
        raise ValueError(f"require 0 <= top_p <= 1, got top_p={params.top_p}")
    if params.top_k is not None and params.top_k < 0:
        raise ValueError(f"require top_k >= 0, got top_k={params.top_k}")
    if params.temperature is not None and params.temperature < 0:
        raise ValueError(f"require temperature >= 0, got temperature={params.temperature}")
    guide = params.guided_decoding
    if guide is not None:
        names = ("json", "regex", "grammar", "json_object", "structural_tag")
        guides = sum(bool(getattr(guide, name)) for name in names)
        if guides > 1:
            raise ValueError(f"Only one guide can be used for a request, but got {guides}.")


def setup(params: Any, tokenizer: Any) -> None:
    """`SamplingParams._setup`: the end token and the word lists from the tokenizer."""
    params.end_id = tokenizer.eos_token_id
    if params.bad is not None:
        params._bad_word_ids = [tokenizer.encode(word, add_special_tokens=False) for word in params.bad]
