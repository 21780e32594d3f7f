"""The repository for TensorRT-LLM's C++ backend in the real Triton, with a stand-in where that backend would be.

The stand-in keeps to what fillTritonResponse of upstream's model_instance_state.cc (@0c8de69a) sends: new tokens while
streaming, all of them otherwise, no sign of the end but the final flag, and only the outputs that were asked for. What
is under test is everything around it: preprocessing, postprocessing, `ensemble` and `tensorrt_llm_bls`.
"""

from __future__ import annotations

import http.client
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llm_helpers import spec
from restarting import RestartingServer

from trtbuild.adapters.triton import check_repository, render_repository
from trtbuild.adapters.triton_parameters import EngineParameters
from trtbuild.serving.client import ask
from trtbuild.serving.contract import ENSEMBLE

pytestmark = [pytest.mark.triton, pytest.mark.bls]
SAID = "The fox 👩‍🚀 said: é漢, e\u0301 END of it."
STAND_IN = """
import json, threading, time
from pathlib import Path
import numpy as np
import triton_python_backend_utils as pb

FINAL = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL

class TritonPythonModel:
    def initialize(self, args):
        self.seen = Path(args["model_repository"]).parent.parent / "seen.jsonl"
        self.tokens = json.loads((Path(args["model_repository"]) / "tokens.json").read_text())
        self.stopped = set()

    def execute(self, requests):
        for request in requests:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            sender = request.get_response_sender()
            if "stop" in inputs and inputs["stop"].reshape(-1)[0]:
                self.stopped.add(request.request_id())
                self.note({"stop": request.request_id()})
                sender.send(pb.InferenceResponse([]), flags=FINAL)
                continue
            self.note({name: array.tolist() for name, array in inputs.items() if array.dtype != object})
            threading.Thread(target=self.speak, args=(request, inputs, sender), daemon=True).start()

    def note(self, what):
        with self.seen.open("a") as file:
            file.write(json.dumps(what) + "\\n")

    def speak(self, request, inputs, sender):
        length = int(inputs["request_output_len"].reshape(-1)[0])
        tokens = (self.tokens * (length // len(self.tokens) + 1))[:length] if length > 100 else self.tokens[:length]
        streaming = bool(inputs.get("streaming", np.zeros(1)).reshape(-1)[0])
        pieces = [tokens[at:at + 1] for at in range(len(tokens))] if streaming else [tokens]
        wanted = set(request.requested_output_names())
        for place, piece in enumerate(pieces):
            ended = request.request_id() in self.stopped
            last = place + 1 == len(pieces) or ended
            made = {"output_ids": [[piece]], "sequence_length": [[len(piece)]]}
            if inputs.get("return_num_output_tokens", np.zeros(1)).reshape(-1)[0]:
                made["num_output_tokens"] = [[len(piece)]]
            outputs = [pb.Tensor(n, np.array(v, np.int32)) for n, v in made.items() if n in wanted]
            sender.send(pb.InferenceResponse(outputs), flags=FINAL if last else 0)
            if last:
                self.note({"ended": place, "id": request.request_id()})
                return
            time.sleep(0.01 if length > 100 else 0)
"""


