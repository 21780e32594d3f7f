"""What trtbuild itself generates: a migration of it gives back the recipe's values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.test_trtllm_plan import EVERYTHING
from migrate.test_old_deployments import at
from trtbuild.adapters import trtllm, trtllm_engine
from trtbuild.adapters.triton import RepositorySpec, render_repository
from trtbuild.adapters.triton_parameters import EngineParameters, from_runtime
from trtbuild.checkpoint_files import open_directory
from trtbuild.manifest import canonical_json, write_atomic
from trtbuild.migrate.legacy import leaves
from trtbuild.migrate.run import Migration, migrate, write_recipe
from trtbuild.model import read_facts
from trtbuild.pipeline import prepare
from trtbuild.plan import Plan, Source
from trtbuild.planner import make_plan
from trtbuild.recipe_file import load_recipe
from trtbuild.toolchain import tool_versions
from trtbuild.yaml_text import yaml_scalar

EMBEDDED = {
    "runtime.max_batch_size": 5,
    "runtime.max_num_tokens": 300,
    "runtime.max_seq_len": 200,
    "runtime.enable_chunked_prefill": False,
    "runtime.capacity_scheduler_policy": "MAX_UTILIZATION",
    "runtime.device": "cpu",
    "runtime.compute_dtype": "float32",
    "runtime.weights": "packed",
    "runtime.kv_cache.free_gpu_memory_fraction": 0.5,
    "runtime.kv_cache.max_tokens": 4096,
    "runtime.kv_cache.tokens_per_block": 64,
    "runtime.kv_cache.enable_block_reuse": False,
    "serving.max_input_tokens": 100,
    "serving.max_output_tokens": 90,
    "serving.default_max_tokens": 33,
    "serving.streaming": False,
    "compress.kv_cache": "fp8",
}
TRTLLM = {
    **EVERYTHING,
    "serving.max_output_tokens": 90,
    "serving.default_max_tokens": 33,
    "serving.streaming": False,
    "serving.model_name": "chat",
    "serving.gpu_device_ids": [[0, 1], [2, 3]],
    "runtime.extra.num_postprocess_workers": 0,
    "runtime.extra.sampler_type": "TorchSampler",
    "runtime.extra.kv_cache_config.event_buffer_max_size": 7,
    "runtime.extra.speculative_config.acceptance_window": 50,
    "speculative.method": "ngram",
    "speculative.max_draft_len": 3,
    "speculative.draft_len_schedule": {1: 3, 16: 0},
    "speculative.max_matching_ngram_size": 4,
    "speculative.is_keep_all": False,
}
del TRTLLM["runtime.context_parallel_size"]  # does not run with speculation


def planned(kind: str, values: dict[str, Any], checkpoint: Path, folder: Path) -> Plan:
    recipe = folder / "source.yaml"
    recipe.write_text(f"schema_version: 1\nmodel: {{path: {checkpoint}}}\nruntime: {{kind: {kind}}}\n")
    loaded = load_recipe(recipe, [f"{path}={yaml_scalar(value)}" for path, value in values.items()])
    return make_plan(loaded, read_facts(open_directory(checkpoint)), Source(str(checkpoint)), tool_versions())


def written(plan: Plan, folder: Path, **changes: Any) -> Path:
    """The engine's own files and the model repository of a plan, as a package places them."""
    engine = folder / "engine"
    engine.mkdir()
    parameters = json.loads(json.dumps(dict(plan.step("engine").parameters)))
    if parameters["runtime"] == "trtllm":
        arguments = trtllm.llm_arguments(parameters)
        write_atomic(engine / trtllm.ARGS_FILE, trtllm.args_text(arguments, parameters))
        write_atomic(engine / trtllm.ENGINE_FILE, canonical_json(trtllm.engine_json(parameters)))
    else:
        write_atomic(engine / trtllm.ENGINE_FILE, canonical_json(parameters))
    spec = RepositorySpec(**dict(plan.step("repository").parameters) | changes)
    render_repository(spec, folder / "model_repository")
    return folder / "model_repository"


