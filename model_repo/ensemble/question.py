"""A request of `tensorrt_llm_bls`: which of its tensors go to which model, and what this model reads itself."""

from __future__ import annotations

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


def parse(inputs: Inputs, *, streaming: bool) -> Question:
    """The request that these tensors describe; `streaming` says whether this model may stream.

    Raises:
        BadRequestError: an input is malformed, or asks for what this model does not do.
    """
    one_prompt(inputs)
    if whole(inputs, "num_draft_tokens"):
        raise BadRequestError(
            "num_draft_tokens: this package has no draft model (tensorrt_llm_draft_model_name); send 0 or leave it out"
        )
    if flag(inputs, "use_draft_logits"):
        raise BadRequestError("use_draft_logits: this package has no draft model; send false or leave it out")
    if filled(inputs.get("image_input")):
        raise BadRequestError("image_input: this model reads text only; send the request without it")
    stream = flag(inputs, "stream")
    if stream and not streaming:
        raise BadRequestError("stream: this model was built without it (serving.streaming: false); send false")
    asked = tuple(name for asking, names in ASKED_BY.items() if flag(inputs, asking) for name in names)
    return Question(
        text=text(inputs, "text_input") if filled(inputs.get("text_input")) else None,
        stream=stream,
        echo=not flag(inputs, "exclude_input_in_output", default=True),
        min_tokens=whole(inputs, "min_tokens") or 0,
        stop_words=_stop_words(inputs),
        to_preprocessing=_rows(renamed(inputs, TO_PREPROCESSING)),
        to_engine=_rows(renamed(inputs, TO_ENGINE)),
        engine_outputs=("output_ids", "sequence_length", *asked),
    )


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