@pytest.fixture(scope="module")
def served(package: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Iterator[RestartingServer]:
    root = tmp_path_factory.mktemp("cpp")
    shutil.copytree(package / "engine", root / "engine")
    engine = EngineParameters(gpt_model_path="/package/engine")
    made = replace(spec(layout="ensemble", max_batch_size=8), runtime="trtllm-engine", engine=engine)
    repository = root / "model_repository"
    render_repository(made, repository)
    assert check_repository(repository, engine=None) == []
    model = repository / "tensorrt_llm"
    config = model / "config.pbtxt"
    config.write_text(config.read_text().replace('backend: "tensorrtllm"', 'backend: "python"'))
    (model / "1" / "model.py").write_text(STAND_IN)
    (model / "tokens.json").write_text(json.dumps(tokenizer.encode(SAID, add_special_tokens=False)))
    with RestartingServer(repository, root / "log") as running:
        yield running


def seen(served: RestartingServer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (served.log.parent / "seen.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("streaming", [True, False])
def test_bls_puts_the_text_together_from_tokens_alone(
    served: RestartingServer, tokenizer: Any, streaming: bool
) -> None:
    count = len(tokenizer.encode(SAID, add_special_tokens=False))
    for url in (served.http_url, served.grpc_url):
        pieces: list[str] = []
        found = ask(
            url, "hello", model="tensorrt_llm_bls", layout=ENSEMBLE, streaming=streaming, max_tokens=100,
            on_text=pieces.append,
        )  # fmt: skip
        assert found.text == SAID
        assert found.num_output_tokens == count
        assert "\ufffd" not in "".join(pieces)
        assert (len(pieces) > 10) is streaming


def test_what_reaches_the_engine(served: RestartingServer, tokenizer: Any) -> None:
    ask(
        served.http_url, "hello", model="tensorrt_llm_bls", layout=ENSEMBLE, streaming=False, max_tokens=7, top_k=5,
        temperature=0.5, seed=2**40, stop_words=["fox"], return_log_probs=True,
    )  # fmt: skip
    request = next(one for one in reversed(seen(served)) if "input_ids" in one)
    ids = tokenizer.encode("hello")
    assert request["input_ids"] == [ids]
    assert request["input_lengths"] == [len(ids)], "a scalar with a batch dimension"
    assert (request["request_output_len"], request["runtime_top_k"], request["temperature"]) == ([7], [5], [0.5])
    assert (request["seed"], request["end_id"]) == ([2**40], [tokenizer.eos_token_id])
    assert (request["streaming"], request["exclude_input_in_output"], request["return_log_probs"]) == ([1], [1], [1])
    assert request["stop_words_list"][0][0][: len(tokenizer.encode("fox"))] == tokenizer.encode("fox")
    absent = {"draft_input_ids", "lora_task_id", "embedding_bias", "bad_words_list", "prompt_table_extra_ids"}
    assert not absent & set(request)


def test_the_ensemble_answers_whole(served: RestartingServer) -> None:
    found = ask(served.http_url, "hello", model="ensemble", layout=ENSEMBLE, streaming=False, max_tokens=100)
    assert found.text == SAID


@pytest.mark.parametrize("streaming", [True, False])
def test_a_stop_word_in_the_text_ends_the_engine_s_request(served: RestartingServer, streaming: bool) -> None:
    found = ask(
        served.grpc_url, "hello", model="tensorrt_llm_bls", layout=ENSEMBLE, streaming=streaming, max_tokens=300,
        stop_words=["EN"],
    )  # fmt: skip
    assert found.text == SAID[: SAID.index("EN") + 2]
    wait_for_stop(served)


def wait_for_request(served: RestartingServer, before: int) -> None:
    deadline = time.monotonic() + 20
    while not any("input_ids" in one for one in seen(served)[before:]):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_cancelled_grpc_request_ends_in_the_engine(served: RestartingServer, streaming: bool) -> None:
    """Also one whose answer comes whole: the engine streams to BLS all the same."""
    import tritonclient.grpc as triton

    from trtbuild.serving.client import _tensor

    before = len(seen(served))
    client = triton.InferenceServerClient(served.grpc_url)
    client.start_stream(lambda result, error: None)
    inputs = {"text_input": "hello", "max_tokens": 300, "stream": streaming}
    client.async_stream_infer(
        "tensorrt_llm_bls", [_tensor(triton, name, value, (1,)) for name, value in inputs.items()]
    )
    wait_for_request(served, before)
    client.stop_stream(cancel_requests=True)
    client.close()
    wait_for_stop(served)


def test_a_dropped_connection_ends_in_the_engine(served: RestartingServer) -> None:
    """Triton notices it when it sends; of a whole answer over HTTP it sends nothing before the end."""
    connection = http.client.HTTPConnection(served.address, served.ports.http, timeout=60)
    body = json.dumps({"text_input": "hello", "max_tokens": 300, "stream": True})
    path = "/v2/models/tensorrt_llm_bls/generate_stream"
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    assert next(line for line in connection.getresponse() if line.startswith(b"data:"))
    connection.close()
    wait_for_stop(served)


def wait_for_stop(served: RestartingServer) -> None:
    """The last request was stopped long before its 300 tokens."""
    deadline = time.monotonic() + 20
    while not (seen(served) and "ended" in (last := [one for one in seen(served) if "stop" not in one][-1])):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert last["ended"] < 200
    assert {"stop": last["id"]} in seen(served)
