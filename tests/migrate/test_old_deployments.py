"""Older deployments become recipes: every setting has one fate, and the recipe fits the model."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from migrate.old_repositories import ENGINE_CONFIG, PARAMETERS, PLACEHOLDERS, STRUCTURE, write_repository
from tiny import save_checkpoint
from trtbuild.compat import facts
from trtbuild.migrate.legacy import leaves
from trtbuild.migrate.run import Migration, migrate, next_command, write_recipe
from trtbuild.migrate.translate import Row
from trtbuild.pipeline import prepare
from trtbuild.plan import Plan
from trtbuild.recipe import Recipe
from trtbuild.recipe_file import load_recipe


def at(document: Any, path: str) -> Any:
    for key in path.split("."):
        document = document[key]
    return document


def row_of(migration: Migration, old: str, where: str = "") -> Row:
    found = [row for row in migration.rows if row.old == old and where in row.where]
    assert len(found) == 1, (old, found)
    return found[0]


def losses(migration: Migration) -> set[str]:
    return {row.old for row in migration.rows if row.is_loss}


def plan_of(migration: Migration, out: Path, *overrides: str) -> Plan:
    """The written recipe holds the document, and its plan has no problems."""
    write_recipe(migration, out)
    assert load_recipe(out).document == migration.document
    return prepare(out, overrides).plan


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft model for `tiny_llama`."""
    return save_checkpoint(tmp_path_factory.mktemp("drafts") / "small", overrides={"num_hidden_layers": 1})


@pytest.mark.parametrize("version", PARAMETERS)
@pytest.mark.parametrize("kind", ["trtllm", "embedded", "trtllm-engine"])
def test_every_parameter_of_upstream_has_exactly_one_row(version: str, kind: Any, tmp_path: Path) -> None:
    repository = write_repository(tmp_path / "repository", version)
    done = migrate(str(repository), kind)
    given = Counter((f"{model}/config.pbtxt", key) for model, keys in PARAMETERS[version].items() for key in keys)
    rows = Counter((row.where, row.old) for row in done.rows if row.old)
    assert {key: rows[key] for key in given} == dict(given)
    assert set(rows.values()) == {1}
    assert [row.old for row in done.rows if row.kind == "not recognized"] == []
    structural = {name for _, name in rows.keys() - given.keys()}
    assert structural == (set(STRUCTURE) - {"triton_backend", "triton_max_batch_size", "decoupled_mode"}) | {
        *("backend", "max_batch_size", "decoupled", "preferred_batch_size", "instance_count")
    }
    write_recipe(done, tmp_path / "recipe.yaml")
    assert isinstance(load_recipe(tmp_path / "recipe.yaml").recipe, Recipe)


