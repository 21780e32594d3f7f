"""The five models of layout `ensemble` offline: what upstream declares, and a sentence for every way to break them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llm_helpers import spec
from model_repo.ensemble.inflight import REFUSED
from model_repo.ensemble.question import ASKED_BY, PREPARED, TO_ENGINE, TO_PREPROCESSING
from model_repo.ensemble.tensors import CLIENT_OUTPUTS, ENGINE_OUTPUTS

from trtbuild.adapters import triton_config
from trtbuild.adapters.triton import check_repository, render_repository
from trtbuild.adapters.triton_parameters import (
    KEYS,
    EngineParameters,
    device_problems,
    from_runtime,
    parameter_problems,
)
from trtbuild.errors import RecipeError

MODELS = ("ensemble", "postprocessing", "preprocessing", "tensorrt_llm", "tensorrt_llm_bls")
SPEC = spec(layout="ensemble", max_batch_size=8)
ENGINE = EngineParameters("/package/engine")
CPP = replace(SPEC, runtime="trtllm-engine", engine=ENGINE)

# What upstream's config.pbtxt of `tensorrt_llm` declares, by type and dims ("s": reshaped to a scalar).
# NVIDIA/TensorRT-LLM triton_backend/all_models/inflight_batcher_llm/tensorrt_llm/config.pbtxt @2a9abd95.
UPSTREAM_INPUTS = {
    "INT32 [1]s": "input_lengths request_output_len num_return_sequences decoder_input_lengths encoder_output_lengths "
    "end_id pad_id beam_width runtime_top_k runtime_top_p_reset_ids min_tokens prompt_vocab_size",
    "INT32 [1]": "lookahead_window_size lookahead_ngram_size lookahead_verification_set_size "
    "retention_decode_priority retention_decode_duration_ms",
    "INT32 [-1]": "input_ids draft_input_ids decoder_input_ids retention_token_range_starts retention_token_range_ends "
    "retention_token_range_priorities retention_token_range_durations_ms",
    "INT32 [2, -1]": "stop_words_list bad_words_list",
    "INT32 [-1, 3]": "lora_config",
    "FP32 [1]s": "draft_acceptance_threshold temperature runtime_top_p runtime_top_p_min runtime_top_p_decay "
    "len_penalty repetition_penalty beam_search_diversity_rate presence_penalty frequency_penalty",
    "FP32 [-1]": "embedding_bias mrope_rotary_cos_sin",
    "BOOL [1]s": "early_stopping return_log_probs return_context_logits return_generation_logits return_perf_metrics "
    "return_num_input_tokens return_num_output_tokens exclude_input_in_output stop streaming",
    "BOOL [1]": "skip_cross_attn_blocks",
    "BOOL [-1, -1]": "cross_attention_mask",
    "UINT64 [1]s": "seed lora_task_id",
    "UINT64 [-1]": "prompt_table_extra_ids",
    "INT64 [1]": "mrope_position_deltas",
    "FP16 [-1, -1]": "lora_weights encoder_input_features prompt_embedding_table",
    "FP32 [-1, -1]": "draft_logits",
    "UINT8 [-1]": "context_phase_params",
    "STRING [1]": "guided_decoding_guide_type guided_decoding_guide",
}
UPSTREAM_OUTPUTS = {
    "INT32 [-1, -1]": "output_ids",
    "INT32 [-1]": "sequence_length",
    "FP32 [-1]": "cum_log_probs",
    "FP32 [-1, -1]": "output_log_probs context_logits",
    "FP32 [-1, -1, -1]": "generation_logits",
    "INT32 [1]": "batch_index sequence_index kv_cache_alloc_new_blocks kv_cache_reused_blocks "
    "kv_cache_alloc_total_blocks total_accepted_draft_tokens total_draft_tokens num_input_tokens num_output_tokens",
    "UINT8 [-1]": "context_phase_params",
    "INT64 [1]": "arrival_time_ns first_scheduled_time_ns first_token_time_ns last_token_time_ns",
    "FP32 [1]": "acceptance_rate",
}
UPSTREAM_PARAMETERS = [
    "max_beam_width",
    "FORCE_CPU_ONLY_INPUT_TENSORS",
    "gpt_model_type",
    "gpt_model_path",
    "encoder_model_path",
    "max_tokens_in_paged_kv_cache",
    "max_attention_window_size",
    "sink_token_length",
    "batch_scheduler_policy",
    "kv_cache_free_gpu_mem_fraction",
    "cross_kv_cache_fraction",
    "kv_cache_host_memory_bytes",
    "kv_cache_onboard_blocks",
    "exclude_input_in_output",
    "cancellation_check_period_ms",
    "stats_check_period_ms",
    "iter_stats_max_iterations",
    "request_stats_max_iterations",
    "enable_kv_cache_reuse",
    "normalize_log_probs",
    "enable_chunked_context",
    "gpu_device_ids",
    "participant_ids",
    "num_nodes",
    "lora_cache_optimal_adapter_size",
    "lora_cache_max_adapter_size",
    "lora_cache_gpu_memory_fraction",
    "lora_cache_host_memory_bytes",
    "lora_prefetch_dir",
    "decoding_mode",
    "executor_worker_path",
    "lookahead_window_size",
    "lookahead_ngram_size",
    "lookahead_verification_set_size",
    "medusa_choices",
    "eagle_choices",
    "gpu_weights_percent",
    "enable_context_fmha_fp32_acc",
    "multi_block_mode",
    "cuda_graph_mode",
    "cuda_graph_cache_size",
    "speculative_decoding_fast_logits",
    "tokenizer_dir",
    "guided_decoding_backend",
    "xgrammar_tokenizer_info_path",
]


def model(root: Path, name: str) -> triton_config.Model:
    found, problems = triton_config.read_model(root / name)
    assert found is not None, problems
    assert not problems
    return found


def shapes(tensors: Any) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for tensor in tensors:
        scalar = "s" if tensor.HasField("reshape") else ""
        key = f"{triton_config.type_name(tensor).removeprefix('TYPE_')} {list(tensor.dims)}{scalar}"
        found.setdefault(key, set()).add(tensor.name)
    return found


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repositories of every form: embedded, C++ backend, the container's python model."""
    root = tmp_path_factory.mktemp("forms")
    render_repository(SPEC, root / "embedded")
    render_repository(CPP, root / "tensorrtllm")
    render_repository(replace(CPP, engine=replace(ENGINE, backend="python")), root / "python")
    return root


