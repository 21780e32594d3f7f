"""The embedded engine behind the small interface that model.py drives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .backend import Gauges, Handle
from .contract import Sampling
from .wire import INPUTS, PREFIX, BadRequestError

_NO_LORA = "this package was built without LoRA adapters"
_NO_GUIDE = "the embedded engine does no guided decoding"


class EmbeddedBackend:
    """A loaded `trtbuild.runtime.Engine`."""

    refused: Mapping[str, str] = {
        "lora_id": _NO_LORA,
        "lora_name": _NO_LORA,
        "lora_path": _NO_LORA,
        "lora_ckpt_source": _NO_LORA,
        "guided_decoding_guide_type": _NO_GUIDE,
        "guided_decoding_guide": _NO_GUIDE,
        "image_url": "this model reads text only",
        "sampling_param_logits_post_processor_name": "the embedded engine has no logits post-processors",
    }

    def __init__(self, engine: Any, *, prefix: str = PREFIX) -> None:
        self._engine = engine
        self._prefix = prefix

    @classmethod
    def load(cls, engine_dir: Path, *, prefix: str = PREFIX) -> EmbeddedBackend:
        """The engine in `engine_dir`; raises the runtime's own error, whose text says what is wrong.

        `prefix` is what clients write in front of the name of a sampling parameter.
        """
        from trtbuild.runtime import Engine

        return cls(Engine.load(engine_dir), prefix=prefix)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        found: tuple[int, ...] = tuple(self._engine.facts.eos_token_ids)
        return found

    @property
    def summary(self) -> str:
        """What was loaded, in one line."""
        facts = self._engine.facts
        line = (
            f"{facts.architecture} on {facts.device} in {facts.compute_dtype}, weights {facts.weights}, KV cache "
            f"{facts.kv_cache_dtype} for {facts.kv_cache_tokens} tokens"
        )
        drafts = [] if facts.speculation == "none" else [f"speculation by {facts.speculation}"]
        return "; ".join([line, *drafts, *facts.notes])

    def submit(
        self,
        prompt: list[int],
        sampling: Sampling,
        bad_words: list[list[int]],
        on_output: Callable[[Any], None],
    ) -> Handle:
        """Queue one sequence; `on_output` gets `trtbuild.runtime.Output` values in the engine's thread.

        Raises:
            BadRequestError: a value is out of range, or the sequence can never fit.
        """
        from trtbuild.errors import RequestError
        from trtbuild.runtime import SamplingParams

        params = SamplingParams(
            max_tokens=sampling.max_tokens or 1,
            min_tokens=sampling.min_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=1.0 if sampling.repetition_penalty is None else sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty or 0.0,
            frequency_penalty=sampling.frequency_penalty or 0.0,
            seed=sampling.seed,
            ignore_eos=sampling.ignore_eos,
            stop_token_ids=sampling.stop_token_ids,
            stop_words=sampling.stop_words,
            bad_words=bad_words,
            logprobs=sampling.logprobs,
            prompt_logprobs=sampling.prompt_logprobs,
        )
        try:
            handle: Handle = self._engine.submit(prompt, params, on_output=on_output)
        except RequestError as error:
            raise BadRequestError(_wire_name(str(error), self._prefix)) from error
        return handle

    def gauges(self) -> Gauges:
        """Counts of this moment."""
        stats = self._engine.stats()
        drafts = self._engine.facts.speculation != "none"
        return Gauges(
            max_blocks=stats.total_blocks,
            used_blocks=stats.used_blocks,
            free_blocks=stats.free_blocks,
            reusable_blocks=stats.cached_blocks,
            running=stats.running,
            waiting=stats.waiting,
            draft_tokens=stats.draft_tokens if drafts else None,
            accepted_draft_tokens=stats.accepted_draft_tokens if drafts else None,
        )

    def close(self) -> None:
        """Cancel what is in flight and free the memory."""
        self._engine.close()


def _wire_name(message: str, prefix: str) -> str:
    """The engine names a field as its Python interface does; the client knows the input's name."""
    field = message.split(":", 1)[0].split("[", 1)[0]
    if field == "prompt_token_ids":
        return message.replace("prompt_token_ids", "input_ids", 1)
    return prefix + message if PREFIX + field in INPUTS else message
