"""A stock model.yaml of before 1.0: keys of `pytorch_backend_config`, which stood beside the others in 0.20."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from migrate.old_repositories import write_repository
from migrate.test_old_deployments import at, losses, plan_of, row_of
from trtbuild.migrate.run import Migration, migrate

_OLD = {
    "use_cuda_graph": True,
    "cuda_graph_batch_sizes": [1, 8, 32],
    "cuda_graph_max_batch_size": 0,
    "cuda_graph_padding_enabled": True,
    "enable_overlap_scheduler": False,
    "attn_backend": "FLASHINFER",
    "moe_backend": "TRTLLM",
    "moe_max_num_tokens": 4096,
    "moe_load_balancer": "/balancer.yaml",
    "mixed_decoder": False,
    "enable_trtllm_decoder": True,
    "kv_cache_dtype": "auto",
    "use_kv_cache": True,
    "enable_iter_perf_stats": True,
    "enable_iter_req_stats": True,
    "print_iter_log": True,
    "torch_compile_enabled": False,
    "torch_compile_inductor_enabled": False,
    "torch_compile_enable_userbuffers": True,
    "autotuner_enabled": False,
    "enable_layerwise_nvtx_marker": True,
    "load_format": "auto",
    "enable_min_latency": True,
}


def migrated(tmp_path: Path, document: dict[str, Any], version: str = "1.2.1") -> Migration:
    source = tmp_path / "model.yaml"
    source.write_text(yaml.safe_dump({"model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "backend": "pytorch"} | document))
    return migrate(str(source), version=version)


@pytest.mark.parametrize("nested", [True, False])
def test_every_key_has_its_place(tmp_path: Path, nested: bool) -> None:
    done = migrated(tmp_path, {"pytorch_backend_config": _OLD} if nested else _OLD)
    assert at(done.document, "runtime.cuda_graph_config") == {
        "enabled": True,
        "batch_sizes": [1, 8, 32],
        "enable_padding": True,
    }
    assert at(done.document, "runtime.attn_backend") == "FLASHINFER"
    assert at(done.document, "runtime.moe_config.backend") == "TRTLLM"
    assert at(done.document, "runtime.enable_iter_perf_stats") is True
    assert at(done.document, "runtime.extra") == {
        "disable_overlap_scheduler": True,
        "moe_config": {"max_num_tokens": 4096, "load_balancer": "/balancer.yaml"},
        "sampler_type": "TRTLLMSampler",
        "enable_iter_req_stats": True,
        "print_iter_log": True,
        "enable_autotuner": False,
        "enable_layerwise_nvtx_marker": True,
        "enable_min_latency": True,
    }
    assert losses(done) == set()
    assert {row.kind for row in done.rows} <= {"kept", "renamed", "computed", "dropped"}


@pytest.mark.parametrize("on", [True, False])
def test_overlap_is_said_the_other_way_round(tmp_path: Path, on: bool) -> None:
    done = migrated(tmp_path, {"pytorch_backend_config": {"enable_overlap_scheduler": on}})
    assert at(done.document, "runtime.extra.disable_overlap_scheduler") is not on
    name = "pytorch_backend_config.enable_overlap_scheduler"
    assert row_of(done, name).kind == "computed"


def test_graphs_that_are_off_have_no_sizes(tmp_path: Path) -> None:
    done = migrated(tmp_path, {"pytorch_backend_config": {"use_cuda_graph": False, "cuda_graph_batch_sizes": [1, 2]}})
    assert at(done.document, "runtime.cuda_graph_config") == {"enabled": False}
    assert losses(done) == set()


def test_what_is_lost_says_what_to_write(tmp_path: Path) -> None:
    old = {"torch_compile_enabled": True, "use_kv_cache": False, "kv_cache_dtype": "nvfp4", "moe_backend": "NONE"}
    done = migrated(tmp_path, {"pytorch_backend_config": old})
    assert losses(done) == {f"pytorch_backend_config.{name}" for name in old}
    assert (
        "runtime.extra.torch_compile_config takes them"
        in row_of(done, "pytorch_backend_config.torch_compile_enabled").note
    )


@pytest.mark.parametrize(
    ("version", "argument"), [("1.0.0", {"enable_trtllm_sampler": True}), ("1.1.0", {"sampler_type": "TRTLLMSampler"})]
)
def test_the_sampler_is_a_switch_or_a_choice(tmp_path: Path, version: str, argument: dict[str, Any]) -> None:
    for old in ({"enable_trtllm_sampler": True}, {"sampler_type": "TRTLLMSampler"}):
        assert at(migrated(tmp_path, old, version).document, "runtime.extra") == argument


def test_compile_options_of_0_21(tmp_path: Path) -> None:
    done = migrated(tmp_path, {"torch_compile_config": {"torch_compile_fullgraph": False}})
    assert at(done.document, "runtime.extra.torch_compile_config") == {"enable_fullgraph": False}


def test_experts_of_a_model_without_any(tmp_path: Path, tiny_llama: Path) -> None:
    source = tmp_path / "model.yaml"
    source.write_text(
        f"model: {tiny_llama}\nmoe_config: {{backend: CUTLASS, max_num_tokens: 64}}\nprint_iter_log: true\n"
    )
    done = migrate(str(source), model=str(tiny_llama), version="1.2.1")
    assert "moe_config" not in done.document["runtime"]
    assert at(done.document, "runtime.extra") == {"print_iter_log": True}
    assert "the model has no experts" in row_of(done, "moe_config.max_num_tokens").note
    assert losses(done) == set()


def test_instances_that_shared_a_gpu(tmp_path: Path, tiny_llama: Path) -> None:
    changes, names = {"gpu_device_ids": "3;3"}, frozenset({"gpu_device_ids"})
    repository = write_repository(tmp_path / "repository", "1.0", changes=changes, only=names)
    done = migrate(str(repository), model=str(tiny_llama), version="1.2.1")
    assert at(done.document, "serving.gpu_device_ids") == [[3], [3]]
    assert at(done.document, "runtime.kv_cache.free_gpu_memory_fraction") == 0.47
    assert plan_of(done, tmp_path / "recipe.yaml").value("target.count") == 4


@pytest.mark.parametrize("value", ["true", "false"])
def test_overlap_of_an_engine_s_steps(tmp_path: Path, tiny_llama: Path, value: str) -> None:
    changes, names = {"enable_trt_overlap": value}, frozenset({"enable_trt_overlap"})
    repository = write_repository(tmp_path / "repository", "1.2", changes=changes, only=names)
    engine = migrate(str(repository), "trtllm-engine", model=str(tiny_llama), gpu="H100")
    assert ("enable_trt_overlap" in losses(engine)) == (value == "true"), "the C++ backend leaves it off"
    assert "enable_trt_overlap" not in losses(migrate(str(repository), "trtllm", model=str(tiny_llama)))