@pytest.mark.parametrize("form", ["embedded", "tensorrtllm", "python"])
def test_the_engine_model_declares_upstream_s_tensors(rendered: Path, form: str) -> None:
    config = model(rendered / form, "tensorrt_llm").config
    outputs = shapes(config.output)
    if form == "embedded":  # what our postprocessing needs beside them
        outputs["INT32 [-1]"].remove("context_ids")
        assert outputs["BOOL [1]"] == {"finished"}
        del outputs["BOOL [1]"]
    assert shapes(config.input) == {key: set(names.split()) for key, names in UPSTREAM_INPUTS.items()}
    assert outputs == {key: set(names.split()) for key, names in UPSTREAM_OUTPUTS.items()}
    assert {tensor.name for tensor in config.input if not tensor.optional} == {"input_lengths", "request_output_len"}
    assert config.max_batch_size == 8
    assert config.dynamic_batching.preferred_batch_size == [8]
    assert config.model_transaction_policy.decoupled


def test_every_parameter_of_upstream_is_written_or_named_as_unset(rendered: Path) -> None:
    assert set(KEYS) == set(UPSTREAM_PARAMETERS)
    for form in ("tensorrtllm", "python"):
        written = {
            name: value.string_value for name, value in model(rendered / form, "tensorrt_llm").config.parameters.items()
        }
        text = (rendered / form / "tensorrt_llm" / "config.pbtxt").read_text()
        unset = set(text.split("# default:")[1].split("parameters")[0].replace("#", " ").replace(",", " ").split())
        assert set(written) - {"container_model_py"} | unset >= set(UPSTREAM_PARAMETERS)
        assert not set(written) & set(ENGINE.unset())
        empty = {name for name, value in written.items() if not value}
        assert empty == {"tokenizer_dir", "guided_decoding_backend", "xgrammar_tokenizer_info_path"}
        assert "${" not in text