@pytest.mark.parametrize("version", PARAMETERS)
def test_values_of_an_old_repository(version: str, tmp_path: Path, tiny_llama: Path, small_llama: Path) -> None:
    repository = write_repository(tmp_path / "repository", version)
    done = migrate(str(repository), "trtllm", model=str(tiny_llama))
    assert done.document["runtime"] == {
        "kind": "trtllm",
        "version": "1.2.1",
        "max_batch_size": 64,
        "kv_cache": {
            "free_gpu_memory_fraction": 0.8,
            "max_tokens": 40960,
            "enable_block_reuse": False,
            "host_cache_size": 1000000000,
            "max_attention_window": [4096, 1024],
        },
        "capacity_scheduler_policy": "MAX_UTILIZATION",
        "enable_chunked_prefill": True,
        "cuda_graph_config": {"enabled": True},
        **({} if version == "0.17" else {"guided_decoding_backend": "xgrammar"}),
        "extra": {
            "iter_stats_max_iterations": 77,
            "request_stats_max_iterations": 78,
            "kv_cache_config": {"onboard_blocks": False, "sink_token_length": 4},
            "peft_cache_config": {
                "optimal_adapter_size": 16,
                "max_adapter_size": 32,
                "device_cache_percent": 0.1,
                "host_cache_size": 2000000000,
            },
        },
    }
    assert done.document["serving"] == {"streaming": True}
    expected = {
        *("max_beam_width", "encoder_model_path", "cross_kv_cache_fraction", "stats_check_period_ms"),
        *(
            "normalize_log_probs",
            "gpu_device_ids",
            "participant_ids",
            "decoding_mode",
            "medusa_choices",
            "eagle_choices",
        ),
        *("gpu_weights_percent", "enable_context_fmha_fp32_acc", "multi_block_mode", "cuda_graph_cache_size"),
        *("speculative_decoding_fast_logits", "add_special_tokens", "skip_special_tokens", "max_num_images"),
        *("multimodal_encoders_name", "max_queue_size", "logits_datatype"),
        *("encoder_input_features_data_type", "prompt_embedding_table_data_type"),
        "visual_model_path" if version == "0.17" else "multimodal_model_path",
    }
    if version != "0.17":
        expected |= {"num_nodes", "lora_prefetch_dir"}
        expected |= {f"lookahead_{name}" for name in ("window_size", "ngram_size", "verification_set_size")}
    assert losses(done) == expected
    assert "Medusa" in row_of(done, "decoding_mode").note
    assert "C++ metrics" in row_of(done, "stats_check_period_ms").note
    assert row_of(done, "batch_scheduler_policy").kind == "computed"
    assert row_of(done, "kv_cache_free_gpu_mem_fraction").kind == "renamed"
    assert row_of(done, "iter_stats_max_iterations").kind == "kept"
    assert any("clients change" in note for note in done.notes)
    assert done.document["speculative"] == {"method": "draft_target", "draft": "/FILL-IN/draft-checkpoint"}
    plan = plan_of(done, tmp_path / "recipe.yaml", f"speculative.draft={small_llama}")
    assert plan.value("runtime.kv_cache.max_tokens") == 40960


def test_an_embedded_recipe_keeps_the_five_models(tmp_path: Path, tiny_llama: Path) -> None:
    repository = write_repository(tmp_path / "repository", "1.2")
    done = migrate(str(repository), "embedded", model=str(tiny_llama))
    assert done.document["serving"] == {"layout": "ensemble", "streaming": True}
    assert "max_attention_window" not in done.document["runtime"]["kv_cache"]
    assert "only the trtllm runtime" in row_of(done, "max_attention_window_size").note
    assert not any("clients change" in note for note in done.notes)
    assert plan_of(done, tmp_path / "recipe.yaml").value("serving.layout") == "ensemble"


def test_an_engine_recipe_fits_too(tmp_path: Path, tiny_llama: Path) -> None:
    repository = write_repository(tmp_path / "repository", "1.2", changes={"decoding_mode": "lookahead"})
    done = migrate(str(repository), "trtllm-engine", model=str(tiny_llama), gpu="H100")
    assert "lookahead drafts do not follow a grammar" in row_of(done, "decoding_mode").note
    assert "speculative" not in done.document
    assert done.document["runtime"]["guided_decoding_backend"] == "xgrammar"
    assert "onboard_blocks" not in str(done.document)
    plan = plan_of(done, tmp_path / "recipe.yaml")
    assert plan.value("runtime.kv_cache.max_attention_window") == (4096, 1024)


def test_lookahead_decoding_goes_on_with_an_engine(tmp_path: Path, tiny_llama: Path) -> None:
    changes = {"decoding_mode": "lookahead", "guided_decoding_backend": ""}
    repository = write_repository(tmp_path / "repository", "1.2", changes=changes)
    done = migrate(str(repository), "trtllm-engine", model=str(tiny_llama), gpu="H100")
    assert done.document["speculative"] == {
        "method": "lookahead", "max_window_size": 7, "max_ngram_size": 7, "max_verification_set_size": 7,
    }  # fmt: skip
    assert row_of(done, "eagle_choices").note == "nothing is lost: speculative.choices: follows from lookahead"
    plan = plan_of(done, tmp_path / "recipe.yaml")
    assert plan.value("speculative.max_draft_len") == 83


def with_draft(repository: Path) -> Path:
    """Add upstream's second engine: the same model under another name."""
    draft = repository / "tensorrt_llm_draft"
    shutil.copytree(repository / "tensorrt_llm", draft)
    text = (draft / "config.pbtxt").read_text()
    for old, new in (
        ('"tensorrt_llm"', '"tensorrt_llm_draft"'),
        ('"0.8"', '"0.1"'),
        ("/engines/target", "/engines/draft"),
    ):
        assert old in text
        text = text.replace(old, new)
    (draft / "config.pbtxt").write_text(text)
    return repository


