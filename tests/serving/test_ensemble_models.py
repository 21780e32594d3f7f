"""The parts of layout `ensemble`'s python models without a server: words, detokenization, limits, answers, the shim."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from model_repo.ensemble import chain as chain_module
from model_repo.ensemble.answer import Answer, Piece
from model_repo.ensemble.chain import Chain, Models
from model_repo.ensemble.detokenize import Detokenizer
from model_repo.ensemble.prompt import Limits, Preprocessor, end_ids
from model_repo.ensemble.question import parse
from model_repo.ensemble.tensorrt_llm_container.model import TritonPythonModel
from model_repo.ensemble.words import pack, unpack
from model_repo.llm.text import Codec
from model_repo.llm.wire import BadRequestError
from test_llm_text import TEXTS, byte_fallback_tokenizer


@pytest.mark.parametrize("words", [[], [[5]], [[5, 6], [7]], [[1], [2, 3], [4, 5, 6]]])
def test_word_lists_there_and_back(words: list[list[int]]) -> None:
    packed = pack(words)
    assert packed.dtype == np.int32
    assert packed.shape[:2] == (1, 2)
    assert unpack({"w": packed}, "w") == tuple(tuple(word) for word in words)
    assert unpack({"w": packed[0]}, "w") == tuple(tuple(word) for word in words), "without the batch dimension"


def test_the_layout_of_word_lists_is_upstream_s() -> None:
    assert pack([[5, 6], [7]]).tolist() == [[[5, 6, 7], [2, 3, -1]]]


@pytest.mark.parametrize(
    "array", [[[[1, 2], [3, -1]]], [[[1, 2], [0, 2]]], [[[1, 2], [2, 1]]], [[1, 2, 3]], [[[1], [1], [1]]]]
)
def test_word_lists_that_make_no_sense(array: Any) -> None:
    with pytest.raises(BadRequestError, match="^w: "):
        unpack({"w": np.array(array, dtype=np.int32)}, "w")


def decode_with(tokenizer: Any) -> Any:
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("remembered", [512, 0])
@pytest.mark.parametrize("text", [text for text in TEXTS if text])
def test_pieces_of_any_size_are_the_whole_text(tokenizer: Any, text: str, remembered: int) -> None:
    """Also when every decoder has been forgotten: the pieces follow from the tokens alone."""
    for one in (tokenizer, byte_fallback_tokenizer()):
        ids = one.encode(text, add_special_tokens=False)
        detokenizer = Detokenizer(decode_with(one), remembered=remembered)
        whole = detokenizer.piece((), ids, finished=True)
        draw, pieces, done = random.Random(7), [], 0
        while done < len(ids):
            step = draw.randint(1, 3)
            context, new = tuple(ids[:done]), ids[done : done + step]
            pieces.append(detokenizer.piece(context, new, finished=False))
            assert "\ufffd" not in pieces[-1] or "\ufffd" in text
            done += step
        pieces.append(detokenizer.piece(tuple(ids), [], finished=True))
        assert "".join(pieces) == whole == decode_with(one)(ids)


def test_the_space_between_pieces_is_kept() -> None:
    """A decoder such as Llama 2's strips the space in front of a text: alone, the second piece would lose it."""
    tokenizer = byte_fallback_tokenizer()
    hello, world = (tokenizer.convert_tokens_to_ids(token) for token in ("▁hello", "▁world"))
    detokenizer = Detokenizer(decode_with(tokenizer))
    pieces = [detokenizer.piece((), [hello], finished=False), detokenizer.piece((hello,), [world], finished=True)]
    assert pieces == ["hello", " world"]
    assert detokenizer.piece((), [world], finished=True) == "world"