def test_the_forms_differ_in_backend_and_code(rendered: Path) -> None:
    backends = {form.name: model(form, "tensorrt_llm").config.backend for form in rendered.iterdir()}
    assert backends == {"embedded": "python", "tensorrtllm": "tensorrtllm", "python": "python"}
    assert [path.name for path in (rendered / "tensorrtllm/tensorrt_llm/1").iterdir()] == [".keep"]
    files = {path.name for path in (rendered / "python/tensorrt_llm/1").iterdir()}
    assert files == {"model.py", "settings.py", "__pycache__"}
    for form in ("tensorrtllm", "python"):
        code = "".join(path.read_text() for path in (rendered / form).rglob("*.py"))
        assert not re.search(r"^\s*(?:from|import) trtbuild", code, re.MULTILINE), "runs without trtbuild"


def test_names_in_code_and_templates_agree(rendered: Path) -> None:
    root = rendered / "embedded"
    names = {
        name: ({t.name for t in model(root, name).config.input}, {t.name for t in model(root, name).config.output})
        for name in MODELS
    }
    types = {t.name: triton_config.type_name(t) for t in model(root, "tensorrt_llm").config.output}
    assert types == ENGINE_OUTPUTS
    for chain in ("ensemble", "tensorrt_llm_bls"):
        outputs = {t.name: triton_config.type_name(t) for t in model(root, chain).config.output}
        assert outputs == CLIENT_OUTPUTS
        assert not [t.name for t in model(root, chain).config.input if not t.optional]
    bls = names["tensorrt_llm_bls"][0]
    own = {"exclude_input_in_output", "stream", "image_input", "num_draft_tokens", "use_draft_logits"}
    assert set(TO_PREPROCESSING) | set(TO_ENGINE) | own == bls, "every input is read"
    assert set(TO_PREPROCESSING.values()) <= names["preprocessing"][0]
    assert set(TO_ENGINE.values()) | set(PREPARED.values()) | set(REFUSED) <= names["tensorrt_llm"][0]
    assert set(PREPARED) <= names["preprocessing"][1]
    assert {name for asked in ASKED_BY.values() for name in asked} <= names["tensorrt_llm"][1]
    assert names["ensemble"][0] == bls - own | {"exclude_input_in_output", "stream"} - {
        "image_bytes_input", "image_url_input", "video_bytes_input",
    } or names["ensemble"][0] < bls  # fmt: skip


def test_parameters_follow_from_the_runtime_section() -> None:
    runtime = {
        "tensor_parallel_size": 2, "pipeline_parallel_size": 2, "capacity_scheduler_policy": "MAX_UTILIZATION",
        "enable_chunked_prefill": True,
        "kv_cache": {"max_tokens": 4096, "free_gpu_memory_fraction": 0.8, "enable_block_reuse": False},
    }  # fmt: skip
    made = from_runtime(runtime, "/package/engine", gpu_device_ids=((0, 1, 2, 3), (4, 5, 6, 7)), max_beam_width=4)
    written = made.written()
    assert made.world_size == 4
    assert {name: written[name] for name in (
        "batch_scheduler_policy", "enable_chunked_context", "max_tokens_in_paged_kv_cache", "enable_kv_cache_reuse",
        "kv_cache_free_gpu_mem_fraction", "gpu_device_ids", "max_beam_width", "gpt_model_path",
    )} == {
        "batch_scheduler_policy": "max_utilization", "enable_chunked_context": "true", "enable_kv_cache_reuse": "false",
        "max_tokens_in_paged_kv_cache": "4096", "kv_cache_free_gpu_mem_fraction": "0.8", "max_beam_width": "4",
        "gpu_device_ids": "0,1,2,3;4,5,6,7", "gpt_model_path": "/package/engine",
    }  # fmt: skip
    assert parameter_problems(written, "x") == device_problems(written, "x", 4) == []


