"""A repository with a draft model and an adapter in the real Triton: stand-ins for both engines, all else as it is.

The stand-in for `tensorrt_llm` continues a prompt with a fixed text and verifies ``draft_input_ids`` as an engine built
for ``draft_tokens_external`` does (the drafted tokens that are its own, and one more); an end token is no part of its
answer. That for `tensorrt_llm_draft` knows the same text but for every fourth token.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llm_helpers import spec
from restarting import RestartingServer

from trtbuild.adapters.triton import check_repository, render_repository
from trtbuild.adapters.triton_parameters import EngineParameters
from trtbuild.errors import ToolError
from trtbuild.serving.client import RequestError, ask
from trtbuild.serving.contract import ENSEMBLE

pytestmark = [pytest.mark.triton, pytest.mark.bls]
SAID = "The fox 👩‍🚀 said: é漢, e\u0301 END of it."
DRAFT_TOKENS = 5
STAND_IN = """
import json
from pathlib import Path
import numpy as np
import triton_python_backend_utils as pb

FINAL = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL

class TritonPythonModel:
    def initialize(self, args):
        place = Path(args["model_repository"])
        self.name, self.seen = args["model_name"], place.parent.parent / "seen.jsonl"
        self.prompt, self.said = json.loads((place / "tokens.json").read_text())

    def execute(self, requests):
        for request in requests:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            sender = request.get_response_sender()
            with self.seen.open("a") as file:
                shown = {name: array.tolist() for name, array in inputs.items() if array.dtype != object}
                file.write(json.dumps({"model": self.name} | shown) + "\\n")
            if "lora_task_id" in inputs and "lora_weights" not in inputs:
                task = inputs["lora_task_id"].item()
                message = f"LoRA task {task} not found in cache. Please send LoRA weights with request"
                sender.send(pb.InferenceResponse(error=pb.TritonError(message)), flags=FINAL)
                continue
            if "stop" in inputs:
                sender.send(pb.InferenceResponse([]), flags=FINAL)
                continue
            wanted = set(request.requested_output_names())
            made = {name: array for name, array in self.answer(inputs).items() if name in wanted}
            tensors = [pb.Tensor(name, array) for name, array in made.items()]
            sender.send(pb.InferenceResponse(tensors), flags=FINAL)

    def answer(self, inputs):
        ids = inputs["input_ids"].reshape(-1).tolist()
        assert ids[: len(self.prompt)] == self.prompt
        drafted = inputs["draft_input_ids"].reshape(-1).tolist() if "draft_input_ids" in inputs else []
        place, made = len(ids) - len(self.prompt), []
        while len(made) < inputs["request_output_len"].item():
            if place + len(made) >= len(self.said) and self.name == "tensorrt_llm":
                break
            at = place + len(made)
            token = self.said[at % len(self.said)]
            made.append(token + 1 if self.name == "tensorrt_llm_draft" and at % 4 == 3 else token)
            if drafted and (len(made) > len(drafted) or drafted[len(made) - 1] != made[-1]):
                break
        return {
            "output_ids": np.array([[made]], np.int32).reshape(1, 1, -1),
            "sequence_length": np.array([[len(made)]], np.int32),
            "num_output_tokens": np.array([[len(made)]], np.int32),
            "generation_logits": np.ones((1, 1, len(made), 4), np.float32),
        }
