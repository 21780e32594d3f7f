"""Layout `ensemble` in the real Triton: the five models over the engine of the tiny package, beside layout `llm`.

One server holds both repositories' models under one roof, so that answers can be compared request by request.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llm_helpers import ENGINE as ENGINE_JSON
from llm_helpers import gauge, spec
from restarting import RestartingServer

from trtbuild.adapters.triton import check_repository, render_repository
from trtbuild.errors import RequestError, TrtbuildError
from trtbuild.serving.client import Answer, ask
from trtbuild.serving.contract import ENGINE, ENSEMBLE
from trtbuild.serving.discovery import find_layout
from trtbuild.serving.server import TritonServer
from trtbuild.serving.verify import compare_ensemble

pytestmark = [pytest.mark.triton, pytest.mark.bls]
KV, REQUESTS = "nv_trt_llm_kv_cache_block_metrics", "nv_trt_llm_request_metrics"
CHAINS = ("ensemble", "tensorrt_llm_bls")


@pytest.fixture(scope="module")
def five(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with the repository of layout `ensemble`."""
    root = tmp_path_factory.mktemp("five")
    shutil.copytree(package / "engine", root / "engine")
    render_repository(spec(layout="ensemble", max_batch_size=8), root / "model_repository")
    return root


@pytest.fixture(scope="module")
def served(five: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestartingServer]:
    log = tmp_path_factory.mktemp("served") / "triton.log"
    with RestartingServer(five / "model_repository", log) as running:
        yield running


def chain(served: RestartingServer, prompt: Any, **inputs: Any) -> Answer:
    """One request to both chains in every way that a client can send it; all answers must be one."""
    ways = [(served.http_url, False), (served.http_url, True), (served.grpc_url, False), (served.grpc_url, True)]
    found = {
        (model, url, streaming): ask(
            url, prompt, model=model, layout=ENSEMBLE, streaming=streaming, timeout_s=60, **inputs
        )
        for model in CHAINS
        for url, streaming in ways
    }
    texts = {answer.text for answer in found.values()}
    assert len(texts) == 1, {key: answer.text for key, answer in found.items()}
    return found["tensorrt_llm_bls", served.grpc_url, True]


