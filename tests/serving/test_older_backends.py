"""Repositories for the C++ backend of 0.17 to 0.19, whose inputs have other names, and which has fewer.

`UPSTREAM` are the tensors of triton-inference-server/tensorrtllm_backend, all_models/inflight_batcher_llm/tensorrt_llm/
config.pbtxt at the tags v0.17.0 (368eea9b, the same as v0.18.0 to v0.18.2) and v0.19.0 (c1e19638).
"""

from __future__ import annotations

import http.client
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llm_helpers import spec
from model_repo.ensemble.question import parse
from restarting import RestartingServer

from serving.test_ensemble_tensorrtllm import SAID, STAND_IN
from trtbuild.adapters.triton import check_repository, render_repository
from trtbuild.adapters.triton_config import parse as parse_config
from trtbuild.adapters.triton_parameters import EngineParameters
from trtbuild.errors import RequestError
from trtbuild.releases import lines
from trtbuild.serving.client import ask
from trtbuild.serving.contract import ENSEMBLE

_INPUTS_017 = """
    input_ids encoder_input_features encoder_output_lengths input_lengths request_output_len num_return_sequences
    draft_input_ids decoder_input_ids decoder_input_lengths draft_logits draft_acceptance_threshold end_id pad_id
    stop_words_list bad_words_list embedding_bias beam_width temperature runtime_top_k runtime_top_p runtime_top_p_min
    runtime_top_p_decay runtime_top_p_reset_ids len_penalty early_stopping repetition_penalty min_length
    beam_search_diversity_rate presence_penalty frequency_penalty random_seed return_log_probs return_context_logits
    return_generation_logits return_kv_cache_reuse_stats exclude_input_in_output stop streaming prompt_embedding_table
    prompt_table_extra_ids prompt_vocab_size cross_attention_mask lora_task_id lora_weights lora_config
    context_phase_params skip_cross_attn_blocks retention_token_range_starts retention_token_range_ends
    retention_token_range_priorities retention_token_range_durations_ms retention_decode_priority
    retention_decode_duration_ms
"""
_OUTPUTS_017 = """
    output_ids sequence_length cum_log_probs output_log_probs context_logits generation_logits batch_index
    sequence_index context_phase_params kv_cache_alloc_new_blocks kv_cache_reused_blocks kv_cache_alloc_total_blocks
"""
_INPUTS_019 = (
    _INPUTS_017.replace("return_kv_cache_reuse_stats", "return_perf_metrics")
    + """
    mrope_rotary_cos_sin mrope_position_deltas guided_decoding_guide_type guided_decoding_guide lookahead_window_size
    lookahead_ngram_size lookahead_verification_set_size
"""
)
_OUTPUTS_019 = (
    _OUTPUTS_017
    + """
    arrival_time_ns first_scheduled_time_ns first_token_time_ns last_token_time_ns acceptance_rate
    total_accepted_draft_tokens total_draft_tokens
"""
)
UPSTREAM = {
    "0.17": (_INPUTS_017, _OUTPUTS_017),
    "0.18": (_INPUTS_017, _OUTPUTS_017),
    "0.19": (_INPUTS_019, _OUTPUTS_019),
}


def made(line: str | None, *, draft: bool = False) -> Any:
    engine = EngineParameters(gpt_model_path="/package/engine")
    more = {"draft": engine, "draft_tokens": 3} if draft else {}
    whole = replace(spec(layout="ensemble", max_batch_size=8), runtime="trtllm-engine", engine=engine)
    return replace(whole, engine_line=line, **more)


def test_these_lines_alone_are_older() -> None:
    assert {line.name for line in lines() if line.older is not None} == set(UPSTREAM)


@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("line", UPSTREAM)
def test_the_tensors_are_those_of_the_tag(line: str, draft: bool, package: Path, tmp_path: Path) -> None:
    shutil.copytree(package / "engine", tmp_path / "engine")
    repository = tmp_path / "model_repository"
    render_repository(made(line, draft=draft), repository)
    assert check_repository(repository, engine=None) == []
    inputs, outputs = (set(names.split()) for names in UPSTREAM[line])
    for model in ("tensorrt_llm", *(["tensorrt_llm_draft"] if draft else [])):
        config = parse_config((repository / model / "config.pbtxt").read_text(encoding="utf-8"))
        assert {tensor.name for tensor in config.input} == inputs
        assert {tensor.name for tensor in config.output} == outputs
    asked = parse_config((repository / "tensorrt_llm_bls" / "config.pbtxt").read_text(encoding="utf-8"))
    assert {"seed", "min_tokens", "return_perf_metrics"} <= {tensor.name for tensor in asked.input}, "clients' names"
    assert {tensor.name for tensor in asked.output} - {"text_output"} <= outputs
    refused = asked.parameters["engine_lacks"].string_value.split(",")
    assert ("guided_decoding_guide" in refused) is (line != "0.19"), "declared, and refused"


