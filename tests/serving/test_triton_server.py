"""The real Triton server over a tiny random model: one server for all of these."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llm_helpers import START_S, gauge, spec

from trtbuild.adapters.triton import render_repository
from trtbuild.errors import RequestError
from trtbuild.serving.client import Answer, ask
from trtbuild.serving.server import TritonServer

pytestmark = pytest.mark.triton
DRAFTS = "trtbuild_draft_tokens"
KV, REQUESTS = "nv_trt_llm_kv_cache_block_metrics", "nv_trt_llm_request_metrics"


def answers(server: TritonServer, **inputs: Any) -> list[Answer]:
    """One request in every way that a client can send it."""
    ways = [(server.http_url, False), (server.http_url, True), (server.grpc_url, False), (server.grpc_url, True)]
    return [ask(url, streaming=streaming, timeout_s=60, **inputs) for url, streaming in ways]


def same(found: list[Answer]) -> Answer:
    seen = {(answer.text, answer.output_ids, answer.finish_reason, answer.stop_reason) for answer in found}
    assert len(seen) == 1, seen
    return found[0]


def decoded(tokenizer: Any, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def wait_for(server: TritonServer, family: str, kind: str, value: float, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while gauge(server, family, kind) != value:
        assert time.monotonic() < deadline, f"{kind} is {gauge(server, family, kind)}, not {value}"
        time.sleep(0.05)


def test_served_tokens_are_the_engine_s(server: TritonServer, package: Path, tokenizer: Any) -> None:
    from trtbuild.runtime import Engine, EngineConfig, SamplingParams

    texts = ["hello", "The quick brown fox", "é 漢 👩‍🚀"]
    plain = replace(EngineConfig.read(package / "engine"), speculative=None)
    with Engine.load(package / "engine", config=plain) as engine:
        for text in texts:
            expected = engine.submit(tokenizer.encode(text), SamplingParams(max_tokens=24)).result().token_ids
            found = same(answers(server, prompt=text, max_tokens=24))
            assert found.output_ids == expected
            assert found.text == tokenizer.decode(
                expected, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            assert (found.num_input_tokens, found.num_output_tokens) == (len(tokenizer.encode(text)), 24)


@pytest.mark.parametrize("seed", range(6))
def test_streamed_text_is_the_whole_text_for_random_tokens(server: TritonServer, tokenizer: Any, seed: int) -> None:
    """Sampled at a high temperature, a byte-level model speaks mostly broken and half characters."""
    found = same(answers(server, input_ids=[seed + 5, 9], max_tokens=120, temperature=3.0, seed=seed, ignore_eos=True))
    assert found.text == tokenizer.decode(
        found.output_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def test_text_in_any_script_is_echoed_unharmed(server: TritonServer) -> None:
    text = "emoji 👩‍🚀🏳️‍🌈, e\u0301, 漢字, العربية, 𝔘𝔫𝔦, \u200f\u202bעברית\u202c"
    found = answers(server, prompt=text, max_tokens=1, sampling_param_exclude_input_from_output=False)
    assert all(answer.text.startswith(text) for answer in found)
    assert all(len(answer.output_ids) == answer.num_input_tokens + 1 for answer in found)


def test_cumulative_streaming(server: TritonServer) -> None:
    plain = ask(server.grpc_url, "hello", max_tokens=20)
    for url in (server.http_url, server.grpc_url):
        cumulative = ask(url, "hello", max_tokens=20, streaming_cumulative=True)
        assert (cumulative.text, cumulative.output_ids) == (plain.text, plain.output_ids)


def test_stop_strings_end_the_answer_everywhere_alike(server: TritonServer) -> None:
    whole = ask(server.http_url, "hello", streaming=False, max_tokens=60)
    place = next(at for at in range(10, len(whole.text) - 3) if "\ufffd" not in whole.text[at : at + 3])
    stop = whole.text[place : place + 3]
    found = same(answers(server, prompt="hello", max_tokens=60, sampling_param_stop=["never there", stop]))
    assert found.text == whole.text[: whole.text.find(stop)]
    assert (found.finish_reason, found.stop_reason) == ("stop", stop)
    assert found.num_output_tokens == len(found.output_ids) < 60


def test_stop_token_ids_and_min_tokens(server: TritonServer) -> None:
    whole = ask(server.http_url, "hello", streaming=False, max_tokens=40, ignore_eos=True)
    token = whole.output_ids[7]
    found = same(answers(server, prompt="hello", max_tokens=40, ignore_eos=True, stop_token_ids=[token]))
    assert found.output_ids == whole.output_ids[: whole.output_ids.index(token) + 1]
    assert (found.finish_reason, found.stop_reason) == ("stop", str(token))


def test_logprobs_and_metrics_over_the_wire(server: TritonServer) -> None:
    for found in answers(
        server, input_ids=[5, 6, 7, 8], max_tokens=6, logprobs=2, prompt_logprobs=0, return_cumulative_logprob=True,
        sampling_param_return_perf_metrics=True,
    ):  # fmt: skip
        assert [entry["token_id"] for entry in found.logprobs] == list(found.output_ids)
        assert all(entry["rank"] == 1 and len(entry["top"]) == 2 for entry in found.logprobs)
        assert found.prompt_logprobs[0] is None
        assert [entry["token_id"] for entry in found.prompt_logprobs[1:] if entry] == [6, 7, 8]
        total = sum(entry["logprob"] for entry in found.logprobs)
        assert found.cumulative_logprob == pytest.approx(total, rel=1e-6)
        times = [found.outputs[name] for name in ("arrival_time_ns", "first_token_time_ns", "last_token_time_ns")]
        flat = [value[0] if isinstance(value, list) else value for value in times]
        assert all(isinstance(value, int) for value in flat)
        assert flat == sorted(flat)


def settled(server: TritonServer) -> list[float]:
    """Verified and accepted draft tokens once they no longer change: gauges are set after the response is sent."""
    found: list[float] = []
    while found != (now := [gauge(server, DRAFTS, kind) for kind in ("verified", "accepted")]):
        found = now
        time.sleep(0.5)
    return found


def test_drafts_are_counted_in_the_answer_and_in_the_metrics(server: TritonServer) -> None:
    asked: dict[str, Any] = {"input_ids": [5, 6, 7, 5, 6], "max_tokens": 60, "ignore_eos": True}
    asked["sampling_param_return_perf_metrics"] = True
    ask(server.http_url, streaming=False, **asked)  # the pool knows the answer from here on
    before = settled(server)
    for found in answers(server, **asked):
        names = ("total_draft_tokens", "total_accepted_draft_tokens")
        drafted, accepted = (int(np.ravel(found.outputs[name])[0]) for name in names)
        assert 20 < accepted <= drafted
        assert float(np.ravel(found.outputs["acceptance_rate"])[0]) == pytest.approx(accepted / drafted, abs=1e-6)
        before = [before[0] + drafted, before[1] + accepted]
    wait_for(server, DRAFTS, "verified", before[0])
    wait_for(server, DRAFTS, "accepted", before[1])


def test_several_answers(server: TritonServer) -> None:
    asked: dict[str, Any] = {"streaming": False, "max_tokens": 8, "n": 3, "temperature": 1.5, "seed": 4}
    found = ask(server.http_url, "hello", **asked)
    assert len(found.outputs["text_output"]) == 3
    assert found.outputs["num_output_tokens"] == [8, 8, 8]
    assert len({tuple(found.output_ids[start : start + 8]) for start in (0, 8, 16)}) > 1, "each has a seed of its own"
    assert (
        found.outputs
        == ask(server.http_url, "hello", streaming=False, max_tokens=8, n=3, temperature=1.5, seed=4).outputs
    )


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({}, "no prompt is given"),
        ({"prompt": "a", "input_ids": [1]}, "text_input and input_ids are given together"),
        ({"prompt": "word " * 500}, "this model takes at most 400; shorten it"),
        ({"prompt": "a" * 200_000}, "text_input: 200000 characters are more than"),
        ({"input_ids": [1] * 399, "max_tokens": 200}, "sampling_param_max_tokens: 200 after a prompt of 399 tokens"),
        ({"prompt": "a", "max_tokens": 0}, "sampling_param_max_tokens: 0 is out of range; ask for 1 to 300 tokens"),
        ({"prompt": "a", "max_tokens": 301}, "sampling_param_max_tokens: 301 is out of range; ask for 1 to 300"),
        ({"prompt": "a", "temperature": -0.5}, "sampling_param_temperature: -0.5 is out of range"),
        ({"prompt": "a", "temperature": float("nan")}, "sampling_param_temperature"),
        ({"prompt": "a", "top_p": 1.5}, "sampling_param_top_p: 1.5 is out of range"),
        ({"prompt": "a", "top_k": -1}, "sampling_param_top_k: -1 is out of range"),
        ({"prompt": "a", "min_p": 2.0}, "sampling_param_min_p: 2.0 is out of range"),
        ({"prompt": "a", "repetition_penalty": 0.0}, "sampling_param_repetition_penalty"),
        ({"prompt": "a", "min_tokens": 50, "max_tokens": 4}, "sampling_param_min_tokens: 50 is out of range"),
        ({"prompt": "a", "logprobs": -1}, "sampling_param_logprobs: -1 is out of range"),
        ({"prompt": "a", "stop_token_ids": [320]}, "sampling_param_stop_token_ids[0]: 320 is no token of this model"),
        ({"input_ids": [-1]}, "input_ids[0]: -1 is no token of this model"),
        ({"prompt": "a", "sampling_param_stop": [""]}, "sampling_param_stop[0]: an empty string"),
        ({"prompt": "a", "lora_name": "x"}, "lora_name: this package was built without LoRA adapters"),
        ({"prompt": "a", "guided_decoding_guide": "{}"}, "guided_decoding_guide: the embedded engine does no guided"),
        ({"prompt": "a", "best_of": 2}, "sampling_param_best_of: 2 is not served"),
        ({"prompt": [{"content": "x"}]}, "messages[0]: not an object with a role"),
    ],
)
def test_wrong_requests_get_a_sentence(server: TritonServer, inputs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError) as over_grpc:
        ask(server.grpc_url, timeout_s=60, **inputs)
    assert sentence in str(over_grpc.value)
    if "nan" not in str(inputs):  # JSON has no NaN
        with pytest.raises(RequestError) as over_http:
            ask(server.http_url, streaming=False, timeout_s=60, **inputs)
        assert sentence in str(over_http.value)


@pytest.mark.parametrize(
    ("body", "endpoint"),
    [
        (b"{", "generate"),
        (b"[]", "generate"),
        (b'{"text_input": 5}', "generate"),
        (b'{"text_input": "a", "sampling_param_max_tokens": "many"}', "generate"),
        (b'{"text_input": "a", "streaming": "yes"}', "generate"),
        (b"\xff\xfe", "generate"),
        (b'{"text_input": "a"}', "infer"),
        (b'{"input_ids": [1, 2.5]}', "generate"),
    ],
)  # fmt: skip
def test_malformed_requests_harm_nobody(server: TritonServer, post: Any, body: bytes, endpoint: str) -> None:
    status, answer = post(None, endpoint, raw=body)
    assert status >= 400
    assert answer["error"]
    assert ask(server.http_url, "hello", streaming=False, max_tokens=2).num_output_tokens == 2


def test_a_misspelled_input_is_refused_instead_of_ignored(server: TritonServer, post: Any) -> None:
    status, answer = post({"text_input": "a", "sampling_param_temprature": 1})
    assert status == 400
    assert "did you mean sampling_param_temperature?" in answer["error"]


def test_large_bodies(server: TritonServer, post: Any) -> None:
    status, answer = post({"text_input": "é" * 4_000_000})
    assert (status, "characters are more than" in answer["error"]) == (400, True)
    status, answer = post({"input_ids": [1] * 500_000})
    assert (status, "the prompt has 500000 tokens" in answer["error"]) == (400, True)
    assert ask(server.http_url, "hello", streaming=False, max_tokens=2).num_output_tokens == 2


def test_eight_streams_at_once_equal_their_solo_answers(server: TritonServer) -> None:
    draw = random.Random(5)
    jobs: list[dict[str, Any]] = [
        {"input_ids": [draw.randrange(3, 320) for _ in range(draw.randrange(2, 200))], "max_tokens": length}
        for length in (5, 17, 33, 48, 64, 80, 96, 112)
    ]
    solo = [ask(server.grpc_url, ignore_eos=True, **job) for job in jobs]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        urls = [server.grpc_url, server.http_url] * 4
        together = list(
            pool.map(lambda one: ask(one[0], ignore_eos=True, timeout_s=120, **one[1]), zip(urls, jobs, strict=True))
        )
    assert [(answer.text, answer.output_ids) for answer in together] == [(one.text, one.output_ids) for one in solo]
    wait_for(server, KV, "used", 0)


def stream_lines(server: TritonServer, body: dict[str, Any]) -> tuple[http.client.HTTPConnection, Iterator[bytes]]:
    connection = http.client.HTTPConnection(server.address, server.ports.http, timeout=60)
    path = "/v2/models/tensorrt_llm/generate_stream"
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection, (line for line in connection.getresponse() if line.startswith(b"data:"))


LONG = {"input_ids": [5, 6, 7], "streaming": True, "sampling_param_max_tokens": 300, "sampling_param_ignore_eos": True}


def test_a_client_that_disconnects_frees_its_blocks(server: TritonServer) -> None:
    wait_for(server, KV, "used", 0)
    for _ in range(3):
        connection, lines = stream_lines(server, LONG)
        assert next(lines)
        connection.sock.close() if connection.sock else None
        connection.close()
    wait_for(server, REQUESTS, "active", 0)
    wait_for(server, KV, "used", 0)
    wait_for(server, KV, "free", gauge(server, KV, "max"))  # the gauges are set one after another


def test_a_grpc_stream_that_is_cancelled_frees_its_blocks(server: TritonServer) -> None:
    import tritonclient.grpc as triton

    received: list[Any] = []
    client = triton.InferenceServerClient(server.grpc_url)
    client.start_stream(lambda result, error: received.append((result, error)))
    from trtbuild.serving.client import _tensor

    client.async_stream_infer("tensorrt_llm", [_tensor(triton, name, value) for name, value in LONG.items()])
    deadline = time.monotonic() + 30
    while not received and time.monotonic() < deadline:
        time.sleep(0.01)
    client.stop_stream(cancel_requests=True)
    client.close()
    assert received
    wait_for(server, KV, "used", 0)
    wait_for(server, REQUESTS, "active", 0)


def test_a_stop_request_ends_the_other(server: TritonServer, post: Any) -> None:
    connection, lines = stream_lines(server, LONG | {"id": "to-be-stopped"})
    assert next(lines)
    status, answer = post({"stop": True, "id": "to-be-stopped"})
    assert (status, answer["finish_reason"]) == (200, "cancelled")
    last = list(lines)[-1]
    assert b"stopped by a request with stop: true" in last
    connection.close()
    wait_for(server, KV, "used", 0)


def test_finished_requests_show_in_the_gauges(server: TritonServer) -> None:
    assert gauge(server, KV, "max") == 4096 / 32
    ask(server.http_url, "hello", streaming=False, max_tokens=2)
    wait_for(server, REQUESTS, "waiting", 0)


@pytest.fixture(scope="module")
def unary(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A package with serving.streaming: false, under another name."""
    root = tmp_path_factory.mktemp("unary")
    render_repository(spec(streaming=False, model_name="plain", engine_dir=str(package / "engine")), root / "repo")
    with TritonServer.start(root / "repo", log=root / "log", startup_timeout_s=START_S) as running:
        yield running