def test_requests_of_postprocessing(tokenizer: Any) -> None:
    detokenizer = Detokenizer(decode_with(tokenizer))
    ids = tokenizer.encode("hello")
    batch = np.full((1, 2, len(ids) + 1), -1, dtype=np.int32)
    batch[0, 0, : len(ids)] = ids
    batch[0, 1, 0] = ids[0]
    both = {"TOKENS_BATCH": batch, "SEQUENCE_LENGTH": np.array([[len(ids), 1]], dtype=np.int32)}
    assert detokenizer.texts(both) == ["hello", tokenizer.decode(ids[:1])]
    nothing = {"TOKENS_BATCH": np.zeros((1, 1, 0), np.int32), "SEQUENCE_LENGTH": np.zeros((1, 1), np.int32)}
    assert detokenizer.texts(nothing) == [""]
    with pytest.raises(BadRequestError, match="SEQUENCE_LENGTH: 1 lengths for 2 rows"):
        detokenizer.texts(both | {"SEQUENCE_LENGTH": np.array([[1]], dtype=np.int32)})
    with pytest.raises(BadRequestError, match="CONTEXT_IDS: 2 rows"):
        detokenizer.texts(both | {"FINISHED": np.array([[True]])})


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 2, 9]}, {"eos_token_id": 7}, (2, 7, 9)),
        ({"eos_token_id": 7}, {}, (7,)),
        ({}, {"eos_token_id": 5}, (5,)),
        (None, {"eos_token_id": 5}, (5,)),
        (None, {}, (2,)),
    ],
)
def test_end_tokens_are_the_model_s_with_the_tokenizer_s_first(
    tmp_path: Path, tokenizer: Any, generation: Any, config: Any, expected: tuple[int, ...]
) -> None:
    """Llama 3's chat models name three; their tokenizer's is the one that ends a turn."""
    assert tokenizer.eos_token_id == 2
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert end_ids(tmp_path, tokenizer) == expected


def preprocessor(tokenizer: Any, ends: tuple[int, ...] = (2,)) -> Preprocessor:
    limits = Limits(max_seq_len=64, max_input_tokens=50, max_output_tokens=20, default_max_tokens=16)
    return Preprocessor(Codec(tokenizer, 50), limits, ends=ends, special=True)


def query(text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"QUERY": np.array([[text.encode()]], dtype=np.object_)} | more


def test_what_preprocessing_makes(tokenizer: Any) -> None:
    made = preprocessor(tokenizer).tensors(
        query(STOP_WORDS_DICT=np.array([[b"lo", b""]], dtype=np.object_), END_ID=np.array([[7]], np.int32))
    )
    ids = tokenizer.encode("hello")
    assert made["INPUT_ID"].tolist() == [ids]
    assert made["REQUEST_INPUT_LEN"].tolist() == [[len(ids)]]
    assert made["REQUEST_OUTPUT_LEN"].tolist() == [[16]]
    assert made["OUT_END_ID"].tolist() == [[7]]
    stops = unpack(made, "STOP_WORDS_IDS")
    assert tuple(tokenizer.encode("lo", add_special_tokens=False)) in stops
    assert tuple(tokenizer.encode(" lo", add_special_tokens=False)) in stops
    assert made["BAD_WORDS_IDS"].shape == (1, 2, 0)
    assert made["EMBEDDING_BIAS"].shape == (1, 0)


def test_further_end_tokens_become_stop_words_unless_the_caller_names_one(tokenizer: Any) -> None:
    several = preprocessor(tokenizer, ends=(2, 7, 9))
    made = several.tensors(query())
    assert made["OUT_END_ID"].tolist() == [[2]]
    assert unpack(made, "STOP_WORDS_IDS") == ((7,), (9,))
    assert unpack(several.tensors(query(END_ID=np.array([[-1]], np.int32))), "STOP_WORDS_IDS") == ()


def test_embedding_bias_by_word(tokenizer: Any) -> None:
    more = {
        "EMBEDDING_BIAS_WORDS": np.array([[b"hello", b"x"]], dtype=np.object_),
        "EMBEDDING_BIAS_WEIGHTS": np.array([[0.5, -2.0]], np.float32),
    }
    bias = preprocessor(tokenizer).tensors(query(**more))["EMBEDDING_BIAS"]
    assert bias.shape == (1, len(tokenizer))
    wanted = np.zeros(len(tokenizer), np.float32)
    for word, weight in (("hello", 0.5), ("x", -2.0)):
        for token in tokenizer.encode(word, add_special_tokens=False):
            wanted[token] += weight
    assert bias[0].tolist() == wanted.tolist()


def test_a_batch_in_one_request_is_refused(tokenizer: Any) -> None:
    two = {"QUERY": np.array([[b"a"], [b"b"]], dtype=np.object_)}
    with pytest.raises(BadRequestError, match="QUERY: a batch of 2 prompts in one request is not served"):
        preprocessor(tokenizer).tensors(two)