def wait_for(served: RestartingServer, family: str, kind: str, value: float, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while gauge(served, family, kind) != value:
        assert time.monotonic() < deadline, f"{kind} is {gauge(served, family, kind)}, not {value}"
        time.sleep(0.05)


def post(served: RestartingServer, model: str, body: Any, *, raw: bytes | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(served.address, served.ports.http, timeout=60)
    try:
        data = json.dumps(body).encode() if raw is None else raw
        connection.request("POST", f"/v2/models/{model}/generate", data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


@pytest.mark.parametrize("text", ["hello", "The quick brown fox", "é 漢 👩‍🚀"])
def test_texts_are_those_of_layout_llm(served: RestartingServer, server: TritonServer, text: str) -> None:
    expected = ask(server.http_url, text, streaming=False, max_tokens=40)
    found = chain(served, text, max_tokens=40)
    assert found.text == expected.text
    assert (found.num_input_tokens, found.num_output_tokens) == (expected.num_input_tokens, 40)
    assert found.responses > 1


def test_chat_messages_and_the_default_length(served: RestartingServer, server: TritonServer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert chain(served, messages).text == ask(server.http_url, messages, streaming=False).text


@pytest.mark.parametrize("seed", range(2))
def test_streamed_text_is_the_whole_text_for_random_tokens(
    served: RestartingServer, server: TritonServer, seed: int
) -> None:
    """Sampled at a high temperature, a byte-level model speaks mostly broken and half characters."""
    asked = {"max_tokens": 120, "temperature": 3.0, "seed": seed}
    expected = ask(server.http_url, "ab", streaming=False, ignore_eos=True, **asked)
    assert "\ufffd" in expected.text
    assert chain(served, "ab", end_id=-1, **asked).text == expected.text


def test_an_own_end_token_ends_the_answer_and_is_no_part_of_it(served: RestartingServer, server: TritonServer) -> None:
    whole = ask(server.http_url, "hello", streaming=False, max_tokens=30, ignore_eos=True)
    token = whole.output_ids[9]
    expected = ask(server.http_url, "hello", streaming=False, max_tokens=30, ignore_eos=True, stop_token_ids=[token])
    found = chain(served, "hello", max_tokens=30, end_id=token)
    assert found.text == expected.text
    assert found.num_output_tokens == whole.output_ids.index(token)


def test_stop_words_end_the_answer_and_stay_in_it(served: RestartingServer, server: TritonServer) -> None:
    """Found in the text, wherever the tokens divide it; empty words mean nothing, as for upstream's clients."""
    whole = ask(server.http_url, "hello", streaming=False, max_tokens=60)
    place = next(at for at in range(10, len(whole.text) - 3) if "\ufffd" not in whole.text[at : at + 3])
    stop = whole.text[place : place + 3]
    expected = whole.text[: whole.text.find(stop) + len(stop)]
    for url, streaming in ((served.http_url, False), (served.http_url, True), (served.grpc_url, True)):
        found = ask(
            url, "hello", model="tensorrt_llm_bls", layout=ENSEMBLE, streaming=streaming, max_tokens=300,
            stop_words=["never there", "", stop], timeout_s=60,
        )  # fmt: skip
        assert found.text == expected
        assert found.num_output_tokens < 300  # the engine was told before it had them all
    wait_for(served, KV, "used", 0)


def test_a_stop_word_of_whole_tokens_ends_both_chains_alike(
    served: RestartingServer, server: TritonServer, tokenizer: Any
) -> None:
    whole = ask(server.http_url, "hello", streaming=False, max_tokens=40, ignore_eos=True)
    word = next(
        text
        for token in whole.output_ids[3:]
        if "\ufffd" not in (text := tokenizer.decode([token])) and tokenizer.encode(text) == [token]
    )
    found = chain(served, "hello", max_tokens=40, stop_words=[word])
    assert found.text == whole.text[: whole.text.find(word) + len(word)]


def test_bad_words_are_never_said(served: RestartingServer, server: TritonServer) -> None:
    word = "ken"
    assert word in ask(server.http_url, "hello", streaming=False, max_tokens=24).text
    expected = ask(server.http_url, "hello", streaming=False, max_tokens=24, sampling_param_bad=[word])
    found = chain(served, "hello", max_tokens=24, bad_words=[word])
    assert found.text == expected.text
    assert word not in found.text


def test_log_probabilities_and_metrics_are_numbers(served: RestartingServer, server: TritonServer) -> None:
    expected = ask(server.http_url, "hello", streaming=False, max_tokens=6, logprobs=0, return_cumulative_logprob=True)
    wanted = [entry["logprob"] for entry in expected.logprobs]
    for model in CHAINS:
        for streaming in (False, True):
            found = ask(
                served.http_url, "hello", model=model, layout=ENSEMBLE, streaming=streaming, max_tokens=6,
                return_log_probs=True, return_perf_metrics=True,
            )  # fmt: skip
            assert found.cumulative_logprob == pytest.approx(expected.cumulative_logprob, rel=1e-5)
            last = found.outputs["output_log_probs"]
            assert (last if isinstance(last, list) else [last]) == pytest.approx(wanted[-1:] if streaming else wanted)
            times = [found.outputs[name] for name in ("arrival_time_ns", "first_token_time_ns", "last_token_time_ns")]
            assert times == sorted(times)
            assert all(isinstance(value, int) for value in times)
            assert found.outputs["kv_cache_alloc_total_blocks"] >= 1
            assert isinstance(found.outputs["acceptance_rate"], float)
    plain = post(served, "ensemble", {"text_input": "hello", "max_tokens": 2})[1]
    assert not {"cum_log_probs", "output_log_probs", "arrival_time_ns", "context_logits"} & set(plain)


def test_the_prompt_is_echoed_where_asked_for(served: RestartingServer) -> None:
    text = "emoji 👩‍🚀, e\u0301, 漢字, العربية"
    plain = chain(served, text, max_tokens=8)
    echoed = chain(served, text, max_tokens=8, exclude_input_in_output=False)
    assert echoed.text == text + plain.text
    assert echoed.num_output_tokens == plain.num_output_tokens == 8


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"max_tokens": 2}, "no prompt is given; send exactly one of text_input and messages"),
        ({"prompt": "a", "messages": "[]"}, "text_input and messages are given together"),
        ({"prompt": [{"content": "x"}]}, "messages[0]: not an object with a role"),
        ({"prompt": "word " * 500}, "this model takes 1 to 400; shorten it"),
        ({"prompt": "a" * 200_000}, "text_input: 200000 characters are more than"),
        ({"prompt": "a " * 240, "max_tokens": 300}, "max_tokens: 300 after a prompt of 241 tokens exceeds the model's"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens: 0 is out of range; ask for 1 to 300 tokens"),
        ({"prompt": "a", "max_tokens": 301}, "max_tokens: 301 is out of range; ask for 1 to 300"),
        ({"prompt": "a", "temperature": -0.5}, "temperature: -0.5 is out of range"),
        ({"prompt": "a", "top_p": 1.5}, "top_p: 1.5 is out of range"),
        ({"prompt": "a", "top_k": -1}, "top_k: -1 is out of range"),
        ({"prompt": "a", "min_tokens": 50, "max_tokens": 4}, "min_tokens: 50 is out of range"),
        ({"prompt": "a", "beam_width": 4}, "beam_width: the embedded engine has no beam search; send 1"),
        ({"prompt": "a", "num_return_sequences": 2}, "num_return_sequences: one answer a request is served"),
        ({"prompt": "a", "return_context_logits": True}, "return_context_logits: the embedded engine returns log-prob"),
        ({"prompt": "a", "lora_task_id": 3}, "lora_task_id: this package was built without LoRA adapters"),
        (
            {"prompt": "a", "guided_decoding_guide_type": "json"},
            "guided_decoding_guide_type: the embedded engine does no guided",
        ),
        (
            {"prompt": "a", "embedding_bias_words": ["x"], "embedding_bias_weights": [1.0]},
            "embedding_bias: the embedded engine adds nothing to logits by token",
        ),
        ({"prompt": "a", "embedding_bias_weights": [1.0]}, "embedding_bias_weights: 1 weights for 0 embedding_bias"),
    ],
)
def test_wrong_requests_get_a_sentence(served: RestartingServer, inputs: dict[str, Any], sentence: str) -> None:
    for model in CHAINS:
        for url, streaming in ((served.grpc_url, True), (served.http_url, False)):
            with pytest.raises(RequestError) as caught:
                ask(url, model=model, layout=ENSEMBLE, streaming=streaming, timeout_s=60, **inputs)
            assert sentence in str(caught.value)


def test_draft_decoding_is_refused_by_name(served: RestartingServer) -> None:
    with pytest.raises(RequestError, match="num_draft_tokens: this package has no draft model"):
        ask(served.grpc_url, "a", model="tensorrt_llm_bls", layout=ENSEMBLE, num_draft_tokens=3)


@pytest.mark.parametrize("model", CHAINS)
@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'{"text_input": 5, "max_tokens": 2}',
        b'{"text_input": "a", "max_tokens": "many"}',
        b'{"text_input": "a", "stream": "yes"}',
        b'{"text_input": ["a", "b"], "max_tokens": 2}',
        b"\xff\xfe",
    ],
)
def test_malformed_requests_harm_nobody(served: RestartingServer, model: str, body: bytes) -> None:
    status, answer = post(served, model, None, raw=body)
    assert status >= 400
    assert answer["error"]
    assert post(served, model, {"text_input": "hello", "max_tokens": 2})[0] == 200


