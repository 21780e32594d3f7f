"""A build for TensorRT-LLM's LLM API up to its engine: the checkpoint with arguments, and the checks of `verify`."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trtbuild.console import ConsoleReporter
from trtbuild.errors import CompatibilityError
from trtbuild.pipeline import prepare
from trtbuild.steps import Work, run_step
from trtbuild.store import Artifact, Staging
from trtbuild.verification import verify_trtllm
from trtbuild.yaml_text import parse_yaml

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter as far as files tell: TensorRT-LLM alone reads its tensors."""
    path = tmp_path_factory.mktemp("adapters") / "polite"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    (path / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    return path


@pytest.fixture(scope="module")
def trtllm_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, store: Path, adapter: Path) -> Path:
    """FP8 weights and KV cache for one H100."""
    path = tmp_path_factory.mktemp("trtllm") / "trtllm.yaml"
    path.write_text(
        f"schema_version: 1\nmodel: {{path: {tiny_llama}, adapters: [{adapter}]}}\n"
        "compress: {format: fp8, kv_cache: fp8, calibration: {count: 2, length: 32}}\n"
        "target: {gpu: H100}\n"
        "runtime:\n  kind: trtllm\n  max_seq_len: 256\n"
        "  lora_config: {max_lora_rank: 8, lora_target_modules: [attn_q]}\n"
        "  extra: {kv_cache_config: {copy_on_partial_reuse: false}}\n"
        f"store: {store}\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def engine(trtllm_recipe: Path, cli: Cli) -> Path:
    """The engine directory, built once."""
    return Path(cli("build", trtllm_recipe, "--until", "engine").stdout.strip())


def test_the_engine_directory(engine: Path) -> None:
    names = {path.name for path in engine.iterdir()}
    assert {"config.json", "hf_quant_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert sorted(path.name for path in (engine / "adapters" / "polite").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((engine / "engine.json").read_text()) == {
        "schema_version": 1,
        "runtime": "trtllm",
        "version": "1.2.1",
        "container": "26.07",
        "world_size": 1,
        "llm_args": {"name": "1.2.1", "commit": "58fb435eacc402f3bd177e60f592c955d2b0719d", "proven": True},
        "max_batch_size": 8,
        "max_num_tokens": 8192,
        "max_seq_len": 256,
        "trust_remote_code": False,
        "adapters": {"polite": "adapters/polite"},
    }
    text = (engine / "llm_args.yaml").read_text()
    assert text.startswith("# Arguments of tensorrt_llm.LLM, TensorRT-LLM 1.2.1, PyTorch backend.\n")
    arguments = parse_yaml(text)
    assert arguments["kv_cache_config"]["dtype"] == "fp8"
    assert arguments["kv_cache_config"]["copy_on_partial_reuse"] is False
    assert arguments["lora_config"] == {"max_lora_rank": 8, "lora_target_modules": ["attn_q"]}
    assert "model" not in arguments


def as_package(engine: Path, tmp_path: Path, gpu: str, recipe: Path, *changes: str) -> Path:
    """What `verify` looks at besides the bytes."""
    package = tmp_path / "package"
    shutil.copytree(engine, package / "engine")
    planned = dict(prepare(recipe, changes).plan.step("engine").parameters)
    values = [{"path": "target.gpu", "value": gpu, "origin": "recipe"}]
    lock = {"plan": {"values": values, "steps": [{"kind": "engine", "parameters": planned}]}}
    (package / "plan.lock.json").write_text(json.dumps(lock))
    return package


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_verify_reports_every_check(engine: Path, trtllm_recipe: Path, tmp_path: Path) -> None:
    checks = verify_trtllm(as_package(engine, tmp_path, "H100", trtllm_recipe))
    assert all(check.passed for check in checks), checks
    assert [check.name for check in checks] == [
        *("engine.json", "LLM arguments"),
        *("checkpoint: recognition", "checkpoint: packing", "checkpoint: excluded modules", "checkpoint: scales"),
        *("checkpoint: fused projections", "checkpoint: AWQ input scales", "checkpoint: KV cache scales"),
        *("checkpoint: tensor parallel", "checkpoint: release", "checkpoint: GPU"),
    ]
    assert checks[0].detail == "TensorRT-LLM 1.2.1, container 26.07, world size 1"
    assert checks[1].detail == "16 arguments, TensorRT-LLM 1.2.1, schema 1.2.1"
    assert checks[3].detail == "21 layers in FP8"


def test_verify_finds_what_was_changed_by_hand(engine: Path, trtllm_recipe: Path, tmp_path: Path) -> None:
    package = as_package(engine, tmp_path, "A100", trtllm_recipe)
    arguments = package / "engine" / "llm_args.yaml"
    text = arguments.read_text().replace("max_batch_size: 8", "max_batch_size: 9\nmodel_kwargs: {}\nmodel: x")
    arguments.write_text(text.replace("tensor_parallel_size: 1", "tensor_parallel_size: 3"))
    shutil.rmtree(package / "engine" / "adapters")
    checks = {check.name: check.problems for check in verify_trtllm(package)}
    found = "\n".join(checks["LLM arguments"])
    assert "model_kwargs: is not an argument of TensorRT-LLM 1.2.1; it came with" in found
    assert "model: is the server's to say, not that of llm_args.yaml; remove it" in found
    assert "max_batch_size: 9 in llm_args.yaml, 8 in engine.json" in found
    assert "world_size: 1 in engine.json, the parallel sizes of llm_args.yaml need 3" in found
    assert "adapters.polite: adapters/polite holds no adapter" in found
    assert checks["checkpoint: GPU"] == ("TensorRT-LLM 1.2 lists FP8 for SM89, SM90, SM100, SM103, SM120 only",)
    assert "128 inputs are not divided by 3" in checks["checkpoint: tensor parallel"][0]
    arguments.write_text("- a list")
    assert "holds no mapping of LLM arguments; build the package again" in verify_trtllm(package)[0].problems[0]


def test_verify_holds_engine_json_against_the_plan(engine: Path, trtllm_recipe: Path, tmp_path: Path) -> None:
    package = as_package(engine, tmp_path, "H100", trtllm_recipe)
    rewrite(package / "engine" / "engine.json", lambda found: found.update(container="26.03", more=1))
    checks = {check.name: check.problems for check in verify_trtllm(package)}
    assert checks["engine.json"] == (
        "container is '26.03', the plan says '26.07'; build the package again",
        "more is 1, the plan says None; build the package again",
    )


def change_a_scale(weights: Path) -> None:
    """Another input scale for the keys of one layer than for its queries."""
    weights.chmod(0o644)
    raw = bytearray(weights.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    end = header["model.layers.1.self_attn.k_proj.input_scale"]["data_offsets"][1]
    raw[8 + length + end - 1] ^= 0x01  # of the exponent
    weights.write_bytes(bytes(raw))


UNEQUAL = "model.layers.1.self_attn.{q_proj,k_proj,v_proj}: input_scale must be equal, but they are "


def test_verify_finds_an_unequal_scale(engine: Path, trtllm_recipe: Path, tmp_path: Path) -> None:
    package = as_package(engine, tmp_path, "H100", trtllm_recipe)
    change_a_scale(package / "engine" / "model.safetensors")
    checks = {check.name: check.problems for check in verify_trtllm(package)}
    assert checks.pop("checkpoint: fused projections")[0].startswith(UNEQUAL)
    assert not any(checks.values())


def test_the_engine_step_refuses_a_checkpoint_that_would_not_load(
    engine: Path, trtllm_recipe: Path, adapter: Path, tmp_path: Path
) -> None:
    checkpoint, staging = tmp_path / "content", Staging(tmp_path / "staging", tmp_path / "unfinished")
    shutil.copytree(engine, checkpoint, ignore=shutil.ignore_patterns("adapters", "engine.json", "llm_args.yaml"))
    staging.content.mkdir(parents=True)
    plan = prepare(trtllm_recipe).plan
    work = Work(
        plan=plan,
        step=plan.step("engine"),
        source=tmp_path,
        source_files=(),
        inputs={"compress": Artifact("compress", "key", tmp_path, "digest", {}, ())},
        files={"polite": adapter},
        file_digests={"polite": "digest"},
        staging=staging,
        reporter=ConsoleReporter(),
    )
    assert run_step(work)["result"]["checks"][0] == "recognition"
    assert (staging.content / "llm_args.yaml").read_bytes() == (engine / "llm_args.yaml").read_bytes()
    shutil.rmtree(staging.content)
    change_a_scale(checkpoint / "model.safetensors")
    with pytest.raises(CompatibilityError, match="TensorRT-LLM 1.2.1 would not take the checkpoint") as caught:
        run_step(work)
    assert UNEQUAL in str(caught.value)
    assert not staging.content.exists()


def test_int4_checkpoints_are_taken(trtllm_recipe: Path, cli: Cli, tmp_path: Path) -> None:
    """What `compress` exports has pre_quant_scale exactly where TensorRT-LLM wants it."""
    changes = ("compress.format=int4_awq", "compress.group_size=64", "compress.kv_cache=none", "model.adapters=[]")
    options = [word for change in changes for word in ("--set", change)]
    engine = Path(cli("build", trtllm_recipe, "--until", "engine", *options).stdout.strip())
    checks = {
        check.name: check for check in verify_trtllm(as_package(engine, tmp_path, "A100", trtllm_recipe, *changes))
    }
    assert all(check.passed for check in checks.values()), checks
    assert checks["checkpoint: AWQ input scales"].detail.startswith("6 layers with a scale of their own")


def test_the_deployment_files(trtllm_recipe: Path, cli: Cli) -> None:
    deploy = Path(cli("build", trtllm_recipe, "--until", "deploy").stdout.strip())
    assert sorted(path.name for path in deploy.iterdir()) == ["Dockerfile", "OCI.md", "compose.yaml", "launch.sh"]
    assert "ARG BASE_IMAGE=nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3\n" in (deploy / "Dockerfile").read_text()
    assert "TRTLLM_LOAD_KV_SCALES" in (deploy / "launch.sh").read_text()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda path: (path / "adapter_config.json").unlink(), "has no adapter_config.json; give an adapter as PEFT"),
        (lambda path: rewrite(path / "adapter_config.json", lambda it: it.update(r=64)),
         "has rank 64, more than max_lora_rank 8; set runtime.lora_config.max_lora_rank: 64"),
        (lambda path: rewrite(path / "adapter_config.json", lambda it: it.update(peft_type="IA3")),
         "is of type IA3, not LORA; give a LoRA adapter"),
        (lambda path: (path / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors; save it as sa"),
        (shutil.rmtree, "does not exist; name a directory with adapter_config.json and adapter_model.safetensors"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit(
    trtllm_recipe: Path, adapter: Path, cli: Cli, tmp_path: Path, change: Callable[[Path], object], sentence: str
) -> None:
    broken = Path(shutil.copytree(adapter, tmp_path / "polite"))
    change(broken)
    done = cli("check", trtllm_recipe, "--set", f"model.adapters=[{broken}]", check=2)
    assert "error: model.adapters" in done.stderr
    assert sentence in done.stderr


def test_exit_codes(trtllm_recipe: Path, cli: Cli) -> None:
    assert "allowed" in cli("check", trtllm_recipe, "--set", "runtime.moe_config.backend=x", check=3).stderr
    assert "did you mean" in cli("check", trtllm_recipe, "--set", "runtime.extra.stream_intervall=1", check=2).stderr


def test_doctor_versions(cli: Cli) -> None:
    done = cli("doctor", "--versions")
    lines = done.stdout.splitlines()
    newest = next(line for line in lines if line.startswith("26.07"))
    assert newest.split()[1:4] == ["1.2.1", "10.14.1.48", "13.1.0.036"]
    assert newest.split()[7:9] == ["==4.57.3", "~=0.37.0"]
    assert "unknown" in next(line for line in lines if line.startswith("25.11")), "no source for 1.0.3.2510"
    assert any(line.startswith("1.3 ") and "not proven for a release" in line for line in lines)
    # Every table is there, and the flags of each line say what they hold for and what changed.
    for title in (
        "LLM arguments against the schema before",
        "flags of trtllm-build",
        "quantization: the SM versions",
        "speculative decoding",
        "architectures",
    ):
        assert any(line.startswith(title) for line in lines), title
    assert any("58fb435e" in line and "removed auto_parallel, cluster_key, gpus_per_node" in line for line in lines)
    assert any(line.startswith("W4A16_AWQ") and line.split()[1:5] == ["80", "86", "89", "90"] for line in lines)
    assert any("speculative_model_dir is now speculative_model" in line for line in lines)
    found = json.loads(cli("doctor", "--versions", "--json").stdout)
    assert {row["name"]: row["releases"] for row in found["build_flags"]}["1.2"] == ["1.2.0", "1.2.1"]
    assert all(row["commit"] and row["proof"] and row["date"] for row in found["build_flags"])
    assert found["containers"][0]["image"] == "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
    assert (found["containers"][0]["transformers"], found["containers"][0]["modelopt"]) == ("==4.57.3", "~=0.37.0")
    assert next(row for row in found["containers"] if row["tag"] == "25.11")["transformers"] is None
    old = next(row for row in found["schemas"] if row["name"] == "1.2.1")
    assert old["classes"]["KvCacheConfig"]["tokens_per_block"]["default"] == 32
    assert {row["name"] for row in found["schemas"]} == {"1.0.0", "1.1.0", "1.2.1", "1.3.0rc3", "1.3rc", "newest"}


def test_a_whole_package(trtllm_recipe: Path, cli: Cli, tmp_path: Path) -> None:
    """From the recipe to a package that every offline check accepts; answers are for the container to give."""
    package = tmp_path / "package"
    cli("build", trtllm_recipe, "-o", package, "--set", "quality.max_perplexity_ratio=10.0")
    lines = cli("verify", package).stdout.splitlines()
    assert all(line.startswith("passed") for line in lines)
    names = [line.removeprefix("passed  ").split(": ")[0] for line in lines]
    assert names[:3] + names[-2:] == ["bytes", "lock", "engine", "model repository", "deployment files"]
    assert "passed  engine.json: TensorRT-LLM 1.2.1, container 26.07, world size 1" in lines
    assert lines[-1].endswith("nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3; world size 1")
    assert {"passed  model repository: tensorrt_llm", "passed  checkpoint: packing: 21 layers in FP8"} <= set(lines)
    config = (package / "model_repository" / "tensorrt_llm" / "config.pbtxt").read_text()
    assert 'key: "runtime" value { string_value: "trtllm" }' in config
    assert "adapters/polite" in config
    assert "runs in a Triton TensorRT-LLM container" in cli("verify", package, "--served", check=6).stderr


def test_the_stock_form_and_several_instances(trtllm_recipe: Path, cli: Cli, tmp_path: Path) -> None:
    changes = (
        *("serving.model_py=upstream", "serving.gpu_device_ids=[[0],[1]]", "model.adapters=[]"),
        *("quality.max_perplexity_ratio=10.0", "runtime.lora_config={}"),
    )
    options = [word for change in changes for word in ("--set", change)]
    package = tmp_path / "stock"
    cli("build", trtllm_recipe, "-o", package, *options)
    model = package / "model_repository" / "tensorrt_llm"
    assert {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()} == {
        "README.md", "config.pbtxt", "1/model.yaml",
    }  # fmt: skip
    arguments = parse_yaml((model / "1" / "model.yaml").read_text())
    assert arguments["triton_config"] == {
        "max_batch_size": 0, "decoupled": True, "cancellation_check_period_ms": 50,
    }  # fmt: skip
    assert arguments["model"] == arguments["tokenizer"] == "/package/engine"
    written = parse_yaml((package / "engine" / "llm_args.yaml").read_text())
    assert {name: arguments[name] for name in written} == written
    config = (model / "config.pbtxt").read_text()
    assert 'key: "gpu_device_ids" value { string_value: "0;1" }' in config
    assert "count: 2" in config
    assert all(line.startswith("passed") for line in cli("verify", package).stdout.splitlines())


@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        (["serving.gpu_device_ids=[[0,1]]"], 2, "serving.gpu_device_ids.0: names 2 GPUs, and one engine takes 1"),
        (
            ["serving.gpu_device_ids=[[0,0]]", "runtime.tensor_parallel_size=2"],
            2,
            "serving.gpu_device_ids.0: [0, 0] names a GPU twice",
        ),
        (["serving.gpu_device_ids=[[-1]]"], 2, "serving.gpu_device_ids.0.0"),
        (["serving.model_py=mine"], 2, "serving.model_py"),
    ],
)
def test_instances_that_do_not_fit(trtllm_recipe: Path, cli: Cli, changes: list[str], code: int, sentence: str) -> None:
    options = [word for change in changes for word in ("--set", change)]
    assert sentence in cli("check", trtllm_recipe, *options, check=code).stderr


def test_other_runtimes_have_neither(recipe: Path, cli: Cli) -> None:
    changes = (
        "model_py=upstream",
        "gpu_device_ids=[[0]]",
        "backend=tensorrtllm",
        "layout=tokens",
        "model_name=tensorrt_llm",
    )
    options = [word for change in changes for word in ("--set", f"serving.{change}")]
    done = cli("check", recipe, *options, check=3)
    assert "serving.model_py: upstream: only the runtime trtllm has it; remove it" in done.stderr
    assert "serving.backend: tensorrtllm: only the runtime trtllm-engine has it; remove it" in done.stderr
    assert "serving.layout: tokens: only TensorRT engines are served without text; use llm" in done.stderr
    assert "serving.gpu_device_ids: [[0]]: only the runtimes trtllm and trtllm-engine have it; remove" in done.stderr
