"""Tensors in, a checked request out: every wrong input gets a sentence that names it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from llm_helpers import arrays
from model_repo.llm.backend_embedded import EmbeddedBackend
from model_repo.llm.contract import Generate, Guide, Limits, Lora, Sampling, max_tokens, parse
from model_repo.llm.wire import OUTPUTS, BadRequestError, logprob_json, refuse_misnamed, tensors

LIMITS = Limits(max_seq_len=100, max_input_tokens=60, max_output_tokens=80, default_max_tokens=16, streaming=True)


def read(limits: Limits = LIMITS, **inputs: Any) -> Generate:
    return parse(arrays(**inputs), limits, EmbeddedBackend.refused)


def test_every_field_arrives() -> None:
    request = read(
        text_input="hé", streaming=True, streaming_cumulative=True, return_finish_reason=True, return_stop_reason=True,
        return_cumulative_logprob=True, sampling_param_best_of=1, sampling_param_n=1, sampling_param_temperature=0.5,
        sampling_param_top_k=7, sampling_param_top_p=0.25, sampling_param_min_p=0.125,
        sampling_param_frequency_penalty=1.5, sampling_param_presence_penalty=-1.0,
        sampling_param_repetition_penalty=2.0, sampling_param_max_tokens=9, sampling_param_min_tokens=3,
        sampling_param_stop=["a", "👩"], sampling_param_stop_token_ids=[5, 6], sampling_param_bad=["x"],
        sampling_param_ignore_eos=True, sampling_param_seed=2**64 - 1, sampling_param_logprobs=2,
        sampling_param_prompt_logprobs=0, sampling_param_exclude_input_from_output=False,
        sampling_param_return_perf_metrics=True,
    )  # fmt: skip
    assert request == Generate(
        text="hé", messages=None, input_ids=None, stop=("a", "👩"), streaming=True, cumulative=True, echo=True,
        return_finish_reason=True, return_stop_reason=True, return_cumulative_logprob=True, return_perf_metrics=True,
        sampling=Sampling(
            max_tokens=9, min_tokens=3, temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, repetition_penalty=2.0,
            presence_penalty=-1.0, frequency_penalty=1.5, seed=2**64 - 1, ignore_eos=True, stop_token_ids=(5, 6),
            bad=("x",), logprobs=2, prompt_logprobs=0,
        ),
    )  # fmt: skip


def test_messages_keep_their_fields_and_join_text_parts() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts, "name": "me"}, {"role": "assistant", "content": "yes"}]
    assert read(messages=json.dumps(messages)).messages == [
        {"role": "user", "content": "one two", "name": "me"},
        {"role": "assistant", "content": "yes"},
    ]


def read_all(**inputs: Any) -> Generate:
    """As a runtime reads them that refuses nothing."""
    return parse(arrays(text_input="a", **inputs), LIMITS, {})


def test_adapters_and_guides_arrive() -> None:
    assert read_all(lora_name="formal").sampling.lora == Lora("formal")
    brought = read_all(lora_name="x", lora_id=2**40, lora_path="/adapters/x", lora_ckpt_source="nemo")
    assert brought.sampling.lora == Lora("x", 2**40, "/adapters/x", "nemo")
    assert read_all(guided_decoding_guide_type="json").sampling.guide == Guide("json")
    schema = '{"type": "object"}'
    found = read_all(guided_decoding_guide_type="json_schema", guided_decoding_guide=schema)
    assert found.sampling.guide == Guide("json_schema", schema)
    assert (read_all().sampling.lora, read_all().sampling.guide) == (None, None)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"lora_id": 1}, "lora_name: send it alone for an adapter of this package, or with lora_id and lora_path"),
        ({"lora_name": "x", "lora_path": "/x"}, "lora_name: send it alone"),
        ({"lora_name": "x", "lora_ckpt_source": "hf"}, "lora_name: send it alone"),
        (
            {"lora_name": "x", "lora_id": 1, "lora_path": "/x", "lora_ckpt_source": "zip"},
            "lora_ckpt_source: 'zip' is not known; send hf or nemo",
        ),
        ({"guided_decoding_guide": "x"}, "guided_decoding_guide: its type is missing"),
        (
            {"guided_decoding_guide_type": "xml"},
            "guided_decoding_guide_type: 'xml' is not known; send one of json, json",
        ),
        ({"guided_decoding_guide_type": "regex"}, "guided_decoding_guide: regex needs one; send it as text"),
        ({"guided_decoding_guide_type": "json", "guided_decoding_guide": "{}"}, "json takes no guide; leave it out"),
        ({"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": "{"}, "not valid JSON"),
        ({"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": "[]"}, "not a JSON object"),
    ],
)
def test_adapters_and_guides_that_do_not_add_up(inputs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        read_all(**inputs)
    assert sentence in str(caught.value)


def test_answers_to_one_seed_differ() -> None:
    request = read(input_ids=[1], sampling_param_seed=2**64 - 1, sampling_param_n=2, return_cumulative_logprob=True)
    sampling = [request.for_engine(10, choice) for choice in range(2)]
    assert [one.seed for one in sampling] == [2**64 - 1, 0]
    assert [(one.max_tokens, one.logprobs) for one in sampling] == [(10, 0)] * 2


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({}, "no prompt is given; send exactly one of text_input, messages, input_ids"),
        ({"text_input": "a", "input_ids": [1]}, "text_input and input_ids are given together; send exactly one of"),
        ({"text_input": ["a", "b"]}, "text_input: 2 elements are given; send exactly one"),
        ({"text_input": []}, "text_input: 0 elements are given; send exactly one"),
        ({"text_input": "a", "sampling_param_n": 0}, "sampling_param_n: 0 is out of range; ask for 1 to 64 answers"),
        ({"text_input": "a", "sampling_param_n": 2, "streaming": True}, "sampling_param_n: several answers cannot be"),
        ({"text_input": "a", "sampling_param_best_of": 2}, "sampling_param_best_of: 2 is not served; leave it out"),
        ({"text_input": "a", "sampling_param_stop": ["b", ""]}, "sampling_param_stop[1]: an empty string matches"),
        ({"text_input": "a", "lora_name": "x"}, "lora_name: this package was built without LoRA adapters; send the"),
        ({"text_input": "a", "lora_id": 3}, "lora_id: this package was built without LoRA adapters"),
        ({"text_input": "a", "guided_decoding_guide": "{}"}, "guided_decoding_guide: the embedded engine does no"),
        ({"text_input": "a", "guided_decoding_guide_type": "json"}, "guided_decoding_guide_type: the embedded engine"),
        ({"text_input": "a", "image_url": ["http://x"]}, "image_url: this model reads text only"),
        ({"text_input": "a", "sampling_param_logits_post_processor_name": "p"}, "sampling_param_logits_post_proc"),
        ({"messages": "["}, "messages: not valid JSON"),
        ({"messages": "{}"}, "messages: not a list with at least one message; send a JSON list such as"),
        ({"messages": "[]"}, "messages: not a list with at least one message"),
        ({"messages": '["hi"]'}, "messages[0]: not an object with a role"),
        ({"messages": '[{"role": "user", "content": 5}]'}, "messages[0].content: neither text nor a list of text"),
        ({"messages": '[{"role": "user", "content": [{"type": "image_url"}]}]'}, "messages[0].content[0]: this model"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_named(inputs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadRequestError) as raised:
        read(**inputs)
    assert str(raised.value).startswith(sentence)


def test_text_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(BadRequestError, match=r"text_input: byte 1 is not valid UTF-8; send UTF-8 text"):
        parse({"text_input": np.array([b"a\xff"], dtype=object)}, LIMITS, {})


def test_a_model_without_streaming_says_so() -> None:
    limits = Limits(max_seq_len=9, max_input_tokens=8, max_output_tokens=8, default_max_tokens=4, streaming=False)
    with pytest.raises(BadRequestError, match=r"streaming: this model was built without it \(serving.streaming: false"):
        read(limits, text_input="a", streaming=True)
    assert not read(limits, text_input="a", streaming=False).streaming


@pytest.mark.parametrize(
    ("asked", "prompt", "room"), [(None, 10, 16), (None, 60, 16), (None, 90, None), (80, 20, 80), (1, 60, 1)]
)
def test_room_for_the_answer(asked: int | None, prompt: int, room: int | None) -> None:
    inputs = {"text_input": "a"} | ({} if asked is None else {"sampling_param_max_tokens": asked})
    if room is None:
        with pytest.raises(BadRequestError, match="the prompt has 90 tokens and this model takes at most 60; shorten"):
            max_tokens(read(**inputs), prompt, LIMITS)
    else:
        assert max_tokens(read(**inputs), prompt, LIMITS) == room


@pytest.mark.parametrize(
    ("asked", "prompt", "sentence"),
    [
        (0, 5, "sampling_param_max_tokens: 0 is out of range; ask for 1 to 80 tokens"),
        (-1, 5, "sampling_param_max_tokens: -1 is out of range; ask for 1 to 80 tokens"),
        (81, 5, "sampling_param_max_tokens: 81 is out of range; ask for 1 to 80 tokens"),
        (70, 40, "sampling_param_max_tokens: 70 after a prompt of 40 tokens exceeds the model's sequence length 100; "),
        (5, 0, "the prompt holds no token; send some text"),
    ],
)  # fmt: skip
def test_too_many_tokens_are_refused_at_the_door(asked: int, prompt: int, sentence: str) -> None:
    with pytest.raises(BadRequestError) as raised:
        max_tokens(read(text_input="a", sampling_param_max_tokens=asked), prompt, LIMITS)
    assert str(raised.value).startswith(sentence)
    assert str(raised.value).endswith(("tokens", "shorten the prompt", "send some text"))


def test_outputs_have_their_declared_types() -> None:
    values = {"text_output": ["é"], "output_ids": [1, 2], "cumulative_logprob": [-1.5], "arrival_time_ns": [2**40]}
    made = dict(tensors(values, frozenset(OUTPUTS)))
    assert made["text_output"].tolist() == ["é".encode()]
    assert [made[name].dtype for name in ("output_ids", "cumulative_logprob", "arrival_time_ns")] == [
        np.int32, np.float32, np.int64
    ]  # fmt: skip
    assert [name for name, _ in tensors(values, frozenset({"output_ids"}))] == ["output_ids"]


def test_logprobs_are_json_even_when_infinite() -> None:
    entry = json.loads(logprob_json(7, float("-inf"), 3, [(8, -0.5), (9, float("-inf"))]))
    top = [{"token_id": 8, "logprob": -0.5}, {"token_id": 9, "logprob": None}]
    assert entry == {"token_id": 7, "logprob": None, "rank": 3, "top": top}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"sampling_param_temprature": 1}, "this model has no such input; did you mean sampling_param_temperature?"),
        ({"max_tokens": 5}, "max_tokens: this model has no such input; did you mean sampling_param_max_tokens?"),
        ({"text_inputs": "x"}, "text_inputs: this model has no such input; did you mean text_input?"),
        ({"sampling_param_quux": 1}, "sampling_param_quux: this model has no such input; see the model's metadata"),
    ],
)  # fmt: skip
def test_misspelled_inputs_are_refused(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        refuse_misnamed(json.dumps(given))
    assert sentence in str(caught.value)


def test_other_parameters_of_a_request_are_left_alone() -> None:
    refuse_misnamed("")
    refuse_misnamed('{"id": "7", "traceparent": "00-1", "priority": 1, "binary_data_output": false}')