def test_a_draft_and_its_target(tmp_path: Path, tiny_llama: Path) -> None:
    changes = {"decoding_mode": "", "guided_decoding_backend": ""}
    repository = with_draft(write_repository(tmp_path / "repository", "1.2", changes=changes))
    done = migrate(str(repository), "trtllm-engine", model=str(tiny_llama), gpu="H100")
    assert done.document["speculative"] == {
        "method": "draft_target", "draft": "/FILL-IN/draft-checkpoint", "draft_kv_cache_share": 0.111,
    }  # fmt: skip
    cache = done.document["runtime"]["kv_cache"]
    assert (cache["free_gpu_memory_fraction"], cache["enable_block_reuse"]) == (0.9, True)
    row = row_of(done, "draft_gpt_model_path")
    assert (row.old_value, row.is_loss) == ("/engines/draft", False)
    assert "--set speculative.draft=..." in next_command(done, tmp_path / "recipe.yaml")
    write_recipe(done, tmp_path / "recipe.yaml")
    assert "# FILL IN: the draft model's original checkpoint" in (tmp_path / "recipe.yaml").read_text()
    other = migrate(str(repository), "trtllm", model=str(tiny_llama))
    assert losses(other) >= {"draft_kv_cache_free_gpu_mem_fraction"}
    assert other.document["speculative"] == {"method": "draft_target", "draft": "/FILL-IN/draft-checkpoint"}


@pytest.mark.parametrize(
    ("mode", "method"), [(2, "draft_target"), (4, "medusa"), (16, "redrafter"), (32, "eagle"), ("EAGLE", "eagle")]
)
def test_an_engine_that_drafts(tmp_path: Path, mode: int | str, method: str) -> None:
    engine = write_engine(tmp_path / "engine")
    config = json.loads((engine / "config.json").read_text())
    config["build_config"]["speculative_decoding_mode"] = mode
    config["pretrained_config"]["mapping"] |= {"pp_size": 1, "world_size": 2}
    (engine / "config.json").write_text(json.dumps(config))
    done = migrate(str(engine), "trtllm-engine", gpu="H100")
    assert done.document["speculative"]["method"] == method
    assert done.document["speculative"]["draft"] == "/FILL-IN/draft-checkpoint"
    assert done.document["speculative"].get("max_draft_len") == (63 if method == "draft_target" else None)
    assert done.document["runtime"]["lora_config"] == {"max_lora_rank": 16, "lora_target_modules": ["attn_q", "attn_v"]}
    config["pretrained_config"]["mapping"] |= {"pp_size": 2, "world_size": 4}
    (engine / "config.json").write_text(json.dumps(config))
    stages = migrate(str(engine), "trtllm-engine", gpu="H100")
    assert "does not run with pipeline_parallel_size 2" in row_of(stages, "speculative_decoding_mode").note


def test_an_argument_that_the_newest_version_removed(tmp_path: Path) -> None:
    repository = write_repository(tmp_path / "repository", "1.0")
    done = migrate(str(repository), version="1.4.0rc1")
    row = row_of(done, "kv_cache_onboard_blocks")
    assert (row.kind, row.is_loss) == ("dropped", True)
    assert "onboard_blocks" not in done.document["runtime"]["extra"].get("kv_cache_config", {})
    assert done.document["runtime"]["version"] == "1.4.0rc1"


