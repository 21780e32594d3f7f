"""The engine: takes requests from any thread and answers them from one of its own."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from trtbuild.errors import RequestError, ToolError, TrtbuildError
from trtbuild.runtime.advance import StepResult
from trtbuild.runtime.config import EngineConfig
from trtbuild.runtime.drafts.load import draft_bytes, load_speculation
from trtbuild.runtime.drafts.speculation import Speculation
from trtbuild.runtime.facts import engine_facts, engine_stats
from trtbuild.runtime.intake import Intake
from trtbuild.runtime.joined import JoinedScales
from trtbuild.runtime.model import ModelRunner
from trtbuild.runtime.outputs import Completion, EngineStats, Output
from trtbuild.runtime.request import Request, final_output
from trtbuild.runtime.sampling_params import SamplingParams
from trtbuild.runtime.scheduler import Chunk, Scheduler
from trtbuild.runtime.sequence import Sequence as EngineSequence
from trtbuild.runtime.step import finish_promised, finish_step, promise_tokens
from trtbuild.runtime.step_logits import StepLogits

logger = logging.getLogger(__name__)

# After this many failing steps in a row the engine takes no more requests: the device is most likely lost.
_FAILURES_ALLOWED = 3


class Engine:
    """A loaded engine directory that answers requests; a context manager.

    Example:
        with Engine.load("package/engine") as engine:
            request = engine.submit([1, 2, 3], SamplingParams(max_tokens=16))
            for output in request:
                print(output.token_ids)
    """

    def __init__(
        self, runner: ModelRunner, config: EngineConfig, intake: Intake, speculation: Speculation | None = None
    ) -> None:
        self.facts = engine_facts(runner, config, intake.end_ids)
        self._runner = runner
        self._intake = intake
        self._speculation = speculation
        self._scheduler = Scheduler(config, runner.num_blocks)
        self._requests: dict[int, Request] = {}
        # The step that the device works on while the next one is scheduled: its tokens are promised.
        self._ahead: tuple[list[Chunk], StepLogits] | None = None
        self._sequences: dict[int, EngineSequence] = {}
        self._wake = threading.Condition()
        self._arrived: deque[tuple[Request, EngineSequence]] = deque()
        self._cancelled: deque[int] = deque()
        self._next_id = 0
        self._steps = 0
        self._generated = 0
        self._failures = 0
        self._closing = False
        self._refusal: TrtbuildError | None = None
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="trtbuild-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls, engine_dir: Path | str, *, config: EngineConfig | None = None, joined: JoinedScales | None = None
    ) -> Engine:
        """An engine over the checkpoint in `engine_dir`, with its engine.json unless `config` is given.

        With `joined` it computes with the scales that another engine would make of the checkpoint's.

        Raises:
            ArtifactError: a file is missing or damaged.
            CompatibilityError: the model is of a kind that this engine does not run.
            HostError: the host lacks the device or the memory.
        """
        engine_dir = Path(engine_dir)
        config = config or EngineConfig.read(engine_dir)
        runner = ModelRunner.load(engine_dir, config, joined=joined, set_aside=draft_bytes(engine_dir, config))
        speculation = load_speculation(engine_dir, config, runner)
        return cls(runner, config, Intake.read(engine_dir, runner, config), speculation)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        on_output: Callable[[Output], None] | None = None,
    ) -> Request:
        """Queue a request; without `on_output`, which is called in the engine's thread, iterate over what is returned.

        Raises:
            RequestError: the prompt or a parameter is out of range, or the engine is closed.
        """
        params = params or SamplingParams()
        prompt = tuple(prompt_token_ids)
        self._intake.check(prompt, params)
        return self._enqueue(prompt, params, on_output=on_output, logits=None)

    def generate(
        self, prompts: Iterable[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """The completions of all prompts, run together; `params` is one for all or one for each.

        Raises:
            RequestError: as `submit` does; nothing is left running then.
            TrtbuildError: the error that ended one of the requests.
        """
        asked = list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params] * len(asked)
        if len(each) != len(asked):
            raise RequestError(f"{len(asked)} prompts and {len(each)} sampling parameters were given")
        requests: list[Request] = []
        try:
            with self._wake:  # all arrive at once, so that equal calls make equal steps
                requests.extend(self.submit(prompt, one) for prompt, one in zip(asked, each, strict=True))
            return [request.result() for request in requests]
        finally:
            for request in requests:
                request.cancel()

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """The logits after each of `token_ids`, [tokens, vocabulary], computed in chunks through the paged cache.

        Raises:
            RequestError: as `submit` does.
        """
        tokens = tuple(token_ids)
        params = SamplingParams(max_tokens=1)
        self._intake.check(tokens, params)
        parts: list[torch.Tensor] = []
        self._enqueue(tokens, params, on_output=None, logits=parts).result()
        return torch.cat(parts)

    def stats(self) -> EngineStats:
        """Counts of this moment."""
        waiting = len(self._scheduler.waiting) + len(self._arrived)
        return engine_stats(
            self._scheduler, self._speculation, waiting=waiting, steps=self._steps, generated=self._generated
        )

    def close(self) -> None:
        """Cancel what is in flight, stop the engine's thread and free the memory; may be called again."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _enqueue(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams,
        *,
        on_output: Callable[[Output], None] | None,
        logits: list[torch.Tensor] | None,
    ) -> Request:
        with self._wake:
            if self._refusal is not None:
                raise RequestError(f"the engine has stopped: {self._refusal.message}", "load it again")
            if self._closing:
                raise RequestError("the engine is closed", "load it again")
            self._next_id += 1
            request = Request(self._next_id, prompt, on_output=on_output, on_cancel=self._cancel)
            self._arrived.append((request, self._intake.sequence(self._next_id, prompt, params, logits)))
            self._wake.notify_all()
        return request

    def _cancel(self, request_id: int) -> None:
        with self._wake:
            self._cancelled.append(request_id)
            self._wake.notify_all()

    def _run(self) -> None:
        """The engine's thread."""
        # A new thread starts with OpenMP's own idea of the thread count.
        torch.set_num_threads(self._threads)
        try:
            while self._take_orders():
                self._step()
        except Exception as error:  # a bug in the scheduler: nobody may wait for ever
            logger.exception("the engine has stopped")
            self._refusal = ToolError(f"{type(error).__name__}: {error}")
        finally:
            self._end()

    def _take_orders(self) -> bool:
        """Wait for work, take in what arrived and what was cancelled; False once the engine closes."""
        if self._ahead is not None and not self._scheduler.has_work:
            self._settle_ahead()  # all of its sequences have ended
        with self._wake:
            while not (self._closing or self._arrived or self._cancelled or self._scheduler.has_work):
                self._wake.wait()
            if self._closing or self._refusal is not None:
                return False
            arrived, cancelled = list(self._arrived), list(self._cancelled)
            self._arrived.clear()
            self._cancelled.clear()
        for request, sequence in arrived:
            self._requests[request.request_id] = request
            self._sequences[request.request_id] = sequence
            self._scheduler.add(sequence)
        for request_id in cancelled:
            cancelled_sequence = self._sequences.get(request_id)
            if cancelled_sequence is not None:
                self._finish(cancelled_sequence, final_output("cancelled", metrics=cancelled_sequence.metrics()))
        return True

    def _step(self) -> None:
        """Launch a step, and only then look at what the one before has brought, if that could wait."""
        if self._speculation is not None:
            self._speculation.propose(self._scheduler)
        chunks = self._scheduler.schedule()
        if not chunks:
            self._settle_ahead()
            return
        try:
            step = self._runner.execute(chunks)
        except Exception as error:  # noqa: BLE001  the step's requests fail; the others may go on
            self._settle_ahead()
            self._fail(chunks, error)
            return
        self._scheduler.commit(chunks)
        promised = self._speculation is None and promise_tokens(chunks, step)
        self._settle_ahead()
        if promised:
            self._ahead = chunks, step
        else:
            self._finish_step(chunks, step, finish_step)

    def _settle_ahead(self) -> None:
        """Wait for the step whose tokens are promised, if there is one."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self._finish_step(*ahead, finish_promised)

    def _finish_step(
        self, chunks: list[Chunk], step: StepLogits, finish: Callable[[list[Chunk], StepLogits], list[StepResult]]
    ) -> None:
        """Take in what a step has brought, and give it to the callers."""
        try:
            results = finish(chunks, step)
        except Exception as error:  # noqa: BLE001  the step's requests fail; the others may go on
            self._fail(chunks, error)
            return
        self._failures = 0
        self._steps += 1
        if self._speculation is not None:
            self._runner.keep_paths(chunks)
            self._speculation.observe(chunks, step)
        self._scheduler.publish(chunks)
        settled = [self._settle(result) for result in results]
        for request, output in settled:
            request.deliver(Output(token_ids=(output,)) if isinstance(output, int) else output)

    def _settle(self, result: StepResult) -> tuple[Request, Output | int]:
        """Count a sequence's new output and free its blocks if it is the last; the output is still to be handed out."""
        sequence, output = result
        request_id = sequence.request_id
        self._generated += 1 if isinstance(output, int) else len(output.token_ids)
        if isinstance(output, int) or not output.finished:
            return self._requests[request_id], output
        self._forget(sequence)
        return self._requests.pop(request_id), output

    def _forget(self, sequence: EngineSequence) -> None:
        """Free a sequence's blocks. The device may still write into them; whoever gets them writes later."""
        sequence.finished = True
        self._scheduler.remove(sequence)
        if self._speculation is not None:
            self._speculation.forget(sequence)
        del self._sequences[sequence.request_id]

    def _fail(self, chunks: list[Chunk], error: Exception) -> None:
        logger.error("a step failed", exc_info=error)
        shown = error if isinstance(error, TrtbuildError) else ToolError(f"{type(error).__name__}: {error}")
        for sequence in [chunk.sequence for chunk in chunks if not chunk.sequence.finished]:
            self._finish(sequence, final_output("error", error=shown, metrics=sequence.metrics()))
        self._failures += 1
        if self._failures >= _FAILURES_ALLOWED:
            with self._wake:
                self._refusal = ToolError(f"{self._failures} steps in a row failed, the last with {shown}")

    def _finish(self, sequence: EngineSequence, output: Output) -> None:
        """Free a sequence's blocks, then tell its caller, who may count on that."""
        self._forget(sequence)
        self._requests.pop(sequence.request_id).deliver(output)

    def _end(self) -> None:
        """Give everyone who still waits a final output."""
        with self._wake:
            self._closing = True
            for request, sequence in self._arrived:
                self._requests[request.request_id] = request
                self._sequences[request.request_id] = sequence
            self._arrived.clear()
        reason = self._refusal
        for sequence in list(self._sequences.values()):
            output = final_output("error" if reason else "cancelled", error=reason, metrics=sequence.metrics())
            self._finish(sequence, output)
        if self._speculation is not None:
            self._speculation.release()
        self._runner.release()
