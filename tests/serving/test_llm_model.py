"""The Triton model against a scripted engine: what is sent, when it ends, what reaches the engine. No server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_triton import Request
from llm_helpers import arrays
from model_repo.llm.backend_embedded import Gauges
from model_repo.llm.contract import Limits, Sampling
from model_repo.llm.model import TritonPythonModel
from model_repo.llm.sender import Sender
from model_repo.llm.text import Codec
from model_repo.llm.wire import OUTPUTS, BadRequestError


def output(
    *ids: int, finish: str | None = None, stop: int | None = None, error: Exception | None = None, **more: Any
) -> Any:
    base = {
        "token_ids": ids, "logprobs": None, "prompt_logprobs": None, "finished": finish is not None,
        "finish_reason": finish, "stop_reason": stop, "error": error, "metrics": None,
    }  # fmt: skip
    return SimpleNamespace(**base | more)


class ScriptedBackend:
    """Submits nothing by itself: the test plays the engine through `speak`."""

    def __init__(self) -> None:
        self.refused: dict[str, str] = {}
        self.submitted: list[tuple[list[int], Sampling, list[list[int]]]] = []
        self.listeners: list[Callable[[Any], None]] = []
        self.cancelled: list[int] = []
        self.refuse: str | None = None
        self.closed = False
        self.asked = threading.Event()

    def submit(self, prompt: list[int], sampling: Sampling, bad_words: list[list[int]], on_output: Any) -> Any:
        if self.refuse:
            raise BadRequestError(self.refuse)
        self.submitted.append((prompt, sampling, bad_words))
        self.listeners.append(on_output)
        number = len(self.listeners) - 1

        def cancel() -> None:
            self.cancelled.append(number)
            self.asked.set()

        return SimpleNamespace(cancel=cancel)

    def gauges(self) -> Gauges:
        return Gauges(max_blocks=4, used_blocks=1, free_blocks=3, reusable_blocks=0, running=1, waiting=0)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture
def model(tokenizer: Any, backend: ScriptedBackend) -> Iterator[TritonPythonModel]:
    made = TritonPythonModel()
    limits = Limits(max_seq_len=200, max_input_tokens=150, max_output_tokens=100, default_max_tokens=16, streaming=True)
    made.start(limits, Codec(tokenizer, 150), backend, Sender(backend, model_name="m", check_period_s=0.02))
    yield made
    made._sender.close()


def send(model: TritonPythonModel, request_id: str = "", **inputs: Any) -> Any:
    request = Request(arrays(**inputs), outputs=list(OUTPUTS), request_id=request_id)
    model.execute([request])
    return request.sender


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def test_a_stream_sends_deltas_and_ends_with_its_last_token(
    model: TritonPythonModel, backend: ScriptedBackend, tokenizer: Any
) -> None:
    sender = send(model, text_input="hello", streaming=True, return_finish_reason=True, return_stop_reason=True)
    tokens = ids(tokenizer, "é 👩‍🚀!")
    for token in tokens[:-1]:
        backend.listeners[0](output(token))
    backend.listeners[0](output(tokens[-1], finish="length"))
    responses = sender.wait()
    assert sender.text() == "é 👩‍🚀!"
    assert [token for response in responses for token in response.values["output_ids"].tolist()] == tokens
    assert [("finish_reason" in response.values) for response in responses] == [False] * (len(responses) - 1) + [True]
    assert responses[-1].values["finish_reason"].tolist() == [b"length"]
    assert responses[-1].values["stop_reason"].tolist() == [b""]
    assert responses[-1].values["num_input_tokens"].tolist() == [len(ids(tokenizer, "hello"))]
    assert responses[-1].values["num_output_tokens"].tolist() == [len(tokens)]


def test_cumulative_streams_repeat_the_text_so_far(
    model: TritonPythonModel, backend: ScriptedBackend, tokenizer: Any
) -> None:
    sender = send(model, text_input="x", streaming=True, streaming_cumulative=True)
    tokens = ids(tokenizer, "abc")
    for number, token in enumerate(tokens):
        backend.listeners[0](output(token, finish="length" if number == len(tokens) - 1 else None))
    last = sender.wait()[-1]
    assert last.values["text_output"].tolist() == [b"abc"]
    assert last.values["output_ids"].tolist() == tokens
    texts = [response.values["text_output"][0].decode() for response in sender.responses]
    assert all("abc".startswith(text) for text in texts)


def test_without_streaming_there_is_one_response(
    model: TritonPythonModel, backend: ScriptedBackend, tokenizer: Any
) -> None:
    sender = send(model, text_input="x", sampling_param_exclude_input_from_output=False)
    for token in ids(tokenizer, "abc"):
        backend.listeners[0](output(token))
    backend.listeners[0](output(2, finish="stop"))
    assert len(sender.wait()) == 1
    assert sender.text() == "xabc", "the prompt is asked for, the end-of-text token is no text"
    prompt = ids(tokenizer, "x")
    assert sender.responses[0].values["output_ids"].tolist() == [*prompt, *ids(tokenizer, "abc"), 2]
    assert sender.responses[0].values["num_output_tokens"].tolist() == [4]


def test_a_stop_string_cuts_the_text_and_ends_the_engine_s_work(
    model: TritonPythonModel, backend: ScriptedBackend, tokenizer: Any
) -> None:
    sender = send(
        model, text_input="x", streaming=True, sampling_param_stop=["lazy do"], return_stop_reason=True,
        return_finish_reason=True,
    )  # fmt: skip
    for token in ids(tokenizer, "The lazy lazy dog jumps"):
        backend.listeners[0](output(token))
    assert sender.wait()
    assert sender.text() == "The lazy "
    assert sender.responses[-1].values["stop_reason"].tolist() == [b"lazy do"]
    assert sender.responses[-1].values["finish_reason"].tolist() == [b"stop"]
    assert backend.asked.wait(5)
    assert backend.cancelled == [0]
    backend.listeners[0](output(finish="cancelled"))  # the engine's answer to that changes nothing
    assert len({id(response) for response in sender.responses}) == len(sender.responses)


def test_stop_strings_give_the_same_tokens_with_and_without_streaming(
    model: TritonPythonModel, backend: ScriptedBackend, tokenizer: Any
) -> None:
    results = []
    for streaming in (True, False):
        sender = send(model, text_input="x", streaming=streaming, sampling_param_stop=["jumps"])
        backend.listeners[-1](output(*ids(tokenizer, "The quick brown fox jumps over the lazy dog"), finish="length"))
        sender.wait()
        tokens = [token for response in sender.responses for token in response.values["output_ids"].tolist()]
        results.append((sender.text(), tokens))
    assert results[0] == results[1]
    assert results[0][0] == "The quick brown fox "


def test_a_named_stop_token_is_reported_but_is_no_text(
    model: TritonPythonModel, backend: ScriptedBackend, tokenizer: Any
) -> None:
    letter = ids(tokenizer, "b")[0]
    sender = send(model, text_input="x", sampling_param_stop_token_ids=[letter], return_stop_reason=True)
    assert backend.submitted[0][1].stop_token_ids == (letter,)
    backend.listeners[0](output(*ids(tokenizer, "a"), letter, finish="stop", stop=letter))
    sender.wait()
    assert sender.text() == "a"
    assert sender.responses[0].values["stop_reason"].tolist() == [str(letter).encode()]


def test_min_tokens_come_before_stop_strings(
    model: TritonPythonModel, backend: ScriptedBackend, tokenizer: Any
) -> None:
    sender = send(model, text_input="x", sampling_param_stop=["a"], sampling_param_min_tokens=2)
    letters = [ids(tokenizer, letter)[0] for letter in "abab"]
    backend.listeners[0](output(*letters, finish="length"))
    sender.wait()
    assert sender.text() == "ab", "the first a is within min_tokens, the second stops"


def test_several_answers_come_together(model: TritonPythonModel, backend: ScriptedBackend, tokenizer: Any) -> None:
    sender = send(model, text_input="x", sampling_param_n=2, return_finish_reason=True)
    backend.listeners[1](output(*ids(tokenizer, "bb"), finish="stop"))
    backend.listeners[0](output(*ids(tokenizer, "a"), finish="length"))
    values = sender.wait()[0].values
    assert len(sender.responses) == 1
    assert values["text_output"].tolist() == [b"a", b"b"]
    assert values["num_output_tokens"].tolist() == [len(ids(tokenizer, "a")), len(ids(tokenizer, "bb"))]
    assert values["finish_reason"].tolist() == [b"length", b"stop"]


def test_bad_words_reach_the_engine_with_and_without_a_space(
    model: TritonPythonModel, backend: ScriptedBackend, tokenizer: Any
) -> None:
    send(model, text_input="x", sampling_param_bad=["fox"])
    assert backend.submitted[0][2] == [ids(tokenizer, "fox"), ids(tokenizer, " fox")]


def test_logprobs_and_metrics_are_reported(model: TritonPythonModel, backend: ScriptedBackend, tokenizer: Any) -> None:
    sender = send(
        model, text_input="ab", streaming=True, sampling_param_logprobs=1, sampling_param_prompt_logprobs=0,
        return_cumulative_logprob=True, sampling_param_return_perf_metrics=True,
    )  # fmt: skip
    entry = SimpleNamespace(token_id=5, logprob=-0.25, rank=1, top=((5, -0.25),))
    metrics = SimpleNamespace(
        arrival_time_ns=1, first_scheduled_time_ns=2, first_token_time_ns=3, last_token_time_ns=2**40,
        kv_cache_reused_block=4, kv_cache_missed_block=5, kv_cache_alloc_new_blocks=6, kv_cache_alloc_total_blocks=7,
        kv_cache_hit_rate=0.5,
    )  # fmt: skip
    backend.listeners[0](output(5, logprobs=(entry,), prompt_logprobs=(None, entry)))
    backend.listeners[0](output(5, finish="length", logprobs=(entry,), metrics=metrics))
    values: dict[str, Any] = {}
    logprobs = []
    for response in sender.wait():
        logprobs += response.values["logprobs"].tolist()
        values |= response.values
    assert len(logprobs) == 2
    shown = b'{"token_id": 5, "logprob": -0.25, "rank": 1, "top": [{"token_id": 5, "logprob": -0.25}]}'
    assert values["prompt_logprobs"].tolist() == [b"null", shown]
    assert values["cumulative_logprob"].tolist() == [-0.5]
    assert values["last_token_time_ns"].tolist() == [2**40]
    assert values["last_token_time_ns"].dtype == np.int64
    assert values["kv_cache_hit_rate"].dtype == np.float32


def test_a_client_that_leaves_reaches_the_engine(model: TritonPythonModel, backend: ScriptedBackend) -> None:
    sender = send(model, text_input="x", streaming=True)
    backend.listeners[0](output(5))
    sender.gone = True
    assert backend.asked.wait(5), "the engine was told to stop"
    backend.listeners[0](output(finish="cancelled"))
    assert sender.wait()[-1].error.kind == "CANCELLED"


def test_a_request_that_waits_is_cancelled_too(model: TritonPythonModel, backend: ScriptedBackend) -> None:
    sender = send(model, text_input="x")
    sender.gone = True
    assert backend.asked.wait(5), "no token has come, and none will"


def test_stop_cancels_the_request_of_that_id_only(model: TritonPythonModel, backend: ScriptedBackend) -> None:
    first, second = (send(model, name, text_input="x", streaming=True) for name in ("one", "two"))
    answer = send(model, "two", stop=True).wait()
    assert answer[0].values["finish_reason"].tolist() == [b"cancelled"]
    assert backend.cancelled == [1]
    backend.listeners[1](output(finish="cancelled"))
    assert "stopped by a request with stop: true" in second.wait()[-1].error.text
    backend.listeners[0](output(5, finish="length"))
    assert first.wait()[-1].error is None


def test_stop_without_an_id_or_a_request_says_so(model: TritonPythonModel) -> None:
    assert "the request has no id" in send(model, stop=True).wait()[0].error.text
    unknown = send(model, "nobody", stop=True).wait()[0].error
    assert (unknown.kind, "no running request has the id 'nobody'" in unknown.text) == ("NOT_FOUND", True)


def test_an_engine_error_ends_the_request(model: TritonPythonModel, backend: ScriptedBackend) -> None:
    sender = send(model, text_input="x", streaming=True)
    backend.listeners[0](output(5))
    backend.listeners[0](output(finish="error", error=RuntimeError("the device is lost")))
    assert (sender.wait()[-1].error.kind, sender.responses[-1].error.text) == ("INTERNAL", "the device is lost")


def test_a_fault_of_our_own_still_ends_the_request(model: TritonPythonModel, backend: ScriptedBackend) -> None:
    sender = send(model, text_input="x", streaming=True)
    backend.listeners[0](output("no token"))  # type: ignore[arg-type]
    assert sender.wait()[-1].error.kind == "INTERNAL"
    assert backend.cancelled == [0], "and the engine does not go on for nobody"
    other = send(model, text_input="x")
    backend.listeners[1](output(5, finish="length"))
    assert other.wait()[-1].error is None, "the others' requests go on"


def test_a_refused_submission_is_an_invalid_argument(model: TritonPythonModel, backend: ScriptedBackend) -> None:
    backend.refuse = "sampling_param_top_k: -1 is out of range"
    error = send(model, text_input="x").wait()[0].error
    assert (error.kind, error.text) == ("INVALID_ARG", backend.refuse)


@pytest.mark.parametrize(
    ("inputs", "part"),
    [
        ({"text_input": "x" * 100_000}, "text_input: 100000 characters are more than the"),
        ({"text_input": "xyz " * 60}, "this model takes at most 150; shorten it"),
        ({"text_input": ""}, "the prompt holds no token"),
    ],
)  # fmt: skip
def test_prompts_are_measured_at_the_door(model: TritonPythonModel, inputs: dict[str, Any], part: str) -> None:
    error = send(model, **inputs).wait()[0].error
    assert error.kind == "INVALID_ARG"
    assert part in error.text


def test_chat_messages_go_through_the_template(
    model: TritonPythonModel, backend: ScriptedBackend, tokenizer: Any
) -> None:
    send(model, messages='[{"role": "user", "content": "hi"}]')
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert backend.submitted[0][0] == ids(tokenizer, text)
    assert backend.submitted[0][0][0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_unloading_ends_every_request(model: TritonPythonModel, backend: ScriptedBackend) -> None:
    sender = send(model, text_input="x", streaming=True)
    closer = threading.Thread(target=model.finalize)
    closer.start()
    assert backend.asked.wait(5)
    backend.listeners[0](output(finish="cancelled"))
    closer.join(10)
    assert backend.closed
    assert sender.wait()[-1].error.text == "the model is being unloaded"


def test_unloading_also_ends_a_request_that_the_sender_has_not_seen_yet(
    model: TritonPythonModel, backend: ScriptedBackend
) -> None:
    held = threading.Event()
    model._sender.post(lambda: bool(held.wait(5)))  # the sender is busy while the request comes and the model goes
    sender = send(model, text_input="x", streaming=True)
    closer = threading.Thread(target=model.finalize)
    closer.start()
    closer.join(0.2)
    held.set()
    assert backend.asked.wait(5)
    backend.listeners[0](output(finish="cancelled"))
    closer.join(10)
    assert sender.wait()[-1].error.text == "the model is being unloaded"