def test_speculative_parameters_are_written_as_upstream_reads_them() -> None:
    medusa = replace(ENGINE, decoding_mode="medusa", medusa_choices=((0,), (0, 0), (1,)))
    assert medusa.written()["medusa_choices"] == "{0}, {0, 0}, {1}"
    lookahead = replace(
        ENGINE, decoding_mode="lookahead", lookahead_window_size=7, lookahead_ngram_size=5,
        lookahead_verification_set_size=7, max_attention_window_size=(4096, 1024),
    )  # fmt: skip
    assert lookahead.written()["max_attention_window_size"] == "4096,1024"
    for made in (medusa, lookahead):
        assert parameter_problems(made.written(), "x") == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gpt_model_type": None}, "parameter gpt_model_type is missing"),
        ({"guided_decoding_backend": None}, "parameter guided_decoding_backend is missing"),
        ({"gpt_model_path": ""}, "parameter gpt_model_path is empty; write a path, or leave it out"),
        ({"gpt_model_path": "../../engine"}, "and a server looks for it from where it was started"),
        ({"lora_prefetch_dir": ""}, "parameter lora_prefetch_dir is empty"),
        (
            {"kv_cache_free_gpu_memory_fraction": "0.9"},
            "would be ignored; did you mean kv_cache_free_gpu_mem_fraction?",
        ),
        (
            {"kv_cache_free_gpu_mem_fraction": "90"},
            "kv_cache_free_gpu_mem_fraction is '90'; allowed is a number above 0",
        ),
        ({"batch_scheduler_policy": "MAX_UTILIZATION"}, "allowed is guaranteed_no_evict or max_utilization"),
        ({"enable_chunked_context": "yes"}, "parameter enable_chunked_context is 'yes'; allowed is true or false"),
        ({"max_tokens_in_paged_kv_cache": "many"}, "allowed is a whole number above 0"),
        ({"decoding_mode": "greedy"}, "allowed is one of top_k, top_p"),
        ({"decoding_mode": "lookahead"}, "lookahead decoding lacks lookahead_window_size, lookahead_ngram_size"),
        ({"lookahead_ngram_size": "3"}, "lookahead decoding lacks lookahead_window_size, lookahead_verification"),
        (
            {"medusa_choices": "{0}, {1}"},
            "medusa_choices is set and decoding_mode is None; write decoding_mode: medusa",
        ),
        ({"eagle_choices": "0, 1", "decoding_mode": "eagle"}, "allowed is paths such as {0, 0}, {0, 1}"),
        ({"max_beam_width": "4", "decoding_mode": "top_k"}, "max_beam_width is 4 and decoding_mode is top_k"),
        ({"gpu_device_ids": "0;1"}, "gpu_device_ids gives 1 GPUs in '0', and the engine has 2 ranks"),
        ({"gpu_device_ids": "1,1"}, "gpu_device_ids names a GPU twice in '1,1'"),
        ({"gpu_device_ids": "all"}, "ids such as 0,1;2,3"),
        ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend is set without the tokenizer that it needs"),
    ],
)
def test_wrong_parameters_have_sentences(change: dict[str, str | None], sentence: str) -> None:
    given = {name: text for name, text in (ENGINE.written() | change).items() if text is not None}
    where = "tensorrt_llm/config.pbtxt"
    problems = [str(problem) for problem in parameter_problems(given, where) + device_problems(given, where, 2)]
    assert any(sentence in problem for problem in problems), problems