def assert_back(values: dict[str, Any], done: Migration, checkpoint: Path, folder: Path) -> None:
    for path, value in values.items():
        assert at(done.document, path) == value, path
    assert [row for row in done.rows if row.is_loss] == []
    write_recipe(done, folder / "recipe.yaml")
    plan = prepare(folder / "recipe.yaml").plan
    for path, value in values.items():
        if not path.startswith("runtime.extra."):
            assert json.dumps(plan.value(path)) == json.dumps(value), path
    assert plan.source.path == str(checkpoint)


@pytest.mark.parametrize("layout", ["llm", "ensemble"])
def test_embedded(layout: str, tiny_llama: Path, tmp_path: Path) -> None:
    values = EMBEDDED | {"serving.layout": layout}
    repository = written(planned("embedded", values, tiny_llama, tmp_path), tmp_path)
    if layout == "llm":
        del values["serving.layout"]  # the default
    done = migrate(str(repository), "embedded", model=str(tiny_llama))
    assert_back(values, done, tiny_llama, tmp_path)
    assert [row for row in done.rows if row.kind == "not recognized"] == []


def test_trtllm(tiny_llama: Path, tmp_path: Path) -> None:
    repository = written(planned("trtllm", TRTLLM, tiny_llama, tmp_path), tmp_path)
    done = migrate(str(repository), model=str(tiny_llama))
    kept = {path: value for path, value in TRTLLM.items() if path != "runtime.extra.num_postprocess_workers"}
    assert_back(kept, done, tiny_llama, tmp_path)


def test_trtllm_in_the_stock_form(tiny_llama: Path, tmp_path: Path) -> None:
    # The container's model files have no limits of answers.
    server = ("runtime.extra.num_postprocess_workers", "serving.max_output_tokens", "serving.default_max_tokens")
    values = {path: value for path, value in TRTLLM.items() if path not in server} | {"serving.model_py": "upstream"}
    plan = planned("trtllm", values, tiny_llama, tmp_path)
    arguments = trtllm.llm_arguments(json.loads(json.dumps(dict(plan.step("engine").parameters))))
    repository = written(plan, tmp_path, model_py="upstream", llm_args=arguments)
    done = migrate(str(repository), model=str(tiny_llama))
    assert_back(values, done, tiny_llama, tmp_path)


ENGINE = {
    "runtime.tensor_parallel_size": 2,
    "runtime.max_batch_size": 5,
    "runtime.max_num_tokens": 300,
    "runtime.max_seq_len": 200,
    "runtime.enable_chunked_prefill": False,
    "runtime.capacity_scheduler_policy": "MAX_UTILIZATION",
    "runtime.kv_cache.free_gpu_memory_fraction": 0.5,
    "runtime.kv_cache.max_tokens": 4096,
    "runtime.kv_cache.enable_block_reuse": False,
    "runtime.kv_cache.tokens_per_block": 64,
    "runtime.kv_cache.host_cache_size": 1 << 30,
    "runtime.kv_cache.max_attention_window": [128, 512],
    "runtime.cuda_graph_config.enabled": True,
    "runtime.extra.gemm_plugin": "bfloat16",
    "serving.max_input_tokens": 100,
    "serving.max_output_tokens": 90,
    "serving.default_max_tokens": 33,
    "serving.streaming": False,
    "serving.layout": "ensemble",
    "compress.format": "fp8",
    "compress.kv_cache": "fp8",
    "target.gpu": "H100",
}


def test_tensorrt_engines(tiny_llama: Path, tmp_path: Path) -> None:
    """The five models of a plan for engines, and the engine directory: together they say the whole recipe."""
    plan = planned("trtllm-engine", ENGINE, tiny_llama, tmp_path)
    parameters = json.loads(json.dumps(dict(plan.step("repository").parameters)))
    described = parameters["engine"]
    more = {name: tuple(value) if isinstance(value, list) else value for name, value in described["more"].items()}
    write_atomic(
        tmp_path / "engine.json",
        canonical_json(trtllm_engine.engine_json(json.loads(json.dumps(dict(plan.step("engine").parameters))), "key")),
    )
    engine = from_runtime(described["runtime"], str(tmp_path), **more)
    render_repository(RepositorySpec(**parameters | {"engine": engine}), tmp_path / "model_repository")
    done = migrate(str(tmp_path / "model_repository"), "trtllm-engine", model=str(tiny_llama), gpu="H100")
    for path, value in ENGINE.items():
        assert at(done.document, path) == value, path
    assert [row for row in done.rows if row.is_loss] == []
    write_recipe(done, tmp_path / "recipe.yaml")
    again = prepare(tmp_path / "recipe.yaml").plan.step("engine").parameters
    assert json.loads(json.dumps(again["spec"])) == json.loads(json.dumps(plan.step("engine").parameters["spec"]))


