"""TensorRT-LLM's LLM API behind the small interface that model.py drives.

One thread runs an asyncio loop, since the LLM API's results can only be awaited in the loop in which they were asked
for (NVIDIA/TensorRT-LLM tensorrt_llm/executor/result.py @a678b91a: `GenerationResultBase.__init__`).
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import trtllm_sampling
from .backend import Gauges, Handle, Output
from .contract import Lora, Sampling
from .trtllm_output import Reader
from .trtllm_process import place_draft, read_args, read_model, start_llm
from .trtllm_sampling import Abilities, Model
from .wire import BadRequestError

logger = logging.getLogger(__name__)
# An aborted request gets its last response from the executor; if none comes, the client must not wait for it.
_ABORT_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 15.0
_STATS_TIMEOUT_S = 1.0
_LORA_INPUTS = ("lora_id", "lora_name", "lora_path", "lora_ckpt_source")
_GUIDE_INPUTS = ("guided_decoding_guide_type", "guided_decoding_guide")


def load(engine_dir: Path, *, gpus: int | None, adapters: Mapping[str, str]) -> TrtllmBackend | WorkerRank:
    """The LLM of an engine directory on rank 0; on another rank this works for the leader until the session's end.

    Args:
        engine_dir: the checkpoint with ``llm_args.yaml``.
        gpus: how many GPUs this instance was given, None for all.
        adapters: directories of LoRA adapters in the engine directory, by name.

    Raises:
        SetupError: the engine directory is not complete.
    """
    args = place_draft(read_args(engine_dir), engine_dir)
    model = read_model(engine_dir)
    given: dict[str, Any] = {"model": str(engine_dir), "tokenizer": str(engine_dir)}
    if gpus is not None:
        given["gpus_per_node"] = gpus
    llm = start_llm(args | given)
    if llm is None:
        return WorkerRank()
    places = {name: str(engine_dir / place) for name, place in adapters.items()}
    return TrtllmBackend(llm, args, model, places)


class WorkerRank:
    """A rank that has worked for the leader: requests are the leader's."""

    refused: Mapping[str, str] = {}
    summary = "the MPI session of this rank has ended"

    def submit(self, prompt: Any, sampling: Any, bad_words: Any, on_output: Any) -> Handle:  # noqa: ARG002 - a protocol
        """Refuse: only the leader has the LLM."""
        raise BadRequestError("this server is a worker rank of an MPI job; send requests to the server of rank 0")

    def gauges(self) -> Gauges:
        """Nothing to tell."""
        return Gauges()

    def close(self) -> None:
        """Nothing to free."""


