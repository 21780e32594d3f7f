"""The runtime `trtllm` in the real Triton: our model over the fake LLM API, beside the embedded engine's server."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from llm_helpers import START_S, gauge, spec
from trtllm_helpers import events, make_engine, make_environment, use_environment

from trtbuild.adapters.triton import check_repository, render_repository
from trtbuild.errors import RequestError, ToolError
from trtbuild.serving.client import Answer, ask
from trtbuild.serving.server import TritonServer

pytestmark = pytest.mark.triton
REQUESTS, KV = "nv_trt_llm_request_metrics", "nv_trt_llm_kv_cache_block_metrics"
SLOW = [17, 17, 17, 5]


@dataclass(frozen=True)
class Served:
    server: TritonServer
    log: Path

    def events(self, kind: str) -> list[dict[str, Any]]:
        return events(self.log, kind)

    def wait_for(self, kind: str, **fields: Any) -> None:
        deadline = time.monotonic() + 20
        while not any(fields.items() <= event.items() for event in self.events(kind)):
            assert time.monotonic() < deadline, (kind, fields)
            time.sleep(0.02)


@pytest.fixture(scope="module")
def serve(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start servers over packages of the runtime `trtllm`."""
    running: list[TritonServer] = []

    def start(
        flavour: str, *, args: dict[str, Any], blocked: bool, python: str | None = None, **changes: Any
    ) -> Served:
        root = tmp_path_factory.mktemp(flavour)
        engine = make_engine(package / "engine", root / "engine", **args)
        adapters = {"formal": "adapters/formal"}
        repository, log = root / "model_repository", root / "events"
        render_repository(spec(runtime="trtllm", lora_adapters=adapters, **changes), repository)
        assert check_repository(repository, engine=engine) == []
        environment = make_environment(
            root / "environment", flavour, blocked=blocked, **({} if python is None else {"python": python})
        )
        use_environment(repository / "tensorrt_llm", environment)
        if python is not None:
            import pytriton

            stubs = Path(pytriton.__file__).parent / "tritonserver" / "python_backend_stubs"
            shutil.copy(stubs / "3.12" / "triton_python_backend_stub", repository / "tensorrt_llm")
        os.environ["FAKE_TENSORRT_LLM_LOG"] = str(log)
        try:
            server = TritonServer.start(repository, log=root / "triton.log", startup_timeout_s=START_S)
        finally:
            del os.environ["FAKE_TENSORRT_LLM_LOG"]
        running.append(server)
        return Served(server, log)

    yield start
    with concurrent.futures.ThreadPoolExecutor(len(running) or 1) as pool:
        list(pool.map(TritonServer.stop, running))


@pytest.fixture(scope="module")
def newest(serve: Any) -> Served:
    drafts = {"decoding_type": "NGram", "max_draft_len": 2}
    found: Served = serve("newest", args={"speculative_config": drafts}, blocked=False)
    assert found.events("network")[0]["kind"] == "engine"
    return found


def every_way(served: Served, **inputs: Any) -> Answer:
    """One request over HTTP and gRPC, streamed and whole: all say the same."""
    urls = (served.server.http_url, served.server.grpc_url)
    found = [ask(url, streaming=streaming, timeout_s=60, **inputs) for url in urls for streaming in (False, True)]
    seen = {(one.text, one.output_ids, one.finish_reason, one.stop_reason) for one in found}
    assert len(seen) == 1, seen
    return found[0]


def test_the_llm_was_started_from_the_package(newest: Served) -> None:
    (start,) = newest.events("start")
    assert start["model"] == start["tokenizer"] == str(newest.log.parent / "engine")
    assert start["args"]["max_seq_len"] == 512
    assert start["visible"] == {
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "TRTLLM_VISIBLE_DEVICES": None,
    }