def test_the_engine_form_of_the_five_models(tiny_llama: Path, tmp_path: Path) -> None:
    plan = planned("embedded", EMBEDDED | {"serving.layout": "ensemble"}, tiny_llama, tmp_path)
    runtime = {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "capacity_scheduler_policy": "MAX_UTILIZATION",
        "enable_chunked_prefill": False,
        "kv_cache": {"max_tokens": 4096, "free_gpu_memory_fraction": 0.5, "enable_block_reuse": False},
    }
    engine: EngineParameters = from_runtime(runtime, "/package/engine", max_attention_window_size=(128, 512))
    repository = written(plan, tmp_path, runtime="trtllm-engine", engine=engine)
    done = migrate(str(repository), model=str(tiny_llama))
    serving = ("max_input_tokens", "max_output_tokens", "default_max_tokens", "streaming")
    values = {f"serving.{name}": EMBEDDED[f"serving.{name}"] for name in serving}
    values |= {
        f"runtime.{path}": list(value) if isinstance(value, tuple) else value
        for path, value in leaves(runtime)
        if not path.endswith("parallel_size")
    }
    values |= {"runtime.max_batch_size": 5, "runtime.max_seq_len": 200}
    values |= {"runtime.kv_cache.max_attention_window": [128, 512]}
    for path, value in values.items():
        assert at(done.document, path) == value, path
    assert {row.old for row in done.rows if row.is_loss} == {"stats_check_period_ms", "layout"}


def test_a_package_gives_its_recipe(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "package" / "model_repository").mkdir(parents=True)
    text = (
        f"schema_version: 1\nmodel: {{path: {tiny_llama}}}\ncompress: {{format: fp8, sparsity: '2:4'}}\n"
        "runtime: {kind: embedded, max_seq_len: 128, weights: packed}\nquality: {max_perplexity_ratio: 2.5}\n"
    )
    (tmp_path / "package" / "recipe.yaml").write_text(text)
    done = migrate(str(tmp_path / "package"))
    assert done.document == {
        "schema_version": 1,
        "model": {"path": str(tiny_llama)},
        "compress": {"format": "fp8", "sparsity": "2:4"},
        "runtime": {"kind": "trtllm", "version": "1.2.1", "max_seq_len": 128},
        "quality": {"max_perplexity_ratio": 2.5},
    }
    assert [(row.old, row.note) for row in done.rows if row.is_loss] == [
        ("runtime.weights", "runtime.weights: only the embedded runtime has it")
    ]


def test_a_gate_that_is_off_stays_off(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "package" / "model_repository").mkdir(parents=True)
    (tmp_path / "package" / "recipe.yaml").write_text(
        f"schema_version: 1\nmodel: {{path: {tiny_llama}, revision: null}}\nruntime: {{kind: embedded}}\n"
        "quality: {max_perplexity_ratio: null}\n"
    )
    done = migrate(str(tmp_path / "package"))
    assert done.document["quality"] == {"max_perplexity_ratio": None}
    write_recipe(done, tmp_path / "new.yaml")
    assert prepare(tmp_path / "new.yaml").plan.gates["max_perplexity_ratio"] is None


def test_an_engine_directory_says_its_formats(tiny_llama: Path, tmp_path: Path) -> None:
    written(planned("embedded", EMBEDDED, tiny_llama, tmp_path), tmp_path)
    quantization = {"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": "FP8", "group_size": 64, "has_zero_point": False}
    quantization |= {"pre_quant_scale": True, "exclude_modules": ["lm_head", "model.layers.0.*"]}
    (tmp_path / "engine" / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    done = migrate(str(tmp_path / "engine"), "embedded", model=str(tiny_llama))
    assert done.document["compress"] == {
        "format": "int4_awq",
        "group_size": 64,
        "kv_cache": "fp8",
        "exclude": ["model.layers.0.*"],
    }