class TrtllmBackend:
    """A loaded `tensorrt_llm.LLM`."""

    def __init__(self, llm: Any, args: Mapping[str, Any], model: Model, adapters: Mapping[str, str]) -> None:
        self._llm = llm
        self._model = model
        self._can = Abilities.detect(args)
        self._drafts = args.get("speculative_config") is not None
        self._adapters = {name: (number, place) for number, (name, place) in enumerate(sorted(adapters.items()), 1)}
        self._salts = "cache_salt" in inspect.signature(llm.generate_async).parameters
        self._runs: set[_Run] = set()
        self._stats: Mapping[str, Any] | None = None
        self._reads_stats = bool(args.get("enable_iter_perf_stats"))
        self._stats_task: asyncio.Task[None] | None = None
        self.refused: Mapping[str, str] = _refused(args)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="trtbuild-llm", daemon=True)
        self._thread.start()

    @property
    def summary(self) -> str:
        """What was loaded, in one line."""
        adapters = f", LoRA adapters {', '.join(self._adapters)}" if self._adapters else ""
        return f"TensorRT-LLM {self._can.version}, vocabulary of {self._model.vocab_size}{adapters}"

    def submit(
        self, prompt: list[int], sampling: Sampling, bad_words: list[list[int]], on_output: Callable[[Any], None]
    ) -> Handle:
        """Queue one sequence; `on_output` gets `backend.Output` values in the loop's thread.

        Raises:
            BadRequestError: a value is out of range, or this TensorRT-LLM does not do what is asked.
        """
        trtllm_sampling.check(prompt, sampling, bad_words, self._model)
        trtllm_sampling.refuse(sampling, bad_words, self._model, self._can)
        from tensorrt_llm import SamplingParams
        from tensorrt_llm.llmapi import GuidedDecodingParams

        wanted = trtllm_sampling.arguments(prompt, sampling, bad_words, self._model, self._can)
        try:
            if sampling.guide is not None:
                wanted["guided_decoding"] = GuidedDecodingParams(**trtllm_sampling.guided(sampling.guide))
            params = SamplingParams(**wanted)
            if bad_words:
                # `_setup` fills this from the tokenizer, but not when end_id is given (llmapi/llm.py @4c05a748,
                # `_prepare_sampling_params`); these are our own tokenizer's ids, with and without a space in front.
                params._bad_word_ids = [list(word) for word in bad_words]  # noqa: SLF001
            lora = self._lora_request(sampling.lora)
            reader = Reader(prompt, sampling, self._model.ends, drafts=self._drafts)
            run = _Run(self._loop, reader, on_output, self._runs.discard)
            begin = self._begin(run, prompt, params, lora, sampling)
            return asyncio.run_coroutine_threadsafe(begin, self._loop).result()
        except (ValueError, TypeError) as error:
            raise BadRequestError(f"TensorRT-LLM {self._can.version} refuses the request: {error}") from error

    def gauges(self) -> Gauges:
        """Counts of this moment; those of the KV cache where the LLM argument enable_iter_perf_stats is set."""
        blocks = (self._stats or {}).get("kvCacheStats") or {}
        queued = (self._stats or {}).get("numQueuedRequests")
        running = len(self._runs)
        return Gauges(
            max_blocks=blocks.get("maxNumBlocks"),
            # Statistics come with iterations, and none runs when nothing is left to do.
            used_blocks=blocks.get("usedNumBlocks") if running or not blocks else 0,
            free_blocks=blocks.get("freeNumBlocks") if running or not blocks else blocks.get("maxNumBlocks"),
            running=running,
            waiting=queued if running or queued is None else 0,
        )

    def close(self) -> None:
        """Abort what is in flight, shut the LLM down and end the loop."""
        asyncio.run_coroutine_threadsafe(self._drain(), self._loop).result()
        self._llm.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()

    async def _begin(self, run: _Run, prompt: list[int], params: Any, lora: Any, sampling: Sampling) -> _Run:
        # A prompt with a salt of its own finds no cached blocks: TensorRT-LLM has no logits of what it reuses, so no
        # log-probabilities (NVIDIA/Model-Optimizer issue 1577).
        salt = {"cache_salt": uuid.uuid4().hex} if sampling.prompt_logprobs is not None and self._salts else {}
        # By keyword: `streaming` is the fifth of the positional parameters, in 1.2 (llmapi/llm.py @4c05a748) and in
        # August 2026 (arusli-nv/TensorRT-LLM @99a813ec) alike.
        result = self._llm.generate_async(
            inputs=prompt, sampling_params=params, lora_request=lora, streaming=sampling.every_output, **salt
        )
        self._runs.add(run)
        run.follow(result)
        if self._reads_stats and self._stats_task is None:
            self._stats_task = self._loop.create_task(self._watch_stats())
        return run

    async def _drain(self) -> None:
        tasks = [run.abort() for run in list(self._runs)]
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_TIMEOUT_S)
        if self._stats_task is not None:
            self._stats_task.cancel()
            await asyncio.wait([self._stats_task], timeout=_CLOSE_TIMEOUT_S)
        await self._loop.shutdown_asyncgens()

    async def _watch_stats(self) -> None:
        """Keep the newest iteration's statistics; there are none before the first request (`LLM.get_stats_async`)."""
        while True:
            try:
                async for stats in self._llm.get_stats_async(timeout=_STATS_TIMEOUT_S):
                    self._stats = stats
            except Exception:  # gauges are no reason to stop serving
                logger.exception("the statistics of TensorRT-LLM cannot be read; the gauges show requests only")
                self._stats = None
                return
            await asyncio.sleep(_STATS_TIMEOUT_S / 10)

    def _lora_request(self, lora: Lora | None) -> Any:
        if lora is None:
            return None
        from tensorrt_llm.executor.request import LoRARequest

        numbers = {number: name for name, (number, _) in self._adapters.items()}
        if lora.path is None:
            if lora.name not in self._adapters:
                known = ", ".join(self._adapters) or "none"
                raise BadRequestError(
                    f"lora_name: {lora.name!r} is no adapter of this package, which has: {known}; send lora_id and "
                    "lora_path with it for one that lies on the server"
                )
            number, place = self._adapters[lora.name]
            return LoRARequest(lora_name=lora.name, lora_int_id=number, lora_path=place)
        if lora.id in numbers or lora.name in self._adapters:
            taken = f"lora_id: {lora.id}" if lora.id in numbers else f"lora_name: {lora.name!r}"
            raise BadRequestError(f"{taken} is an adapter of this package; send another for one of your own")
        return LoRARequest(lora_name=lora.name, lora_int_id=lora.id, lora_path=lora.path, lora_ckpt_source=lora.source)