@pytest.mark.parametrize(
    ("backend", "groups", "expected"),
    [
        ("tensorrtllm", "0;1", {"gpu_device_ids": [[0], [1]]}),
        ("python", "1", {"backend": "python", "gpu_device_ids": [[1]]}),
        ("python", "0;1", {"backend": "python"}),
    ],
)
def test_engines_keep_their_instances_and_their_backend(
    tmp_path: Path, tiny_llama: Path, backend: str, groups: str, expected: dict[str, Any]
) -> None:
    repository = write_repository(
        tmp_path / "repository", "1.2", structure=STRUCTURE | {"triton_backend": backend},
        changes={"gpu_device_ids": groups}, only=frozenset({"gpu_device_ids"}),
    )  # fmt: skip
    done = migrate(str(repository), "trtllm-engine", model=str(tiny_llama), gpu="H100")
    serving = {name: done.document["serving"].get(name) for name in ("backend", "gpu_device_ids")}
    assert {name: value for name, value in serving.items() if value is not None} == expected
    plan = plan_of(done, tmp_path / "recipe.yaml")
    several = len(expected.get("gpu_device_ids", ())) > 1
    assert plan.value("serving.communication_mode") == ("orchestrator" if several else "leader")
    assert ("gpu_device_ids" in losses(done)) == (groups == "0;1" and backend == "python")


def test_unfilled_placeholders_are_unset_and_listed(tmp_path: Path, tiny_llama: Path) -> None:
    only = frozenset({"kv_cache_free_gpu_mem_fraction", "gpt_model_path"})
    repository = write_repository(tmp_path / "repository", "1.2", structure={}, only=only)
    done = migrate(str(repository), model=str(tiny_llama))
    given = {row.old for row in done.rows if row.old}
    assert given == {"kv_cache_free_gpu_mem_fraction", "gpt_model_path", "executor_worker_path", "instance_count"}
    names = {one.text for one in done.unset if one.where.startswith("tensorrt_llm/")}
    placeholders = {"${" + PLACEHOLDERS.get(key, key) + "}" for key in PARAMETERS["1.2"]["tensorrt_llm"]}
    filled = {"${kv_cache_free_gpu_mem_fraction}", "${engine_dir}", "${executor_worker_path}"}
    assert names >= placeholders - filled
    assert {"${triton_max_batch_size}", "${decoupled_mode}", "${max_queue_size}", "${logits_datatype}"} <= names
    assert done.document["runtime"] == {
        "kind": "trtllm",
        "version": "1.2.1",
        "kv_cache": {"free_gpu_memory_fraction": 0.8},
    }
    assert "serving" not in done.document
    plan_of(done, tmp_path / "recipe.yaml")


def write_engine(path: Path, config: Any = ENGINE_CONFIG) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    for rank in range(4):
        (path / f"rank{rank}.engine").write_bytes(b"")
    return path


def test_an_engine_directory(tmp_path: Path) -> None:
    done = migrate(str(write_engine(tmp_path / "engine")), "trtllm")
    assert done.version == "0.17.0"
    for path, value in {
        "runtime.tensor_parallel_size": 2,
        "runtime.pipeline_parallel_size": 2,
        "runtime.max_batch_size": 128,
        "runtime.max_seq_len": 4096,
        "runtime.max_num_tokens": 8192,
        "runtime.kv_cache.tokens_per_block": 64,
        "runtime.lora_config.max_lora_rank": 16,
        "runtime.lora_config.lora_target_modules": ["attn_q", "attn_v"],
        "runtime.extra.gather_generation_logits": True,
        "serving.max_input_tokens": 3000,
        "compress.format": "fp8",
        "compress.kv_cache": "fp8",
        "compress.sparsity": "2:4",
        "target.count": 4,
    }.items():
        assert at(done.document, path) == value, path
    assert losses(done) == {"speculative_decoding_mode", "max_draft_len"}
    assert "Medusa" in row_of(done, "speculative_decoding_mode").note
    given = leaves(ENGINE_CONFIG["build_config"]) + leaves(ENGINE_CONFIG["pretrained_config"])  # type: ignore[arg-type]
    rows = Counter(row.old for row in done.rows if row.old)
    unset = Counter(one.name for one in done.unset)
    assert rows + unset == Counter([*(name for name, _ in given), "version"])


