"""The client against a scripted HTTP server: what it sends, how it joins answers, what it says when it fails."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from trtbuild.errors import HostError, RequestError, ToolError
from trtbuild.serving.client import ask
from trtbuild.serving.contract import request_inputs
from trtbuild.serving.verify import served_perplexity


class Script:
    """What the server answers next, and what it was asked."""

    def __init__(self) -> None:
        self.status, self.body, self.asked = 200, b"{}", []  # type: ignore[var-annotated]
        self.url = ""


@pytest.fixture
def script() -> Iterator[Script]:
    plan = Script()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            plan.asked.append((self.path, self.headers["Content-Type"], json.loads(self.rfile.read(length))))
            self.send_response(plan.status)
            self.send_header("Content-Length", str(len(plan.body)))
            self.end_headers()
            self.wfile.write(plan.body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    plan.url = f"http://127.0.0.1:{server.server_port}"
    yield plan
    server.shutdown()
    server.server_close()
    thread.join()


def test_one_answer_with_bare_values_for_single_elements(script: Script) -> None:
    counts = {"num_output_tokens": 1, "num_input_tokens": 3}
    answer = counts | {"text_output": "hé", "output_ids": 5, "finish_reason": "stop"}
    script.body = json.dumps(answer).encode()
    found = ask(script.url, "hi", streaming=False, max_tokens=4, top_p=0.5)
    assert (found.text, found.output_ids, found.finish_reason) == ("hé", (5,), "stop")
    assert (found.num_input_tokens, found.num_output_tokens, found.responses) == (3, 1, 1)
    assert found.tokens_per_second > 0
    path, kind, sent = script.asked[0]
    assert (path, kind) == ("/v2/models/tensorrt_llm/generate", "application/json")
    assert sent["text_input"] == "hi"
    assert (sent["sampling_param_max_tokens"], sent["sampling_param_top_p"], sent["streaming"]) == (4, 0.5, False)


def test_a_stream_is_put_together_and_reported_as_it_comes(script: Script) -> None:
    script.body = b'data: {"text_output":"a","output_ids":[1,2]}\n\ndata: {"text_output":"b","output_ids":3}\n\n'
    pieces: list[str] = []
    found = ask(script.url, [{"role": "user", "content": "hi"}], on_text=pieces.append)
    assert (found.text, found.output_ids, found.responses, pieces) == ("ab", (1, 2, 3), 2, ["a", "b"])
    assert script.asked[0][0].endswith("/generate_stream")
    assert json.loads(script.asked[0][2]["messages"]) == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("status", "body", "kind", "sentence"),
    [
        (200, b'{"error":"generate expects exactly 1 response"}', RequestError, "generate expects exactly 1 response"),
        (400, b'{"error":"top_k: -1 is out of range"}', RequestError, "top_k: -1 is out of range"),
        (404, b'{"error":"unknown model"}', RequestError, "unknown model"),
        (500, b'{"error":"it broke"}', ToolError, "status 500: it broke"),
        (502, b"<html>", ToolError, "status 502: <html>"),
        (200, b"[1]", ToolError, "list instead of an object"),
        (200, b"not json", HostError, "is the server running"),
    ],
)
def test_failures_have_sentences(script: Script, status: int, body: bytes, kind: type, sentence: str) -> None:
    script.status, script.body = status, body
    with pytest.raises(kind) as raised:
        ask(script.url, "hi", streaming=False)
    assert sentence in str(raised.value)


def test_an_empty_stream_is_no_answer(script: Script) -> None:
    script.body = b""
    with pytest.raises(ToolError, match="without a single response"):
        ask(script.url, "hi", streaming=True)


@pytest.mark.parametrize("scheme", ["http://", "grpc://"])
def test_nobody_there(scheme: str) -> None:
    with pytest.raises(HostError, match="is the server running"):
        ask(f"{scheme}127.0.0.1:1", "hi", timeout_s=20)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://localhost:8000", "is encrypted"),
        ("HTTPS://localhost:8000", "is encrypted"),
        ("grpcs://localhost:8001", "is encrypted"),
        ("ftp://localhost:8000", "is no address"),
        ("http://localhost", "is no address"),
        ("localhost", "is no address"),
        ("http://:8000", "is no address"),
        ("http://localhost:eight", "is no address"),
        ("http://localhost:80000", "is no address"),
        ("http://[::1:8000", "is no address"),
        ("http://name:word@localhost:8000", "is no address"),
        ("http://localhost:8000/v2/models", "is no address"),
        ("http://localhost:8000?x=1", "is no address"),
        ("", "is no address"),
    ],
)
def test_addresses_that_are_refused(url: str, why: str) -> None:
    with pytest.raises(RequestError) as raised:
        ask(url, "hi")
    assert raised.value.message.startswith(f"url: {url!r} {why}")
    assert raised.value.hint == "give http://host:port, grpc://host:port or host:port"


@pytest.mark.parametrize("change", [str.upper, lambda url: f"{url}/"], ids=["capitals", "slash"])
def test_spellings_of_an_address(change: Callable[[str], str], script: Script) -> None:
    script.body = b'{"text_output": "a"}'
    assert ask(change(script.url), "hi", streaming=False).text == "a"


def test_names_on_the_wire() -> None:
    sent = request_inputs(None, streaming=False, input_ids=[1], return_cumulative_logprob=True, seed=3, lora_name=None)
    assert sent == {
        "streaming": False, "return_finish_reason": True, "return_stop_reason": True, "input_ids": [1],
        "return_cumulative_logprob": True, "sampling_param_seed": 3,
    }  # fmt: skip


def test_perplexity_counts_predicted_tokens_and_refuses_gaps(script: Script) -> None:
    entries = ["null", '{"token_id": 2, "logprob": -0.5, "rank": 1}', '{"token_id": 3, "logprob": -1.5, "rank": 2}']
    script.body = json.dumps({"prompt_logprobs": entries}).encode()
    perplexity, tokens = served_perplexity(script.url, [[1, 2, 3], [1, 2, 3]])
    assert tokens == 4
    assert perplexity == pytest.approx(2.718281828)
    with pytest.raises(ToolError, match="2 usable log-probabilities for 4 tokens"):
        served_perplexity(script.url, [[1, 2, 3, 4]])
    with pytest.raises(ToolError, match="there is no token"):
        served_perplexity(script.url, [])