def engine_request(served: RestartingServer, inputs: dict[str, Any], request_id: str = "") -> list[dict[str, Any]]:
    """The responses of `tensorrt_llm` to raw tensors over gRPC."""
    import queue

    import tritonclient.grpc as triton

    received: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with contextlib.closing(triton.InferenceServerClient(served.grpc_url)) as client:
        client.start_stream(lambda result, error: received.put((result, error)))
        tensors = []
        for name, (kind, value) in inputs.items():
            array = np.array(value, dtype={"INT32": np.int32, "BOOL": np.bool_, "FP32": np.float32}[kind])
            tensor = triton.InferInput(name, list(array.shape), kind)
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        client.async_stream_infer("tensorrt_llm", tensors, request_id=request_id, enable_empty_final_response=True)
        found = []
        while True:
            result, error = received.get(timeout=60)
            if error is not None:
                raise RequestError(str(error.message()))
            message = result.get_response()
            found.append({output.name: result.as_numpy(output.name).tolist() for output in message.outputs})
            if message.parameters["triton_final_response"].bool_param:
                return found


PROMPT: dict[str, Any] = {
    "input_ids": ("INT32", [[5, 6, 7]]), "input_lengths": ("INT32", [[3]]), "request_output_len": ("INT32", [[8]]),
}  # fmt: skip