@pytest.mark.parametrize(
    ("algorithm", "lost"),
    [
        ("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "SmoothQuant"),
        ("W4A16_GPTQ", "GPTQ"),
        ("W4A8_QSERVE_PER_GROUP", "QServe"),
        ("W4A8_NVFP4_FP8", "this kind of NVFP4"),
        ("W4A16", "INT4 weights without AWQ"),
        ("W9", "not known"),
    ],
)
def test_formats_that_are_lost(algorithm: str, lost: str, tmp_path: Path) -> None:
    config: Any = copy.deepcopy(ENGINE_CONFIG)
    config["pretrained_config"]["quantization"]["quant_algo"] = algorithm
    done = migrate(str(write_engine(tmp_path / "engine", config)))
    row = row_of(done, "quantization.quant_algo")
    assert row.is_loss
    assert lost in row.note
    assert "format" not in done.document["compress"]
    # TensorRT-LLM takes no KV scales with bf16 weights.
    assert "kv_cache" not in done.document["compress"]
    assert row_of(done, "quantization.kv_cache_quant_algo").is_loss


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [("W8A8_SQ_PER_CHANNEL", "int8_sq"), ("NVFP4", "nvfp4"), ("FP8_BLOCK_SCALES", "fp8_block"), ("W8A16", None)],
)
def test_formats_that_stay_where_the_runtime_loads_them(algorithm: str, name: str | None, tmp_path: Path) -> None:
    config: Any = copy.deepcopy(ENGINE_CONFIG)
    config["pretrained_config"]["quantization"]["quant_algo"] = algorithm
    for kind, table in (("trtllm-engine", "engine"), ("trtllm", "llm_api")):
        done = migrate(str(write_engine(tmp_path / kind, config)), kind, gpu="B200")  # type: ignore[arg-type]
        row = next(row for row in facts("formats")["weights"].values() if row["algo"] == algorithm)
        loaded = bool(row[table])
        assert ("format" in done.document["compress"]) == loaded, (kind, algorithm)
        if loaded and name:
            assert at(done.document, "compress.format") == name


def test_a_repository_brings_its_engine_and_the_smaller_limit_holds(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "engine")
    repository = write_repository(tmp_path / "repository", "0.17", changes={"gpt_model_path": str(engine)})
    done = migrate(str(repository))
    assert done.version == "0.17.0"
    assert at(done.document, "runtime.max_batch_size") == 64
    row = row_of(done, "max_batch_size", "engine/config.json")
    assert (row.kind, row.is_loss) == ("dropped", False)
    assert "64" in row.note
    assert at(done.document, "runtime.tensor_parallel_size") == 2


def test_the_tokenizer_is_the_checkpoint(tmp_path: Path, tiny_llama: Path) -> None:
    repository = write_repository(tmp_path / "repository", "0.17", changes={"tokenizer_dir": str(tiny_llama)})
    done = migrate(str(repository))
    assert at(done.document, "model.path") == str(tiny_llama)
    rows = [row for row in done.rows if row.old == "tokenizer_dir"]
    assert {(row.field, row.is_loss) for row in rows} == {("model.path", False), ("", False)}
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_bytes((tiny_llama / "tokenizer.json").read_bytes())
    other = write_repository(tmp_path / "other", "0.17", changes={"tokenizer_dir": str(tokenizer)})
    done = migrate(str(other), model=str(tiny_llama))
    assert at(done.document, "model.tokenizer") == str(tokenizer)


def test_values_that_a_recipe_refuses_are_fitted(tmp_path: Path, tiny_llama: Path) -> None:
    flags = tmp_path / "build.sh"
    flags.write_text(
        "# how the engine was made\n"
        "CUDA_VISIBLE_DEVICES=0 /usr/bin/trtllm-build --checkpoint_dir ck --max_batch_size 2048 \\\n"
        "  --max_num_tokens=1024 --max_seq_len 131072 --max_input_len 131071 --gemm_plugin auto\n"
    )
    done = migrate(str(flags), model=str(tiny_llama))
    assert at(done.document, "runtime.max_seq_len") == 512
    assert row_of(done, "max_seq_len").kind == "computed"
    assert at(done.document, "runtime.max_num_tokens") == 2048
    assert row_of(done, "max_input_len").kind == "dropped"
    plan_of(done, tmp_path / "recipe.yaml")
    engine = migrate(str(flags), "trtllm-engine", gpu="H100")
    assert at(engine.document, "runtime.extra") == {"gemm_plugin": "auto"}
    assert at(engine.document, "target.gpu") == "H100"