@pytest.mark.parametrize("prompt", ["hello", "The quick brown fox", "é 漢 👩‍🚀"])
def test_text_is_the_embedded_engine_s(newest: Served, server: TritonServer, prompt: str) -> None:
    found = every_way(newest, prompt=prompt, max_tokens=20)
    expected = ask(server.http_url, prompt, streaming=False, max_tokens=20)
    assert (found.text, found.output_ids) == (expected.text, expected.output_ids)
    assert (found.finish_reason, found.num_input_tokens) == (expected.finish_reason, expected.num_input_tokens)
    streamed = [event["streaming"] for event in newest.events("generate")[-4:]]
    assert sorted(streamed) == [False, False, True, True], "what is not streamed is not asked for in pieces"


def test_broken_characters_stream_alike(newest: Served, tokenizer: Any) -> None:
    asked: dict[str, Any] = {"input_ids": [7, 9], "max_tokens": 60, "temperature": 3.0, "seed": 4, "ignore_eos": True}
    found = every_way(newest, **asked)
    assert found.text == tokenizer.decode(
        found.output_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def test_stop_strings_and_stop_tokens(newest: Served, server: TritonServer) -> None:
    whole = ask(server.http_url, "hello", streaming=False, max_tokens=40, ignore_eos=True)
    place = next(at for at in range(5, len(whole.text) - 2) if "\ufffd" not in whole.text[at : at + 2])
    stop = whole.text[place : place + 2]
    found = every_way(newest, prompt="hello", max_tokens=40, ignore_eos=True, sampling_param_stop=[stop])
    assert found.text == whole.text[: whole.text.find(stop)]
    assert found.stop_reason == stop
    token = whole.output_ids[7]
    cut = every_way(newest, prompt="hello", max_tokens=40, ignore_eos=True, stop_token_ids=[token])
    assert cut.output_ids == whole.output_ids[: whole.output_ids.index(token) + 1]
    assert cut.stop_reason == str(token)


def test_logprobs_are_the_embedded_engine_s(newest: Served, server: TritonServer) -> None:
    asked: dict[str, Any] = {
        "input_ids": [5, 6, 7, 8], "max_tokens": 5, "logprobs": 2, "prompt_logprobs": 1,
        "return_cumulative_logprob": True,
    }  # fmt: skip
    for url, streaming in ((newest.server.http_url, False), (newest.server.grpc_url, True)):
        found, expected = ask(url, streaming=streaming, **asked), ask(server.http_url, streaming=False, **asked)
        assert found.cumulative_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-3)
        assert found.prompt_logprobs[0] is expected.prompt_logprobs[0] is None
        for ours, theirs in zip(
            [*found.logprobs, *found.prompt_logprobs[1:]],
            [*expected.logprobs, *expected.prompt_logprobs[1:]],
            strict=True,
        ):
            assert ours is not None
            assert theirs is not None
            assert (ours["token_id"], ours["rank"]) == (theirs["token_id"], theirs["rank"])
            assert ours["logprob"] == pytest.approx(theirs["logprob"], abs=1e-4)
            assert [entry["token_id"] for entry in ours["top"]] == [entry["token_id"] for entry in theirs["top"]]


def test_metrics_are_numbers(newest: Served) -> None:
    found = ask(
        newest.server.http_url, "hello", streaming=False, max_tokens=4, sampling_param_return_perf_metrics=True
    ).outputs
    assert all(type(found[name]) is int for name in ("arrival_time_ns", "last_token_time_ns", "total_draft_tokens"))
    assert 0 < found["arrival_time_ns"] <= found["first_token_time_ns"] <= found["last_token_time_ns"]
    assert (found["acceptance_rate"], found["total_draft_tokens"], found["total_accepted_draft_tokens"]) == (0.25, 4, 1)
    assert found["kv_cache_alloc_total_blocks"] == 1