class _Run:
    """One request in flight."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        reader: Reader,
        on_output: Callable[[Output], None],
        on_end: Callable[[_Run], None],
    ) -> None:
        self._loop, self._reader, self._on_output, self._on_end = loop, reader, on_output, on_end
        self._result: Any = None
        self._task: asyncio.Task[None]
        self._ended = False
        self._aborted = False

    def follow(self, result: Any) -> None:
        """Start to hand on what comes (loop's thread)."""
        self._result = result
        self._task = self._loop.create_task(self._follow())

    def cancel(self) -> None:
        """Abort the request; its last output says "cancelled" (any thread)."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it every request
            self._loop.call_soon_threadsafe(self.abort)

    def abort(self) -> asyncio.Task[None]:
        """Abort the request (loop's thread); the task that then ends."""
        if not self._ended and not self._aborted:
            self._aborted = True
            self._result.abort()
            self._loop.call_later(_ABORT_TIMEOUT_S, self._give_up)
        return self._task

    async def _follow(self) -> None:
        try:
            async for result in self._result:
                self._deliver(self._reader.read(result))
            error: Exception = RuntimeError("TensorRT-LLM ended the request without a last response")
        except Exception as caught:
            error = caught
            if not self._aborted:
                logger.exception("a request failed")
            if not self._result.finished:
                self._result.abort()  # nobody reads the rest
        self._deliver(_last("cancelled") if self._aborted else _last("error", error))

    def _give_up(self) -> None:
        if not self._ended:
            self._task.cancel()
            self._deliver(_last("cancelled"))

    def _deliver(self, output: Output) -> None:
        if self._ended:
            return
        if output.finished:
            self._ended = True
            self._on_end(self)
        self._on_output(output)


def _last(reason: str, error: Exception | None = None) -> Output:
    return Output(finished=True, finish_reason=reason, error=error)


def _refused(args: Mapping[str, Any]) -> dict[str, str]:
    refused = {
        "image_url": "this model reads text only",
        "sampling_param_logits_post_processor_name": "this package names no logits post-processors",
    }
    if not args.get("enable_lora") and not args.get("lora_config"):
        refused |= dict.fromkeys(_LORA_INPUTS, "this package was built without LoRA adapters")
    if not args.get("guided_decoding_backend"):
        refused |= dict.fromkeys(_GUIDE_INPUTS, "this package was built without a guided decoding backend")
    return refused