def test_fill_template_arguments(tmp_path: Path) -> None:
    r"""Escaped commas, quotes, several calls, and placeholders of a shell."""
    calls = tmp_path / "fill.sh"
    calls.write_text(
        "python3 tools/fill_template.py -i repo/preprocessing/config.pbtxt tokenizer_dir:/t,triton_max_batch_size:16\n"
        "python3 tools/fill_template.py -i repo/tensorrt_llm/config.pbtxt triton_max_batch_size:32,"
        "decoupled_mode:False,batching_strategy:V1,engine_dir:/e,max_attention_window_size:4096\\,1024,max_beam_width:${BEAMS},frobnicate:1\n"
    )
    done = migrate(str(calls))
    assert at(done.document, "runtime.kv_cache.max_attention_window") == [4096, 1024]
    assert at(done.document, "runtime.max_batch_size") == 16
    assert at(done.document, "serving.streaming") is False
    assert row_of(done, "frobnicate").kind == "not recognized"
    assert losses(done) == {"gpt_model_type", "frobnicate", "tokenizer_dir"}
    assert [(one.name, one.text) for one in done.unset] == [("max_beam_width", "${BEAMS}")]


def test_a_stock_model_yaml(tmp_path: Path) -> None:
    model = tmp_path / "repository" / "chat"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(
        'name: "chat"\nbackend: "python"\ninstance_group [ { count: 1 kind: KIND_CPU } ]\n'
    )
    (model / "1" / "model.yaml").write_text(
        "model: TinyLlama/TinyLlama-1.1B-Chat-v1.0\nbackend: pytorch\ntensor_parallel_size: 2\n"
        "cuda_graph_config: null\n"
        "kv_cache_config: {dtype: fp8, free_gpu_memory_fraction: 0.7, secondary_offload_min_priority: 35}\n"
        "speculative_config: {decoding_type: DraftTarget, max_draft_len: 4, speculative_model_dir: /draft}\n"
        "disable_overlap_scheduler: true\nno_such_argument: 5\n"
        "triton_config: {max_batch_size: 0, decoupled: true}\n"
    )
    done = migrate(str(tmp_path / "repository"), version="1.4.0rc1")
    assert at(done.document, "model.path") == "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    assert at(done.document, "runtime.cuda_graph_config.enabled") is False
    assert done.document["serving"] == {"model_name": "chat", "streaming": True}
    assert at(done.document, "runtime.extra") == {
        "disable_overlap_scheduler": True,
        "kv_cache_config": {"secondary_offload_min_priority": 35},
    }
    assert done.document["speculative"] == {"method": "draft_target", "max_draft_len": 4, "draft": "/draft"}
    assert row_of(done, "speculative_config.decoding_type").kind == "computed"
    assert row_of(done, "speculative_config.max_draft_len").kind == "kept"
    assert row_of(done, "speculative_config.speculative_model_dir").kind == "renamed"
    assert losses(done) == {"no_such_argument", "kv_cache_config.dtype"}


def test_a_script_with_both_commands(tmp_path: Path, tiny_llama: Path) -> None:
    script = tmp_path / "deploy.sh"
    script.write_text(
        "#!/bin/sh\n# trtllm-build makes the engine\nset -e\n"
        "trtllm-build --checkpoint_dir ck --max_batch_size $BATCH --max_num_tokens 4096 > log && echo done\n"
        "python3 fill_template.py -i r/tensorrt_llm/config.pbtxt triton_max_batch_size:32,max_beam_width:$BEAMS\n"
    )
    done = migrate(str(script), model=str(tiny_llama))
    assert {row.old for row in done.rows if row.old} == {"checkpoint_dir", "max_num_tokens", "max_batch_size"}
    assert at(done.document, "runtime.max_batch_size") == 32
    assert at(done.document, "runtime.max_num_tokens") == 4096
    # As trtllm-build deduces it from the model.
    assert at(done.document, "runtime.max_seq_len") == 512
    assert {(one.name, one.text) for one in done.unset} == {("max_batch_size", "$BATCH"), ("max_beam_width", "$BEAMS")}