def test_adapters_guides_and_several_answers(newest: Served) -> None:
    plain = every_way(newest, prompt="hello", max_tokens=6)
    assert every_way(newest, prompt="hello", max_tokens=6, lora_name="formal").output_ids != plain.output_ids
    guided = every_way(newest, prompt="hello", max_tokens=40, guided_decoding_guide_type="json")
    assert (guided.text, guided.finish_reason) == ('{"a": 1}', "stop")
    asked: dict[str, Any] = {"streaming": False, "max_tokens": 8, "n": 3, "temperature": 1.5, "seed": 4}
    several = ask(newest.server.http_url, "hello", **asked)
    assert several.outputs["num_output_tokens"] == [8, 8, 8]
    assert len({tuple(several.output_ids[start : start + 8]) for start in (0, 8, 16)}) == 3
    assert several.output_ids == ask(newest.server.http_url, "hello", **asked).output_ids


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"prompt": "a", "temperature": -0.5}, "sampling_param_temperature: -0.5 is out of range"),
        ({"prompt": "a", "lora_name": "x"}, "lora_name: 'x' is no adapter of this package, which has: formal"),
        ({"prompt": "a", "guided_decoding_guide_type": "xml"}, "guided_decoding_guide_type: 'xml' is not known"),
        (
            {"prompt": "a", "sampling_param_logits_post_processor_name": "x"},
            "this package names no logits post-processors",
        ),
        ({"prompt": "word " * 500}, "this model takes at most 400; shorten it"),
        ({"input_ids": [13, 13, 13, 5], "max_tokens": 9}, "the device is lost"),
    ],
)
def test_errors_are_sentences(newest: Served, inputs: dict[str, Any], sentence: str) -> None:
    for url, streaming in ((newest.server.grpc_url, True), (newest.server.http_url, False)):
        with pytest.raises(RequestError) as caught:
            ask(url, streaming=streaming, timeout_s=60, **inputs)
        assert sentence in str(caught.value)


def stream(served: Served, body: dict[str, Any]) -> tuple[http.client.HTTPConnection, Iterator[bytes]]:
    connection = http.client.HTTPConnection(served.server.address, served.server.ports.http, timeout=60)
    path = "/v2/models/tensorrt_llm/generate_stream"
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection, (line for line in connection.getresponse() if line.startswith(b"data:"))


LONG = {"input_ids": SLOW, "streaming": True, "sampling_param_max_tokens": 300, "sampling_param_ignore_eos": True}