def test_the_engine_model_takes_and_gives_token_ids(served: RestartingServer, server: TritonServer) -> None:
    expected = ask(server.http_url, streaming=False, input_ids=[5, 6, 7], max_tokens=8)
    for url, streaming in ((served.http_url, False), (served.grpc_url, True)):
        found = ask(url, model="tensorrt_llm", layout=ENGINE, streaming=streaming, input_ids=[5, 6, 7], max_tokens=8)
        assert found.output_ids == expected.output_ids
    (whole,) = engine_request(served, PROMPT | {"return_num_input_tokens": ("BOOL", [[True]])})
    assert whole["output_ids"] == [[list(expected.output_ids)]]
    assert whole["sequence_length"] == [[8]]
    assert whole["num_input_tokens"] == [[3]]
    echoed = engine_request(served, PROMPT | {"exclude_input_in_output": ("BOOL", [[False]])})
    assert echoed[0]["output_ids"] == [[[5, 6, 7, *expected.output_ids]]]
    stopped = engine_request(
        served, PROMPT | {"stop_words_list": ("INT32", [[[1, 2, *expected.output_ids[2:4]], [2, 4, -1, -1]]])}
    )
    assert stopped[0]["output_ids"] == [[list(expected.output_ids[:4])]]


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"draft_input_ids": ("INT32", [[1, 2]])}, "draft_input_ids: the embedded engine verifies no draft tokens"),
        ({"input_lengths": ("INT32", [[9]])}, "input_lengths: 9 for 3 input_ids"),
        ({"request_output_len": ("INT32", [[0]])}, "request_output_len: 0 after a prompt of 3 tokens is out of range"),
        ({"input_ids": ("INT32", [[5, 6, 900]])}, "input_ids[2]: 900 is no token of this model"),
        ({"stop_words_list": ("INT32", [[[1, 2], [2, 1]]])}, "stop_words_list: the ends [2, 1] do not rise"),
        ({"runtime_top_p_decay": ("FP32", [[0.5]])}, "runtime_top_p_decay: the embedded engine keeps top_p as it is"),
        ({"lookahead_window_size": ("INT32", [[3]])}, "lookahead_window_size: the embedded engine has no lookahead"),
        ({"stop": ("BOOL", [[True]])}, "stop: the request has no id"),
    ],
)
def test_the_engine_model_refuses_by_name(served: RestartingServer, inputs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError) as caught:
        engine_request(served, PROMPT | inputs)
    assert sentence in str(caught.value)


def test_stop_ends_the_request_of_that_id_and_no_other(served: RestartingServer) -> None:
    long = PROMPT | {
        "request_output_len": ("INT32", [[300]]), "end_id": ("INT32", [[-1]]), "streaming": ("BOOL", [[True]]),
    }  # fmt: skip
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = pool.submit(engine_request, served, long, "mine")
        wait_for(served, REQUESTS, "active", 1)
        assert engine_request(served, PROMPT | {"stop": ("BOOL", [[True]])}, "other") == [{}]
        assert engine_request(served, PROMPT | {"stop": ("BOOL", [[True]])}, "mine") == [{}]
        responses = running.result()
    assert responses[-1]["finished"] == [[True]], "an ordinary end, as upstream's executor gives it"
    assert sum(len(response["output_ids"][0][0]) for response in responses) < 300
    wait_for(served, KV, "used", 0)


LONG = {"text_input": "hello", "stream": True, "max_tokens": 300, "end_id": -1}


def test_a_client_that_disconnects_from_bls_frees_the_blocks(served: RestartingServer) -> None:
    wait_for(served, KV, "used", 0)
    for _ in range(3):
        connection = http.client.HTTPConnection(served.address, served.ports.http, timeout=60)
        path = "/v2/models/tensorrt_llm_bls/generate_stream"
        connection.request("POST", path, json.dumps(LONG), {"Content-Type": "application/json"})
        assert next(line for line in connection.getresponse() if line.startswith(b"data:"))
        connection.close()
    wait_for(served, REQUESTS, "active", 0)
    wait_for(served, KV, "used", 0)
    wait_for(served, KV, "free", gauge(served, KV, "max"))  # the gauges are set one after another