def test_a_repository_of_another_line_is_found_out(package: Path, tmp_path: Path) -> None:
    shutil.copytree(package / "engine", tmp_path / "engine")
    repository = tmp_path / "model_repository"
    render_repository(made("0.18"), repository)
    config = repository / "tensorrt_llm" / "config.pbtxt"
    config.write_text(config.read_text().replace('string_value: "0.18"', 'string_value: "0.19"'))
    said = "\n".join(map(str, check_repository(repository, engine=None)))
    assert (
        "tensorrt_llm/config.pbtxt: input guided_decoding_guide of the ensemble layout is missing; put it back" in said
    )
    config.write_text(config.read_text().replace('"random_seed"', '"seed"'))
    assert "maps seed to the input random_seed, which the model tensorrt_llm does not have" in "\n".join(
        map(str, check_repository(repository, engine=None))
    )


def test_outputs_that_the_backend_lacks_are_not_asked_for() -> None:
    import numpy as np

    inputs = {"text_input": np.array([[b"a"]], object), "max_tokens": np.array([[3]], np.int32)}
    inputs["return_perf_metrics"] = np.array([[True]])
    declared = frozenset(("kv_cache_reused_blocks", "text_output"))
    asked = parse(inputs, streaming=False, declared=declared).engine_outputs
    assert asked == ("output_ids", "sequence_length", "kv_cache_reused_blocks")
    assert len(parse(inputs, streaming=False).engine_outputs) > 5


@pytest.fixture(scope="module")
def served(package: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Iterator[RestartingServer]:
    root = tmp_path_factory.mktemp("older")
    shutil.copytree(package / "engine", root / "engine")
    render_repository(made("0.18"), root / "model_repository")
    model = root / "model_repository" / "tensorrt_llm"
    config = model / "config.pbtxt"
    config.write_text(config.read_text().replace('backend: "tensorrtllm"', 'backend: "python"'))
    (model / "1" / "model.py").write_text(STAND_IN)
    (model / "tokens.json").write_text(json.dumps(tokenizer.encode(SAID, add_special_tokens=False)))
    with RestartingServer(root / "model_repository", root / "log") as running:
        yield running


def post(served: RestartingServer, model: str, **inputs: Any) -> Any:
    connection = http.client.HTTPConnection(served.address, served.ports.http, timeout=60)
    body = json.dumps({"text_input": "hello", "max_tokens": 100, "stream": False} | inputs)
    connection.request("POST", f"/v2/models/{model}/generate", body, {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer


@pytest.mark.triton
@pytest.mark.bls
@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
def test_clients_keep_their_names(served: RestartingServer, model: str) -> None:
    answer = post(served, model, seed=7, min_tokens=2, return_perf_metrics=True)
    assert answer["text_output"] == SAID, answer
    text = (served.log.parent / "seen.jsonl").read_text(encoding="utf-8")
    request = next(one for one in map(json.loads, reversed(text.splitlines())) if "input_ids" in one)
    found = (request["random_seed"], request["min_length"], request["return_kv_cache_reuse_stats"])
    assert json.loads(json.dumps(found)) in ([[7], [2], [True]], [[[7]], [[2]], [[True]]], [[7], [2], [1]]), request
    assert not {"seed", "min_tokens", "return_perf_metrics"} & set(request)
    if model == "tensorrt_llm_bls":
        refused = post(served, model, guided_decoding_guide_type="json")
        assert "guided_decoding_guide_type: the backend of this package's TensorRT-LLM has no such" in refused["error"]
    for url in (served.grpc_url, served.http_url):
        assert ask(url, "hello", model=model, layout=ENSEMBLE, streaming=False, max_tokens=100).text == SAID
    with pytest.raises(RequestError, match="unexpected inference input 'return_num_output_tokens'"):
        ask(served.grpc_url, "hello", model=model, layout=ENSEMBLE, max_tokens=3, return_num_output_tokens=True)