Change = Callable[[Path], Any]


@pytest.fixture
def copy(package: Path, tmp_path: Path) -> Path:
    """The tiny package in layout `ensemble`, to be broken."""
    shutil.copytree(package / "engine", tmp_path / "engine")
    render_repository(SPEC, tmp_path / "model_repository")
    return tmp_path


def config(name: str, old: str, new: str) -> Change:
    def change(package: Path) -> None:
        path = package / "model_repository" / name / "config.pbtxt"
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


def remove(name: str) -> Change:
    def change(package: Path) -> None:
        path = package / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def engine_json(**changes: Any) -> Change:
    def change(package: Path) -> None:
        path = package / "engine" / "engine.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")

    return change


R = "model_repository"
DECOUPLED = "model_transaction_policy { decoupled: true }"
FAULTS: dict[str, tuple[Change, str]] = {
    "model missing": (remove(f"{R}/postprocessing"), "the model is missing, and the ensemble layout consists of"),
    "bls missing": (remove(f"{R}/tensorrt_llm_bls"), "tensorrt_llm_bls: the model is missing"),
    "module missing": (remove(f"{R}/tensorrt_llm_bls/1/chain.py"), "imports chain.py, which is missing"),
    "shared module missing": (remove(f"{R}/preprocessing/1/text.py"), "imports text.py, which is missing"),
    "step renamed": (config("ensemble", '"postprocessing"', '"post"'), "uses the model 'post', which is not in this"),
    "name in a map": (config("ensemble", 'key: "INPUT_ID"', 'key: "INPUT_IDS"'), "maps _INPUT_ID to the output INPUT_"),
    "type in a chain": (config("preprocessing", '"INPUT_ID" data_type: TYPE_INT32', '"INPUT_ID" data_type: TYPE_INT64'),
                        "the tensor _INPUT_ID is TYPE_INT64 as output INPUT_ID of preprocessing"),
    "client type": (config("ensemble", '"top_p" data_type: TYPE_FP32', '"top_p" data_type: TYPE_INT32'),
                    "input top_p is TYPE_INT32 [1], and the model sends and reads TYPE_FP32 [1]"),
    "engine dims": (config("tensorrt_llm", '"stop_words_list" data_type: TYPE_INT32 dims: [ 2, -1 ]',
                           '"stop_words_list" data_type: TYPE_INT32 dims: [ -1 ]'), "stop_words_list is TYPE_INT32 [-"),
    "scalar": (config("tensorrt_llm", '"seed" data_type: TYPE_UINT64 dims: [ 1 ] reshape: { shape: [ ] }',
                      '"seed" data_type: TYPE_UINT64 dims: [ 1 ]'), "and the model sends and reads TYPE_UINT64 [1] re"),
    "required": (config("tensorrt_llm_bls", '"max_tokens" data_type: TYPE_INT32 dims: [ 1 ] optional: true',
                        '"max_tokens" data_type: TYPE_INT32 dims: [ 1 ]'), "input max_tokens is not optional, and cli"),
    "output gone": (config("tensorrt_llm", '"context_ids"', '"context"'), "output context_ids of the ensemble layout"),
    "bls not decoupled": (config("tensorrt_llm_bls", DECOUPLED, DECOUPLED.replace("true", "false")),
                          "decoupled is false, and tensorrt_llm has true"),
    "streaming differs": (config("tensorrt_llm", 'key: "streaming" value { string_value: "true" }',
                                 'key: "streaming" value { string_value: "false" }'), "parameter streaming is 'false'"),
    "batch differs": (config("preprocessing", "max_batch_size: 8", "max_batch_size: 4"),
                      "max_batch_size is 4, and tensorrt_llm has 8"),
    "limit differs": (config("preprocessing", '"400"', '"300"'), "parameter max_input_tokens is '400', and preprocess"),
    "limit over engine": (engine_json(max_seq_len=256), "max_seq_len is 512, and the engine's is 256"),
    "runtime differs": (config("tensorrt_llm_bls", '"embedded"', '"trtllm"'), "parameter runtime is 'trtllm', and ens"),
    "engine runtime": (engine_json(runtime="trtllm"), "the repository is for the runtime embedded, engine.json for tr"),
    "tokenizer_dir": (config("postprocessing", '"../../engine"', '"../engine"'), "tokenizer_dir '../engine'"),
    "tokenizer file": (remove("engine/tokenizer.json"), "engine: there are no tokenizer files"),
    "engine gone": (remove("engine"), "there is no directory"),
    "accumulate": (config("tensorrt_llm_bls", 'key: "accumulate_tokens" value { string_value: "true" }',
                          'key: "accumulate_tokens" value { string_value: "false" }'), "write true: pieces decoded on"),
    "engine's name in bls": (config("tensorrt_llm_bls", 'value { string_value: "tensorrt_llm" }',
                                    'value { string_value: "llama" }'), "tensorrt_llm_model_name is 'llama', which is"),
    "draft model": (config("tensorrt_llm_bls", '_draft_model_name" value { string_value: "" }',
                           '_draft_model_name" value { string_value: "draft" }'), "'draft', which is not in this rep"),
    "two postprocessors": (config("postprocessing", "count: 1", "count: 2"), "the pieces of a stream could overtake e"),
    "GPU instance": (config("tensorrt_llm", "KIND_CPU", "KIND_GPU"), "the instance group has kind KIND_GPU; use KIND_"),
    "parameter gone": (config("preprocessing", 'key: "default_max_tokens"', 'key: "x"'), "default_max_tokens is missi"),
    "placeholder": (config("tensorrt_llm", "max_queue_size: 0", "max_queue_size: ${max_queue_size}"), "${max_queue_si"),
    "zero limit": (config("preprocessing", '"300"', '"0"'), "parameter max_output_tokens is '0'"),
    "ensemble input gone": (config("ensemble", '{ name: "seed"', '{ name: "sead"'), "input seed of the ensemble layou"),
}  # fmt: skip