def test_clients_that_leave_use_up_none_of_the_threads(served: RestartingServer) -> None:
    """More of them than the model has threads, which is twice its batch size."""
    for lines in range(20):
        connection = http.client.HTTPConnection(served.address, served.ports.http, timeout=20)
        path = "/v2/models/tensorrt_llm_bls/generate_stream"
        connection.request("POST", path, json.dumps(LONG), {"Content-Type": "application/json"})
        response = connection.getresponse()
        for _ in range(lines % 5):
            response.readline()
        response.close()
        connection.close()
    found = ask(served.http_url, "hello", model="tensorrt_llm_bls", layout=ENSEMBLE, max_tokens=4, timeout_s=20)
    assert found.num_output_tokens == 4


def test_a_cancelled_grpc_stream_frees_the_blocks(served: RestartingServer) -> None:
    import tritonclient.grpc as triton

    from trtbuild.serving.client import _tensor

    received: list[Any] = []
    client = triton.InferenceServerClient(served.grpc_url)
    client.start_stream(lambda result, error: received.append((result, error)))
    client.async_stream_infer("tensorrt_llm_bls", [_tensor(triton, name, value, (1,)) for name, value in LONG.items()])
    deadline = time.monotonic() + 20
    while len(received) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    wait_for(served, REQUESTS, "active", 1)
    client.stop_stream(cancel_requests=True)
    client.close()
    wait_for(served, KV, "used", 0)


def test_eight_streams_at_once_equal_their_solo_answers(served: RestartingServer) -> None:
    jobs = [
        {"prompt": "word " * size, "max_tokens": length, "model": model, "layout": ENSEMBLE, "end_id": -1}
        for (size, length), model in zip(
            [(1, 5), (9, 17), (40, 33), (3, 48), (60, 64), (2, 80), (11, 96), (5, 112)], CHAINS * 4, strict=True
        )
    ]
    solo = [ask(served.grpc_url, **job) for job in jobs]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        urls = [served.grpc_url, served.http_url] * 4
        pairs = zip(urls, jobs, strict=True)
        together = list(pool.map(lambda one: ask(one[0], timeout_s=120, **one[1]), pairs))
    assert [answer.text for answer in together] == [answer.text for answer in solo]
    wait_for(served, KV, "used", 0)


def test_the_names_of_a_served_model_say_its_layout(served: RestartingServer, server: TritonServer) -> None:
    for url in (served.http_url, served.grpc_url):
        assert find_layout(url, "ensemble") == ("ensemble", "ensemble")
        assert find_layout(url, "tensorrt_llm") == ("tensorrt_llm_bls", "ensemble")
        with pytest.raises(TrtbuildError, match="unknown model"):
            find_layout(url, "other")
    for url in (server.http_url, server.grpc_url):
        assert find_layout(url, "tensorrt_llm") == ("tensorrt_llm", "llm")


def test_the_served_check_passes_and_finds_other_answers(five: Path, served: RestartingServer) -> None:
    from trtbuild.serving.reference import run

    asked = {"engine": str(five / "engine"), "texts": ["hello", "é 漢 👩‍🚀"], "max_tokens": 12}
    reference = run(asked, lambda *_: None)
    sound = compare_ensemble(served, reference, model="tensorrt_llm", on_progress=lambda *_: None)
    assert sound.passed, sound.problems
    assert (sound.prompts, sound.greedy_agreement, sound.streaming_equal) == (2, 1.0, True)
    assert (sound.tokens_compared, sound.perplexity) == (24, None)
    broken = reference | {"answers": [[1, 2, 3], reference["answers"][1]], "answer_texts": ["never said", "nor this"]}
    wrong = compare_ensemble(served, broken, model="tensorrt_llm", on_progress=lambda *_: None)
    assert not wrong.passed
    assert not wrong.streaming_equal
    assert any(problem.startswith("prompt 0: the server's token 0 is") for problem in wrong.problems)
    assert any("prompt 1: ensemble, HTTP generate gives" in problem for problem in wrong.problems)