def test_without_streaming_ordinary_inference_works(unary: TritonServer, server: TritonServer) -> None:
    import numpy as np
    import tritonclient.grpc as triton

    expected = ask(server.http_url, "hello", streaming=False, max_tokens=12)
    found = ask(unary.http_url, "hello", model="plain", streaming=False, max_tokens=12)
    assert (found.text, found.output_ids) == (expected.text, expected.output_ids)
    with pytest.raises(RequestError, match="this model was built without it"):
        ask(unary.http_url, "hello", model="plain", streaming=True)
    client = triton.InferenceServerClient(unary.grpc_url)
    text = triton.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"hello"], dtype=object))
    room = triton.InferInput("sampling_param_max_tokens", [1], "INT32")
    room.set_data_from_numpy(np.array([12], dtype=np.int32))
    result = client.infer("plain", [text, room], outputs=[triton.InferRequestedOutput("output_ids")])
    assert tuple(result.as_numpy("output_ids").tolist()) == expected.output_ids
    assert result.as_numpy("text_output") is None, "only what was asked for"
    client.close()


def test_without_streaming_requests_still_run_together(unary: TritonServer) -> None:
    asked: dict[str, Any] = {"model": "plain", "streaming": False, "ignore_eos": True, "timeout_s": 120}
    solo = [ask(unary.http_url, input_ids=[number + 3], max_tokens=40, **asked) for number in range(6)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(ask, unary.http_url, input_ids=[n + 3], max_tokens=40, **asked) for n in range(6)]
        together = [job.result() for job in jobs]
    assert [one.output_ids for one in together] == [one.output_ids for one in solo]