def test_a_client_that_leaves_reaches_abort(newest: Served) -> None:
    before = len(newest.events("abort"))
    connection, lines = stream(newest, LONG)
    assert next(lines)
    assert gauge(newest.server, REQUESTS, "active") == 1
    connection.sock.close() if connection.sock else None
    connection.close()
    deadline = time.monotonic() + 20
    while len(newest.events("abort")) == before or gauge(newest.server, REQUESTS, "active"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (gauge(newest.server, KV, "max"), gauge(newest.server, KV, "used")) == (64, 0)


def test_a_stop_request_reaches_abort(newest: Served) -> None:
    connection, lines = stream(newest, LONG | {"id": "to-be-stopped"})
    assert next(lines)
    other = http.client.HTTPConnection(newest.server.address, newest.server.ports.http, timeout=60)
    headers = {"Content-Type": "application/json"}
    other.request(
        "POST", "/v2/models/tensorrt_llm/generate", json.dumps({"stop": True, "id": "to-be-stopped"}), headers
    )
    assert json.loads(other.getresponse().read())["finish_reason"] == "cancelled"
    assert b"stopped by a request with stop: true" in list(lines)[-1]
    connection.close()
    other.close()


def in_parallel(served: Served, count: int, **inputs: Any) -> list[Answer]:
    urls = [served.server.http_url, served.server.grpc_url] * count
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        jobs = [pool.submit(ask, url, streaming=False, timeout_s=60, **inputs) for url in urls[:count]]
        return [job.result() for job in jobs]


@pytest.fixture(scope="module")
def several(serve: Any) -> Served:
    """1.2 in two instances, where trtbuild cannot be imported."""
    found: Served = serve("v1_2", args={}, blocked=True, instance_count=2, gpu_device_ids="0;3")
    assert [event["kind"] for event in found.events("network")] == ["table", "table"]
    return found


def test_instances_have_their_own_gpus_and_gauges(several: Served) -> None:
    starts = several.events("start")
    assert sorted(start["visible"]["CUDA_VISIBLE_DEVICES"] for start in starts) == ["0", "3"]
    assert all(
        start["visible"]["TRTLLM_VISIBLE_DEVICES"] == start["visible"]["CUDA_VISIBLE_DEVICES"] for start in starts
    )
    assert all(start["args"]["gpus_per_node"] == 1 for start in starts)
    found = in_parallel(several, 8, input_ids=[17, 17, 17, 5], max_tokens=5)
    assert len({answer.output_ids for answer in found}) == 1
    assert len({event["pid"] for event in several.events("generate")}) == 2, "both instances work"
    connection = http.client.HTTPConnection(several.server.address, several.server.ports.metrics, timeout=10)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    assert all(f'instance="tensorrt_llm_0_{number}"' in text for number in (0, 1))


def test_without_trtbuild_streams_equal_whole_answers(several: Served, tokenizer: Any) -> None:
    for prompt in ("hello", "é 漢 👩‍🚀"):
        found = every_way(several, prompt=prompt, max_tokens=30)
        assert found.text == tokenizer.decode(
            found.output_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    greedy = ask(
        several.server.http_url, input_ids=[5, 6, 7], streaming=False, max_tokens=4, logprobs=1, prompt_logprobs=0
    )
    assert [entry["rank"] for entry in greedy.logprobs] == [1] * 4
    assert [entry["token_id"] for entry in greedy.prompt_logprobs[1:] if entry] == [6, 7]


def test_what_1_2_ignores_and_what_instances_cannot_do_is_refused(several: Served) -> None:
    sentence = "sampling_param_repetition_penalty: the sampler of TensorRT-LLM 1.2.0rc2 would ignore it"
    with pytest.raises(RequestError, match=sentence):
        ask(several.server.http_url, "a", streaming=False, repetition_penalty=1.5)
    connection = http.client.HTTPConnection(several.server.address, several.server.ports.http, timeout=60)
    body, headers = json.dumps({"stop": True, "id": "x"}), {"Content-Type": "application/json"}
    connection.request("POST", "/v2/models/tensorrt_llm/generate", body, headers)
    assert "stop: this model has 2 instances" in json.loads(connection.getresponse().read())["error"]
    connection.close()


def test_stopping_the_server_lets_a_request_finish_and_shuts_the_llm_down(serve: Any) -> None:
    served: Served = serve("v1_2", args={}, blocked=True)
    connection, lines = stream(served, LONG | {"sampling_param_max_tokens": 20})
    assert next(lines)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ending = pool.submit(served.server.stop)
        assert b'"num_output_tokens":20' in list(lines)[-1]
        connection.close()
        assert ending.result() == 0
    assert [len(served.events(kind)) for kind in ("abort", "shutdown")] == [0, 1]


def test_a_start_that_fails_says_why(serve: Any, package: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ToolError, match=r"TensorRT-LLM 1.4.0rc0 refuses llm_args.yaml \(LLM got invalid argument: sampl"
    ):
        serve("newest", args={"sampler_type": "auto"}, blocked=True)
    make_engine(package / "engine", tmp_path / "engine")
    render_repository(spec(runtime="trtllm"), tmp_path / "model_repository")
    with pytest.raises(
        ToolError, match="TensorRT-LLM cannot be imported .*; serve this package in a Triton TensorRT-LLM"
    ):
        TritonServer.start(tmp_path / "model_repository", log=tmp_path / "log", startup_timeout_s=START_S)


PYTHON312 = os.environ.get("TRTBUILD_PYTHON312")


@pytest.mark.skipif(
    PYTHON312 is None,
    reason="TRTBUILD_PYTHON312 names no Python 3.12 with libpython3.12.so, numpy<2, transformers and PyYAML",
)
def test_python_3_12_without_torch_or_trtbuild(serve: Any, tokenizer: Any) -> None:
    served: Served = serve("newest", args={}, blocked=True, python=PYTHON312)
    found = every_way(served, prompt="é 漢 👩‍🚀", max_tokens=30)
    assert found.text == tokenizer.decode(
        found.output_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    (network,) = served.events("network")
    assert (network["kind"], network["python"]) == ("table", [3, 12])
