"""A request of `tensorrt_llm_bls`: which of its tensors go to which model, and what this model reads itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from model_repo.ensemble.tensors import PERF_METRICS, filled, one_prompt, renamed
from model_repo.llm.wire import Array, BadRequestError, Inputs, flag, text, whole, words

TO_PREPROCESSING = {
    "text_input": "QUERY",
    "messages": "MESSAGES",
    "decoder_text_input": "DECODER_QUERY",
    "image_bytes_input": "IMAGE_BYTES",
    "image_url_input": "IMAGE_URL",
    "video_bytes_input": "VIDEO_BYTES",
    "max_tokens": "REQUEST_OUTPUT_LEN",
    "bad_words": "BAD_WORDS_DICT",
    "stop_words": "STOP_WORDS_DICT",
    "embedding_bias_words": "EMBEDDING_BIAS_WORDS",
    "embedding_bias_weights": "EMBEDDING_BIAS_WEIGHTS",
    "end_id": "END_ID",
    "pad_id": "PAD_ID",
    "prompt_table_extra_id": "PROMPT_TABLE_EXTRA_ID",
}
_SAME_NAME = (
    *("temperature", "repetition_penalty", "min_tokens", "presence_penalty", "frequency_penalty", "seed"),
    *("return_log_probs", "return_context_logits", "return_generation_logits", "return_perf_metrics"),
    *("return_num_input_tokens", "return_num_output_tokens", "num_return_sequences", "beam_width"),
    *("prompt_embedding_table", "prompt_vocab_size", "lora_task_id", "lora_weights", "lora_config"),
    *("guided_decoding_guide_type", "guided_decoding_guide"),
)
TO_ENGINE = {name: name for name in _SAME_NAME} | {
    "top_k": "runtime_top_k",
    "top_p": "runtime_top_p",
    "length_penalty": "len_penalty",
}
# NVIDIA/TensorRT-LLM triton_backend/inflight_batcher_llm/src/utils.cc @c8c6df08: what a guide may be.
_ANY_JSON = "json"
_GUIDES = (_ANY_JSON, "json_schema", "regex", "ebnf_grammar")
_COUNTS = ("beam_width", "num_return_sequences")
# Every round of drafts is a request of its own to the engine: what belongs to a whole answer is lost between them.
_NOT_WITH_DRAFTS = (
    *(*_COUNTS, "return_context_logits", "return_generation_logits"),
    *("lora_task_id", "lora_weights", "lora_config", "guided_decoding_guide_type", "guided_decoding_guide"),
    *("prompt_embedding_table", "prompt_vocab_size"),
)
# From preprocessing to the engine.
PREPARED = {
    "INPUT_ID": "input_ids",
    "REQUEST_INPUT_LEN": "input_lengths",
    "REQUEST_OUTPUT_LEN": "request_output_len",
    "STOP_WORDS_IDS": "stop_words_list",
    "BAD_WORDS_IDS": "bad_words_list",
    "EMBEDDING_BIAS": "embedding_bias",
    "OUT_END_ID": "end_id",
    "OUT_PAD_ID": "pad_id",
}
# Which of the engine's outputs a flag of the request asks for.
ASKED_BY: dict[str, tuple[str, ...]] = {
    "return_log_probs": ("cum_log_probs", "output_log_probs"),
    "return_context_logits": ("context_logits",),
    "return_generation_logits": ("generation_logits",),
    "return_perf_metrics": tuple(PERF_METRICS),
    "return_num_input_tokens": ("num_input_tokens",),
    "return_num_output_tokens": ("num_output_tokens",),
}


@dataclass(frozen=True, slots=True)
class Question:
    """One request, taken apart."""

    text: str | None
    stream: bool
    echo: bool
    min_tokens: int
    stop_words: tuple[str, ...]
    to_preprocessing: dict[str, Array]
    to_engine: dict[str, Array]
    engine_outputs: tuple[str, ...] = field(default=())
    draft_tokens: int = 0
    use_draft_logits: bool = False


def parse(
    inputs: Inputs, *, streaming: bool, draft_tokens: int = 0, declared: frozenset[str] | None = None
) -> Question:
    """The request that these tensors describe.

    Args:
        inputs: by name, as Triton hands them over.
        streaming: whether this model may stream.
        draft_tokens: how many tokens the draft model may propose at a time; 0 where there is none.
        declared: this model's outputs, where the backend of an older release has fewer; None for all.

    Raises:
        BadRequestError: an input is malformed, or asks for what this model does not do.
    """
    one_prompt(inputs)
    _guide(inputs)
    drafted = _draft_tokens(inputs, draft_tokens)
    if filled(inputs.get("image_input")):
        raise BadRequestError("image_input: this model reads text only; send the request without it")
    stream = flag(inputs, "stream")
    if stream and not streaming:
        raise BadRequestError("stream: this model was built without it (serving.streaming: false); send false")
    asked = tuple(name for asking, names in ASKED_BY.items() if flag(inputs, asking) for name in names)
    asked = tuple(name for name in asked if declared is None or name in declared)
    return Question(
        text=text(inputs, "text_input") if filled(inputs.get("text_input")) else None,
        stream=stream,
        echo=not flag(inputs, "exclude_input_in_output", default=True),
        min_tokens=whole(inputs, "min_tokens") or 0,
        stop_words=_stop_words(inputs),
        to_preprocessing=_rows(renamed(inputs, TO_PREPROCESSING)),
        to_engine=_rows(renamed(inputs, TO_ENGINE)),
        engine_outputs=("output_ids", "sequence_length", *asked),
        draft_tokens=drafted,
        use_draft_logits=_draft_logits(inputs, drafted),
    )


def refuse_missing(inputs: Inputs, names: Sequence[str]) -> None:
    """Refuse what the backend of an older release does not have and would never hear of.

    Raises:
        BadRequestError: an input asks for it.
    """
    for name in names:
        if _asks(inputs, name):
            raise BadRequestError(f"{name}: the backend of this package's TensorRT-LLM has no such input; leave it out")


def _guide(inputs: Inputs) -> None:
    """Refuse a guide that the engine would pass over in silence (`getGuidedDecodingParamsFromTensors`)."""
    kind, guide = (
        text(inputs, name) if _asks(inputs, name) else None
        for name in ("guided_decoding_guide_type", "guided_decoding_guide")
    )
    if kind is None and guide is not None:
        raise BadRequestError(f"guided_decoding_guide: comes without a type; send one of {', '.join(_GUIDES)}")
    if kind is not None and kind not in _GUIDES:
        raise BadRequestError(f"guided_decoding_guide_type: {kind!r} is unknown; send one of {', '.join(_GUIDES)}")
    if kind is not None and kind != _ANY_JSON and guide is None:
        raise BadRequestError(f"guided_decoding_guide: {kind} needs one; send it, or the type {_ANY_JSON}")


def _draft_tokens(inputs: Inputs, most: int) -> int:
    """How many tokens are drafted at a time: what the request says, else as many as the engine verifies.

    A request that says nothing and asks for what does not go with drafts is answered without them.
    """
    wanted = whole(inputs, "num_draft_tokens")
    if wanted and not most:
        raise BadRequestError(
            "num_draft_tokens: this package has no draft model (tensorrt_llm_draft_model_name); send 0 or leave it out"
        )
    if wanted is not None and not 0 <= wanted <= most:
        raise BadRequestError(f"num_draft_tokens: {wanted} is out of range; ask for 0 to {most}")
    against = next((name for name in _NOT_WITH_DRAFTS if _asks(inputs, name)), None)
    if against is None:
        return most if wanted is None else wanted
    if wanted:
        raise BadRequestError(f"{against}: does not go together with drafts; send num_draft_tokens 0, or leave it out")
    return 0


def _draft_logits(inputs: Inputs, drafted: int) -> bool:
    """Whether the draft model's logits go to the engine with its tokens."""
    wanted = flag(inputs, "use_draft_logits")
    if wanted and not drafted:
        raise BadRequestError("use_draft_logits: nothing is drafted for this request; send false or leave it out")
    return wanted


def _asks(inputs: Inputs, name: str) -> bool:
    """Whether an input asks for something: more than one, true, a text, any array; clients send defaults along."""
    array = inputs.get(name)
    if array is None or not array.size:
        return False
    if name in _COUNTS:
        return whole(inputs, name) != 1
    if array.dtype == np.object_:
        return any(text not in (b"", "") for text in array.reshape(-1))
    return bool(array.any()) if array.dtype == np.bool_ else True


def _stop_words(inputs: Inputs) -> tuple[str, ...]:
    """Empty ones are dropped: upstream's clients send one where they mean none."""
    array = inputs.get("stop_words")
    if array is None:
        return ()
    kept = [word for word in array.reshape(-1) if word not in (b"", "")]
    return words({"stop_words": np.array(kept, dtype=np.object_)}, "stop_words")


def _rows(inputs: dict[str, Array]) -> dict[str, Array]:
    """With the batch dimension that a `reshape` in config.pbtxt took away."""
    return {name: array.reshape(1, -1) if array.ndim < 2 else array for name, array in inputs.items() if array.size}