def test_documents_are_not_taken_for_commands(tmp_path: Path) -> None:
    document = tmp_path / "extra.yaml"
    document.write_text(
        "---\n# instead of trtllm-build\nmax_batch_size: 16\n"
        "cuda_graph_config: {batch_sizes: [1, 4], max_batch_size: 4}\n"
    )
    done = migrate(str(document))
    assert at(done.document, "runtime.max_batch_size") == 16
    assert at(done.document, "runtime.cuda_graph_config") == {"batch_sizes": [1, 4]}
    assert losses(done) == set()


def test_lengths_of_old_engines(tmp_path: Path) -> None:
    flags = tmp_path / "flags"
    flags.write_text(
        "--max_input_len 3000 --max_output_len 1000\n --lora_dir /lora/one /lora/two --lora_ckpt_source nemo"
    )
    done = migrate(str(flags))
    assert at(done.document, "runtime.max_seq_len") == 4000
    assert done.document["serving"] == {"max_input_tokens": 3000, "max_output_tokens": 1000}
    assert at(done.document, "model.adapters") == ["/lora/one", "/lora/two"]
    assert losses(done) == {"lora_ckpt_source"}


def test_pairs_that_a_recipe_refuses(tmp_path: Path, tiny_llama: Path) -> None:
    arguments = tmp_path / "arguments"
    arguments.write_text(
        "max_tokens_in_paged_kv_cache:100,enable_chunked_context:false,kv_cache_free_gpu_mem_fraction:1.0,"
        f"engine_dir:{write_engine(tmp_path / 'engine')}\n"
    )
    script = tmp_path / "deploy.sh"
    script.write_text(f"trtllm-build --max_num_tokens 256 --max_seq_len 500\nfill_template.py {arguments.read_text()}")
    done = migrate(str(script), model=str(tiny_llama))
    assert at(done.document, "runtime.enable_chunked_prefill") is True
    assert row_of(done, "enable_chunked_context").kind == "computed"
    assert at(done.document, "runtime.kv_cache") == {"free_gpu_memory_fraction": 0.95}
    assert "could not hold one request of max_seq_len 500" in row_of(done, "max_tokens_in_paged_kv_cache").note
    plan_of(done, tmp_path / "recipe.yaml")


def test_values_that_the_new_version_does_not_take(tmp_path: Path) -> None:
    document = tmp_path / "model.yaml"
    document.write_text("moe_config: {backend: DENSEGEMM}\nattn_backend: FLASHINFER\n")
    older, newer = migrate(str(document)), migrate(str(document), version="1.4.0rc1")
    assert at(newer.document, "runtime.moe_config.backend") == "DENSEGEMM"
    assert "moe_config" not in older.document["runtime"]
    assert "runtime.moe_config.backend: 'DENSEGEMM'" in row_of(older, "moe_config.backend").note


def test_a_quantized_checkpoint_is_not_the_original(tmp_path: Path) -> None:
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    (quantized / "config.json").write_text('{"model_type": "llama"}')
    (quantized / "model.safetensors").write_bytes(b"")
    (quantized / "hf_quant_config.json").write_text("{}")
    document = tmp_path / "model.yaml"
    document.write_text(f"model: {quantized}\n")
    done = migrate(str(document))
    assert at(done.document, "model.path") == "/FILL-IN/original-checkpoint"
    assert "fill in model.path" in row_of(done, "model").note


@pytest.mark.parametrize("odd", [1.5, "x", -1, [[1]], True, 10**30])
def test_values_that_no_recipe_takes_are_named(odd: Any, tmp_path: Path) -> None:
    arguments = {"max_seq_len": odd, "max_batch_size": odd, "attn_backend": odd, "trust_remote_code": "yes"}
    document = tmp_path / "model.yaml"
    document.write_text(json.dumps(arguments | {"kv_cache_config": {"max_tokens": odd, "free_gpu_memory_fraction": 7}}))
    done = migrate(str(document))
    lost = {"max_batch_size", "attn_backend", "trust_remote_code", "kv_cache_config.free_gpu_memory_fraction"}
    assert losses(done) >= lost
    assert "it must be" in row_of(done, "trust_remote_code").note
    write_recipe(done, tmp_path / "recipe.yaml")
    load_recipe(tmp_path / "recipe.yaml")