def test_an_answer_adds_up_its_pieces_and_ends_once() -> None:
    cancelled: list[str] = []
    answer = Answer(request_id="x", streaming=False)
    answer.on_cancel = lambda: cancelled.append("told")
    probs = [np.array([[[value]]], np.float32) for value in (-1.0, -2.0)]
    counts = [np.array([[number]], np.int32) for number in (1, 2)]
    assert not answer.deliver(0, Piece("a", {"output_log_probs": probs[0], "num_output_tokens": counts[0]}))
    assert answer.deliver(0, Piece("b", {"output_log_probs": probs[1], "num_output_tokens": counts[1]}, finished=True))
    answer.deliver(0, Piece("never", finished=True, error=RuntimeError("too late")))
    assert answer.absorb()
    values = answer.values()
    assert values["text_output"] == ["ab"]
    assert values["output_log_probs"].tolist() == [[[-1.0, -2.0]]]
    assert values["num_output_tokens"].tolist() == [[3]]
    assert (answer.finished, answer.error) == (True, None)
    answer.cancel("gone")
    answer.cancel("gone again")
    assert (cancelled, answer.cancelled_by, answer.unwanted.is_set()) == (["told"], "gone", True)


class Blocking:
    """Models that do not stream: the engine's answers only once it is told to stop, as a long whole answer would."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self.asked = threading.Event()
        self.ids: list[str] = []

    def __call__(self, model: str, inputs: Any, outputs: tuple[str, ...], request_id: str = "") -> Any:
        values: dict[str, Any] = {"INPUT_ID": [[5]], "REQUEST_INPUT_LEN": [[1]], "REQUEST_OUTPUT_LEN": [[9]]}
        if model != "preprocessing":
            values = {"OUTPUT": np.array([b"x"], dtype=np.object_)}
        if model == "tensorrt_llm":
            self.ids.append(request_id)
            values = {"output_ids": [[[1]]], "sequence_length": [[1]], "finished": [[True]]}

        def execute() -> Any:
            if model == "tensorrt_llm" and "stop" in inputs:
                self.stopped.set()
                return response({})
            if model == "tensorrt_llm":
                self.asked.set()
                assert self.stopped.wait(10), "nobody told the engine"
            return response(values)

        return SimpleNamespace(exec=execute)


def response(values: dict[str, Any]) -> Any:
    tensors = [
        SimpleNamespace(name=lambda name=name: name, as_numpy=lambda value=value: np.asarray(value))
        for name, value in values.items()
    ]
    return SimpleNamespace(has_error=lambda: False, output_tensors=lambda: tensors)


def test_a_model_that_does_not_stream_is_told_to_stop_from_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    models = Blocking()
    monkeypatch.setattr(chain_module, "_request", models)
    question = parse({"text_input": np.array([[b"a"]], dtype=np.object_)}, streaming=False)
    answer, pieces = Answer(request_id="", streaming=False), []
    work = Chain(Models("tensorrt_llm", decoupled=False, says_finished=True), question, answer, pieces.append)
    thread = threading.Thread(target=work.run)
    thread.start()
    assert models.asked.wait(10)
    work.stop_engine()
    thread.join(10)
    assert not thread.is_alive()
    assert len(models.ids) >= 2
    assert len(set(models.ids)) == 1, "the word to stop carries the request's own id"
    assert pieces[-1].finished


def test_a_request_that_is_unwanted_before_it_starts_never_reaches_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = Blocking()
    monkeypatch.setattr(chain_module, "_request", models)
    question = parse({"text_input": np.array([[b"a"]], dtype=np.object_)}, streaming=True)
    answer, pieces = Answer(request_id="", streaming=True), []
    answer.cancel("gone")
    Chain(Models("tensorrt_llm", decoupled=True, says_finished=True), question, answer, pieces.append).run()
    assert [(piece.finished, piece.cancelled) for piece in pieces] == [(True, True)]
    assert models.ids == []


def shim_arguments(path: Path) -> dict[str, str]:
    parameters = {"container_model_py": {"string_value": str(path)}}
    config = {"parameters": parameters, "model_transaction_policy": {"decoupled": True}}
    return {"model_config": json.dumps(config), "model_name": "tensorrt_llm", "model_repository": str(path.parent)}


def test_the_shim_hands_everything_to_the_container_s_model(tmp_path: Path) -> None:
    container = tmp_path / "model.py"
    container.write_text(
        "class TritonPythonModel:\n"
        "    def initialize(self, args):\n        self.seen = [args['model_name']]\n"
        "    def execute(self, requests):\n        return [self.seen, requests]\n"
        "    def finalize(self):\n        self.seen.append('ended')\n"
    )
    model = TritonPythonModel()
    model.initialize(shim_arguments(container))
    assert model.execute([1, 2]) == [["tensorrt_llm"], [1, 2]]
    model.finalize()
    assert model.execute([]) == [["tensorrt_llm", "ended"], []]
    with pytest.raises(Exception, match=r"there is no such file; start this repository in a container"):
        TritonPythonModel().initialize(shim_arguments(tmp_path / "none.py"))