@pytest.mark.parametrize("model", ["tensorrt_llm", "ensemble", "tensorrt_llm_bls"])
def test_ask_on_the_command_line(served: RestartingServer, model: str) -> None:
    """The default name leads to the model that takes text."""
    from click.testing import CliRunner

    from trtbuild.cli import ask as command

    messages = [{"role": "user", "content": "hi"}]
    expected = ask(served.grpc_url, messages, model="ensemble", layout=ENSEMBLE, max_tokens=9).text
    for url, more in ((served.grpc_url, []), (served.http_url, ["--no-stream"])):
        arguments = ["hi", "--url", url, "--model", model, "--max-tokens", "9", *more]
        done = CliRunner().invoke(command, arguments, catch_exceptions=False)
        assert done.exit_code == 0
        assert done.stdout == f"{expected}\n"
        assert done.stderr.startswith("(9 tokens, ")


@pytest.fixture(scope="module")
def whole_only(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestartingServer]:
    """The five models built with ``serving.streaming: false``."""
    root = tmp_path_factory.mktemp("whole")
    shutil.copytree(package / "engine", root / "engine")
    made = spec(layout="ensemble", max_batch_size=8, streaming=False)
    render_repository(made, root / "model_repository")
    assert check_repository(root / "model_repository", engine=None) == []
    with RestartingServer(root / "model_repository", root / "log") as running:
        yield running


def test_without_streaming_answers_are_the_same(whole_only: RestartingServer, server: TritonServer) -> None:
    expected = ask(server.http_url, "hello", streaming=False, max_tokens=30)
    for model in CHAINS:
        found = ask(whole_only.http_url, "hello", model=model, layout=ENSEMBLE, streaming=False, max_tokens=30)
        assert (found.text, found.num_output_tokens) == (expected.text, 30)
        with pytest.raises(TrtbuildError, match=r"streaming|stream: this model was built without it"):
            ask(whole_only.http_url, "hello", model=model, layout=ENSEMBLE, streaming=True, max_tokens=4)
    stop = expected.text[3:6]
    found = ask(
        whole_only.http_url, "hello", model="tensorrt_llm_bls", layout=ENSEMBLE, streaming=False, max_tokens=30,
        stop_words=[stop],
    )  # fmt: skip
    assert found.text == expected.text[: expected.text.find(stop) + len(stop)]


@pytest.fixture
def real(smollm2: Path, tmp_path: Path) -> Iterator[RestartingServer]:
    """The five models over SmolLM2."""
    shutil.copytree(smollm2, tmp_path / "engine", copy_function=os.link)
    settings = ENGINE_JSON | {"kv_cache": {"dtype": "auto", "tokens_per_block": 32, "max_tokens": 1024}}
    (tmp_path / "engine" / "engine.json").write_text(json.dumps(settings), encoding="utf-8")
    render_repository(spec(layout="ensemble", max_batch_size=8), tmp_path / "model_repository")
    assert check_repository(tmp_path / "model_repository", engine=None) == []
    with RestartingServer(tmp_path / "model_repository", tmp_path / "log") as running:
        yield running


@pytest.mark.smollm2
def test_a_real_model_answers_the_same_through_every_chain(real: RestartingServer, tmp_path: Path) -> None:
    from trtbuild.serving.reference import run

    texts = ["The capital of France is", "Grüße aus Köln, 東京 👩‍🚀:"]
    reference = run({"engine": str(tmp_path / "engine"), "texts": texts, "max_tokens": 8}, lambda *_: None)
    assert "Paris" in reference["answer_texts"][0]
    report = compare_ensemble(real, reference, model="tensorrt_llm", on_progress=lambda *_: None)
    # This model takes long over 300 tokens: blocks that are free at once were freed by the cancellation.
    wait_for(real, REQUESTS, "active", 0)
    connection = http.client.HTTPConnection(real.address, real.ports.http, timeout=60)
    path = "/v2/models/tensorrt_llm_bls/generate_stream"
    connection.request("POST", path, json.dumps(LONG), {"Content-Type": "application/json"})
    assert next(line for line in connection.getresponse() if line.startswith(b"data:"))
    wait_for(real, REQUESTS, "active", 1)
    connection.close()
    wait_for(real, REQUESTS, "active", 0, limit_s=2)
    assert gauge(real, KV, "used") == 0
    assert report.passed, report.problems