@pytest.mark.parametrize("engine", [True, False])
def test_the_rendered_repository_has_no_fault(copy: Path, engine: bool) -> None:
    found = check_repository(copy / "model_repository", engine=copy / "engine" if engine else None)
    assert found == []


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_a_sentence(fault: str, copy: Path) -> None:
    change, sentence = FAULTS[fault]
    change(copy)
    problems = [str(problem) for problem in check_repository(copy / "model_repository", engine=None)]
    assert any(sentence in problem for problem in problems), problems
    assert all("; " in problem for problem in problems), "every sentence says what to do"


BUILT = {
    "version": "1.2.1",
    "pretrained_config": {"architecture": "LlamaForCausalLM", "mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1}},
    "build_config": {
        "max_batch_size": 8, "max_seq_len": 512, "max_input_len": 400, "max_beam_width": 1,
        "speculative_decoding_mode": "NONE", "plugin_config": {"use_paged_context_fmha": True},
    },
}  # fmt: skip


def built(package: Path, **build: Any) -> Path:
    """The tokenizer of the tiny package beside what `trtllm-build` leaves, for two ranks."""
    engine = package / "engine"
    data = json.loads(json.dumps(BUILT))
    data["build_config"] |= build
    (engine / "config.json").write_text(json.dumps(data))
    (engine / "engine.json").unlink()
    for rank in range(2):
        (engine / f"rank{rank}.engine").touch()
    shutil.rmtree(package / "model_repository")
    return engine


@pytest.mark.parametrize(
    ("parameters", "build", "sentence"),
    [
        ({}, {}, None),
        ({}, {"max_batch_size": 4}, "max_batch_size is 8, and the engine is for 4; at most 4"),
        ({"max_beam_width": 2}, {}, "max_beam_width is 2, and the engine is for 1"),
        ({}, {"max_seq_len": 256}, "max_seq_len is 512, and the engine is for max_seq_len 256"),
        ({}, {"max_input_len": 100}, "max_input_tokens is 400, and the engine is for max_input_len 100"),
        ({}, {"plugin_config": {"use_paged_context_fmha": False}}, "enable_kv_cache_reuse is true, and the engine was"),
        ({}, {"speculative_decoding_mode": "MEDUSA"}, "decoding_mode is None, and the engine was built for medusa"),
        ({"decoding_mode": "eagle"}, {}, "decoding_mode is eagle, and the engine was built without it"),
        ({"gpu_device_ids": ((0,),)}, {}, "gpu_device_ids gives 1 GPUs in '0', and the engine has 2 ranks"),
    ],
)
@pytest.mark.parametrize("backend", ["tensorrtllm", "python"])
def test_a_tensorrt_engine_against_its_repository(
    copy: Path, parameters: dict[str, Any], build: dict[str, Any], sentence: str | None, backend: Any
) -> None:
    engine = built(copy, **build)
    made = replace(ENGINE, backend=backend, tensor_parallel_size=2, **parameters)
    render_repository(replace(CPP, engine=made), copy / "model_repository")
    problems = [str(problem) for problem in check_repository(copy / "model_repository", engine=engine)]
    assert (not problems) if sentence is None else any(sentence in problem for problem in problems), problems
    (engine / "rank1.engine").unlink()
    problems = [str(problem) for problem in check_repository(copy / "model_repository", engine=engine)]
    assert any("engine/rank1.engine: the file is missing, and the engine has 2 ranks" in one for one in problems)


def test_hand_edits_of_an_engine_s_repository_are_found(tmp_path: Path, package: Path) -> None:
    shutil.copytree(package / "engine", tmp_path / "engine")
    render_repository(CPP, tmp_path / "model_repository")
    assert check_repository(tmp_path / "model_repository", engine=None) == []
    for old, new, sentence in [
        ('"guaranteed_no_evict"', '"max_utilisation"', "batch_scheduler_policy is 'max_utilisation'"),
        ('key: "enable_chunked_context"', 'key: "chunked_context"', "chunked_context is none of TensorRT-LLM's"),
        ('"inflight_fused_batching"', '"${batching_strategy}"', "unfilled placeholder ${batching_strategy}"),
        ('backend: "tensorrtllm"', 'backend: "tensorrt_llm"', "did you mean 'tensorrtllm'?"),
        (
            'key: "num_nodes" value { string_value: "1"',
            'key: "gpu_device_ids" value { string_value: "0;1"',
            "has 2 groups",
        ),
    ]:
        change = config("tensorrt_llm", old, new)
        change(tmp_path)
        problems = [str(problem) for problem in check_repository(tmp_path / "model_repository", engine=None)]
        assert any(sentence in problem for problem in problems), problems
        config("tensorrt_llm", new, old)(tmp_path)


def test_the_engine_model_of_tensorrt_llm_may_stand_alone(tmp_path: Path) -> None:
    render_repository(replace(CPP, engine=replace(ENGINE, backend="python")), tmp_path)
    for name in MODELS:
        if name != "tensorrt_llm":
            shutil.rmtree(tmp_path / name)
    assert check_repository(tmp_path, engine=None) == []


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (replace(SPEC, runtime="trtllm"), "'trtllm' has no model repository of layout ensemble here"),
        (replace(SPEC, engine=ENGINE), "do not belong together"),
        (replace(SPEC, runtime="trtllm-engine"), "do not belong together"),
        (replace(SPEC, layout="llm", runtime="trtllm-engine", engine=ENGINE), "no model repository of layout llm"),
    ],
)
def test_specs_that_are_no_repository(tmp_path: Path, made: Any, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        render_repository(made, tmp_path)
    assert not list(tmp_path.iterdir())