"""


@pytest.fixture(scope="module")
def served(package: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Iterator[RestartingServer]:
    root = tmp_path_factory.mktemp("draft")
    shutil.copytree(package / "engine", root / "engine")
    share = {"kv_cache_free_gpu_mem_fraction": 0.4}
    made = replace(
        spec(layout="ensemble", max_batch_size=8), runtime="trtllm-engine",
        engine=EngineParameters(gpt_model_path="/package/engine/built", **share),
        draft=EngineParameters(gpt_model_path="/package/engine/draft/built", **share), draft_tokens=DRAFT_TOKENS,
        lora_adapters_dir="adapters",
    )  # fmt: skip
    repository = root / "model_repository"
    render_repository(made, repository)
    assert check_repository(repository, engine=None) == []
    tokens = [tokenizer.encode("hello"), tokenizer.encode(SAID, add_special_tokens=False)]
    for name in ("tensorrt_llm", "tensorrt_llm_draft"):
        config = repository / name / "config.pbtxt"
        config.write_text(config.read_text().replace('backend: "tensorrtllm"', 'backend: "python"'))
        (repository / name / "1" / "model.py").write_text(STAND_IN)
        (repository / name / "tokens.json").write_text(json.dumps(tokens))
    adapter = root / "engine" / "adapters" / "1"
    adapter.mkdir(parents=True)
    np.save(adapter / "model.lora_weights.npy", np.full((2, 3), 0.5, np.float16))
    np.save(adapter / "model.lora_config.npy", np.array([[1, 0, 1], [1, 1, 1]], np.int32))
    with RestartingServer(repository, root / "log") as running:
        yield running


def seen(served: RestartingServer, model: str, before: int = 0) -> list[dict[str, Any]]:
    lines = (served.log.parent / "seen.jsonl").read_text().splitlines()[before:]
    return [one for one in map(json.loads, lines) if one["model"] == model and "input_ids" in one]


def count(served: RestartingServer) -> int:
    path = served.log.parent / "seen.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def bls(served: RestartingServer, **inputs: Any) -> Any:
    return ask(served.grpc_url, "hello", model="tensorrt_llm_bls", layout=ENSEMBLE, **{"max_tokens": 100} | inputs)


@pytest.mark.parametrize("streaming", [True, False])
def test_drafts_change_nothing_but_the_number_of_requests(
    served: RestartingServer, tokenizer: Any, streaming: bool
) -> None:
    length = len(tokenizer.encode(SAID, add_special_tokens=False))
    before = count(served)
    plain = bls(served, streaming=streaming, num_draft_tokens=0)
    assert not seen(served, "tensorrt_llm_draft", before)
    before = count(served)
    pieces: list[str] = []
    drafted = bls(served, streaming=streaming, on_text=pieces.append)
    assert drafted.text == plain.text == SAID
    assert drafted.num_output_tokens == length
    assert "\ufffd" not in "".join(pieces)
    assert (len(pieces) > 5) is streaming
    rounds, drafts = seen(served, "tensorrt_llm", before), seen(served, "tensorrt_llm_draft", before)
    assert length / (DRAFT_TOKENS + 1) <= len(rounds) < length / 2
    assert len(drafts) in (len(rounds), len(rounds) - 1)
    assert [one["request_output_len"] for one in drafts][:2] == [[DRAFT_TOKENS]] * 2
    assert [len(one["draft_input_ids"][0]) for one in rounds][:2] == [DRAFT_TOKENS] * 2
    assert rounds[1]["input_lengths"] == [len(rounds[1]["input_ids"][0])], "a scalar with a batch dimension"


def test_the_draft_s_logits_reach_the_engine(served: RestartingServer) -> None:
    before = count(served)
    assert bls(served, streaming=False, num_draft_tokens=3, use_draft_logits=True).text == SAID
    rounds = seen(served, "tensorrt_llm", before)
    assert len(rounds[0]["draft_input_ids"][0]) == len(rounds[0]["draft_logits"][0]) == 3


def test_a_stop_word_in_the_text_ends_the_rounds(served: RestartingServer) -> None:
    before = count(served)
    assert bls(served, streaming=False, stop_words=["said"]).text == SAID[: SAID.index("said") + 4]
    asked = len(seen(served, "tensorrt_llm", before))
    before = count(served)
    bls(served, streaming=False)
    assert asked < len(seen(served, "tensorrt_llm", before))


def test_requests_that_cannot_be_met_are_refused(served: RestartingServer) -> None:
    for inputs, sentence in (
        ({"num_draft_tokens": 9}, "num_draft_tokens: 9 is out of range; ask for 0 to 5"),
        ({"num_draft_tokens": 2, "beam_width": 2}, "beam_width: does not go together with drafts"),
    ):
        with pytest.raises((RequestError, ToolError), match=sentence):
            bls(served, streaming=False, **inputs)


def test_the_ensemble_asks_the_engine_alone(served: RestartingServer) -> None:
    before = count(served)
    found = ask(served.http_url, "hello", model="ensemble", layout=ENSEMBLE, streaming=False, max_tokens=100)
    assert found.text == SAID
    assert not seen(served, "tensorrt_llm_draft", before)


def test_an_engine_that_has_lost_an_adapter_gets_its_arrays(served: RestartingServer) -> None:
    before = count(served)
    assert bls(served, streaming=True, lora_task_id=1).text == SAID
    first, second = seen(served, "tensorrt_llm", before)
    assert "lora_weights" not in first
    assert second["lora_task_id"] == first["lora_task_id"] == [1]
    assert (second["lora_weights"], second["lora_config"]) == ([[[0.5] * 3] * 2], [[[1, 0, 1], [1, 1, 1]]])
    assert not seen(served, "tensorrt_llm_draft", before), "rounds of drafts take no adapter"
    with pytest.raises((RequestError, ToolError), match="LoRA task 9 not found in cache"):
        bls(served, streaming=False, lora_task_id=9)
