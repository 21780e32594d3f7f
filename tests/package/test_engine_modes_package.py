"""Packages for TensorRT engines with a draft model, with a checkpoint that has heads, and with adapters."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_host import EngineHost

Cli = Callable[..., subprocess.CompletedProcess[str]]


def write_recipe(place: Path, checkpoint: Path, store: Path, more: str) -> Path:
    path = place / "recipe.yaml"
    path.write_text(
        f"schema_version: 1\nmodel: {{path: {checkpoint}}}\ntarget: {{gpu: H100}}\nstore: {store}\n{more}",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, store: Path, cli: Cli, laptop: EngineHost
) -> tuple[Path, str]:
    """A package of a model and its draft model, and what the build said."""
    from tiny import save_checkpoint

    root = tmp_path_factory.mktemp("pair")
    save_checkpoint(root / "draft", seed=1, overrides={"num_hidden_layers": 1})
    recipe = write_recipe(
        root, tiny_llama, store,
        "runtime: {kind: trtllm-engine, tensor_parallel_size: 2, max_batch_size: 4, max_seq_len: 256}\n"
        "speculative: {method: draft_target, draft: draft, max_draft_len: 3}\n",
    )  # fmt: skip
    done = cli("build", recipe, "-o", root / "package", **laptop.environment())
    return root / "package", done.stderr


def checks(cli: Cli, package: Path, code: int) -> dict[str, dict[str, Any]]:
    done = cli("verify", package, "--json", check=code)
    return {check["name"]: check for check in json.loads(done.stdout)}


def manifest(package: Path) -> dict[str, Any]:
    described: dict[str, Any] = json.loads((package / "manifest.json").read_text())
    return described


def parameter(package: Path, model: str, name: str) -> str | None:
    text = (package / "model_repository" / model / "config.pbtxt").read_text()
    line = next((line for line in text.splitlines() if f'key: "{name}"' in line), None)
    return None if line is None else line.split('string_value: "')[1].split('"')[0]


def test_the_package_has_two_engines(pair: tuple[Path, str], cli: Cli) -> None:
    package, said = pair
    assert "the engine was not built here (" in said
    assert "the draft model's engine was not built here (" in said
    assert f": run {package}/engine/draft/build.sh in reach of" in said
    files = {path.relative_to(package / "engine/draft").as_posix() for path in (package / "engine/draft").rglob("*")}
    assert files == {
        "build.sh", "engine.json", "checkpoint", "checkpoint/config.json", "checkpoint/rank0.safetensors",
        "checkpoint/rank1.safetensors",
    }  # fmt: skip
    config = json.loads((package / "engine/draft/checkpoint/config.json").read_text())
    assert (config["num_hidden_layers"], config["mapping"]["tp_size"]) == (1, 2)
    script = " ".join((package / "engine/build.sh").read_text().split())
    assert "--speculative_decoding_mode draft_tokens_external --max_draft_len 3" in script
    assert "speculative" not in (package / "engine/draft/build.sh").read_text()
    found = checks(cli, package, 0)
    assert found["draft: TensorRT engine"]["detail"].startswith("not built yet")
    assert "draft: TensorRT-LLM checkpoint: ranks" in found


def test_the_repository_asks_both(pair: tuple[Path, str]) -> None:
    package, _ = pair
    assert parameter(package, "tensorrt_llm_bls", "tensorrt_llm_draft_model_name") == "tensorrt_llm_draft"
    assert parameter(package, "tensorrt_llm_bls", "num_draft_tokens") == "3"
    assert parameter(package, "tensorrt_llm", "gpt_model_path") == "/package/engine/built"
    assert parameter(package, "tensorrt_llm_draft", "gpt_model_path") == "/package/engine/draft/built"
    shares = [
        float(parameter(package, model, "kv_cache_free_gpu_mem_fraction") or 0)
        for model in ("tensorrt_llm", "tensorrt_llm_draft")
    ]
    assert sum(shares) == pytest.approx(0.9)
    assert shares[0] > shares[1] > 0
    launch = (package / "deploy/launch.sh").read_text()
    assert "TRTLLM_ORCHESTRATOR=1" in launch, "two engines on two GPUs each"
    assert "draft=/package/engine/draft/built" in launch


def test_both_engines_are_built_and_read_back(pair: tuple[Path, str], tmp_path: Path, store: Path, cli: Cli) -> None:
    """By the build itself where it can, or by the two scripts; the next build takes what these have made."""
    host, recipe, out = (
        EngineHost(tmp_path / "host", "nvidia-smi", "docker"),
        pair[0].parent / "recipe.yaml",
        tmp_path / "p",
    )
    done = cli("build", recipe, "-o", out, **host.environment())
    assert "trtllm-build: built (" in done.stderr
    assert "trtllm-build-draft: built (" in done.stderr
    assert manifest(out)["digest"] == manifest(pair[0])["digest"]
    shutil.rmtree(store / "built")
    package = Path(shutil.copytree(pair[0], tmp_path / "package"))
    for directory in (package / "engine", package / "engine/draft"):
        script = subprocess.run(
            [str(directory / "build.sh")], env=host.environment(), capture_output=True, text=True, check=False
        )
        assert (script.returncode, script.stdout.strip()) == (0, str(directory / "built")), script.stderr
    again = cli("build", recipe, "-o", package, **host.environment())
    assert "trtllm-build-draft: taken from the package (" in again.stderr
    shutil.rmtree(store / "built")
    other = cli("build", recipe, "-o", package, "--set", "runtime.max_batch_size=2", check=2, **host.environment())
    assert "holds engine/built, which engine/build.sh made" in other.stderr
    listed = {entry["path"] for entry in manifest(package)["files"]}
    assert {"engine/built/rank1.engine", "engine/draft/built/rank1.engine"} <= listed
    found = checks(cli, package, 0)
    for prefix in ("", "draft: "):
        assert found[f"{prefix}TensorRT engine"]["detail"] == "TensorRT-LLM 1.2.1, 2 ranks, SM90"
    copied = (package / "deploy/Dockerfile").read_text()
    assert "engine/built /package/engine/built" in copied
    assert "engine/draft/built /package/engine/draft/built" in copied
    config = package / "engine/draft/built/config.json"
    config.chmod(0o644)
    config.write_text(config.read_text().replace('"max_batch_size": 4', '"max_batch_size": 2'))
    found = checks(cli, package, 5)
    assert "max_batch_size: is 2, the plan says 4" in found["draft: TensorRT engine"]["problems"][0]
    assert found["TensorRT engine"]["problems"] == []
    assert any("tensorrt_llm_draft" in problem for problem in found["model repository"]["problems"])


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (("tensorrt_llm_draft", 'enable_kv_cache_reuse" value { string_value: "true"',
          'enable_kv_cache_reuse" value { string_value: "false"'), "every round of drafts would compute the whole"),
        (("tensorrt_llm_draft", 'fraction" value { string_value: "0.', 'fraction" value { string_value: "0.9'),
         "together more than there is; let them add up to less than 1"),
        (("tensorrt_llm_bls", '"tensorrt_llm_draft" }', '"" }'), "nothing asks it: tensorrt_llm_bls has the parameter"),
        (("tensorrt_llm_draft", 'backend: "tensorrtllm"', 'backend: "python"'), "its backend is 'python', and tensor"),
        (("tensorrt_llm_bls", 'key: "num_draft_tokens"', 'key: "x"'), "parameter num_draft_tokens is missing"),
    ],
)  # fmt: skip
def test_a_repository_edited_into_inconsistency(
    pair: tuple[Path, str], tmp_path: Path, cli: Cli, edit: tuple[str, str, str], sentence: str
) -> None:
    package = Path(shutil.copytree(pair[0], tmp_path / "package"))
    path = package / "model_repository" / edit[0] / "config.pbtxt"
    text = path.read_text()
    assert edit[1] in text
    path.write_text(text.replace(edit[1], edit[2]))
    problems = checks(cli, package, 5)["model repository"]["problems"]
    assert any(sentence in problem for problem in problems), problems


def test_a_draft_that_is_gone(pair: tuple[Path, str], tmp_path: Path, cli: Cli) -> None:
    package = Path(shutil.copytree(pair[0], tmp_path / "package"))
    shutil.rmtree(package / "model_repository" / "tensorrt_llm_draft")
    problems = checks(cli, package, 5)["model repository"]["problems"]
    assert any("is 'tensorrt_llm_draft', which is not in this repository" in problem for problem in problems)
    shutil.rmtree(package / "engine" / "draft")
    assert any(check["problems"] and name != "bytes" for name, check in checks(cli, package, 5).items())


def test_a_checkpoint_with_heads_is_taken_as_it_is(tmp_path: Path, tiny_llama: Path, store: Path, cli: Cli) -> None:
    from core.test_engine_drafts import heads

    heads(tmp_path / "heads", "MedusaForCausalLM", max_draft_len=4)
    recipe = write_recipe(
        tmp_path, tiny_llama, store,
        "runtime: {kind: trtllm-engine, max_batch_size: 4, max_seq_len: 256}\n"
        "speculative: {method: medusa, draft: heads, choices: [[0], [0, 0], [1]]}\n",
    )  # fmt: skip
    package = tmp_path / "package"
    cli("build", recipe, "-o", package)
    checkpoint = package / "engine" / "checkpoint"
    assert {path.name for path in checkpoint.iterdir()} == {"config.json", "rank0.safetensors"}
    assert (checkpoint / "rank0.safetensors").read_bytes() == b"weights"
    assert parameter(package, "tensorrt_llm", "decoding_mode") == "medusa"
    assert parameter(package, "tensorrt_llm", "medusa_choices") == "{0}, {0, 0}, {1}"
    script = " ".join((package / "engine/build.sh").read_text().split())
    assert "--speculative_decoding_mode medusa --max_draft_len 4" in script
    assert (package / "engine" / "tokenizer.json").is_file()


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, store: Path, cli: Cli) -> Path:
    """A package with two adapters."""
    import torch
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("adapted")
    for name, rank in (("polite", 2), ("terse", 4)):
        (root / name).mkdir()
        tensors = {}
        for layer, part in itertools.product(range(3), ("q", "v")):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{part}_proj"
            tensors[f"{prefix}.lora_A.weight"] = torch.full((rank, 64), 0.25)
            tensors[f"{prefix}.lora_B.weight"] = torch.full((64 if part == "q" else 32, rank), 0.5)
        save_file(tensors, root / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none"}
        (root / name / "adapter_config.json").write_text(json.dumps(config))
    write_recipe(
        root, tiny_llama, store,
        "runtime:\n  kind: trtllm-engine\n  max_batch_size: 4\n  max_seq_len: 256\n"
        "  lora_config: {max_lora_rank: 4, lora_target_modules: [attn_q, attn_k, attn_v]}\n",
    )  # fmt: skip
    cli("build", root / "recipe.yaml", "-o", root / "package", "--set", "model.adapters=[polite, terse]")
    return root


def test_adapters_are_packaged_for_the_server(adapted: Path, cli: Cli) -> None:
    package = adapted / "package"
    engine = json.loads((package / "engine/engine.json").read_text())
    assert (engine["adapters"], engine["dtype"]) == ({"1": "polite", "2": "terse"}, "float16")
    assert json.loads((package / "engine/checkpoint/config.json").read_text())["dtype"] == "float16"
    script = " ".join((package / "engine/build.sh").read_text().split())
    assert "--lora_plugin auto --lora_target_modules attn_q attn_k attn_v --max_lora_rank 4" in script
    assert "--lora_dir" not in script
    weights = np.load(package / "engine/adapters/2/model.lora_weights.npy")
    assert weights.shape == (6, 4 * (64 + 64))
    assert weights[0].tolist() == [0.25] * 4 * 64 + [0.5 * 8 / 4] * 4 * 64
    assert np.load(package / "engine/adapters/1/model.lora_config.npy").tolist()[:3] == [
        [1, 0, 2],
        [3, 0, 2],
        [1, 1, 2],
    ]
    assert parameter(package, "tensorrt_llm", "lora_prefetch_dir") == "/package/engine/adapters"
    assert parameter(package, "tensorrt_llm", "lora_cache_max_adapter_size") == "4"
    assert parameter(package, "tensorrt_llm_bls", "lora_adapters_dir") == "../../engine/adapters"
    assert "engine/adapters /package/engine/adapters" in (package / "deploy/Dockerfile").read_text()
    found = checks(cli, package, 0)
    assert found["LoRA adapters"]["detail"] == "1: polite, 2: terse"


def test_adapters_that_were_changed_by_hand(adapted: Path, tmp_path: Path, cli: Cli) -> None:
    package = Path(shutil.copytree(adapted / "package", tmp_path / "package"))
    (package / "engine/adapters/2/model.lora_config.npy").unlink()
    assert "adapter terse: " in checks(cli, package, 5)["LoRA adapters"]["problems"][0]


@pytest.mark.parametrize(
    ("changes", "sentence", "code"),
    [
        (
            ["runtime.lora_config.max_lora_rank=2"],
            "model.adapters terse: layers.0.self_attn.q_proj has rank 4, more",
            2,
        ),
        (
            ["runtime.lora_config.lora_target_modules=[attn_q]"],
            "adapts self_attn.v_proj, which runtime.lora_config.l",
            2,
        ),
        (
            ["runtime.lora_config.lora_target_modules=[attn_q, attn_v, moe_gate]"],
            "moe_gate: adapters of engines chan",
            3,
        ),
        (
            ["runtime.tensor_parallel_size=4"],
            "attn_v: 4 ranks repeat the model's 2 key-value heads, and adapters ar",
            3,
        ),
        (
            ["speculative.method=lookahead"],
            "upstream says of speculation with LoRA adapters that it is untested; use",
            3,
        ),
        (["runtime.lora_config.max_loras=2"], "runtime.lora_config.max_loras: TensorRT engines have no counterpart", 3),
    ],
)
def test_adapters_that_the_recipe_does_not_fit(
    adapted: Path, cli: Cli, changes: list[str], sentence: str, code: int
) -> None:
    overrides = [word for change in ["model.adapters=[polite, terse]", *changes] for word in ("--set", change)]
    assert sentence in cli("check", adapted / "recipe.yaml", *overrides, check=code).stderr


def test_an_engine_for_adapters_that_clients_send(adapted: Path, cli: Cli) -> None:
    plan = json.loads(cli("plan", adapted / "recipe.yaml", "--json").stdout)
    flags = {row["flag"]: row["values"] for row in plan["arguments"]}
    assert flags["lora_target_modules"] == ["attn_q", "attn_k", "attn_v"]
    repository = next(step for step in plan["steps"] if step["kind"] == "repository")["parameters"]
    assert "lora_prefetch_dir" not in repository["engine"]["more"]
    assert "lora_adapters_dir" not in repository
    assert any("everything that is not quantized is float16" in warning for warning in plan["warnings"])


def test_the_tokenizer_as_xgrammar_reads_it(adapted: Path, tmp_path: Path, cli: Cli) -> None:
    """Against what upstream's script takes from the same tokenizer, loaded by Transformers."""
    from transformers import AutoTokenizer

    package = tmp_path / "package"
    guided = ("--set", "runtime.guided_decoding_backend=xgrammar")
    cli("build", adapted / "recipe.yaml", "-o", package, *guided)
    info = json.loads((package / "engine/xgrammar_tokenizer_info.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(package / "engine")
    assert info["encoded_vocab"] == sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    assert info["stop_token_ids"] == [tokenizer.eos_token_id]
    ours, theirs = json.loads(info["tokenizer_str"]), json.loads(tokenizer.backend_tokenizer.to_str())
    for part in ("model", "decoder", "pre_tokenizer", "normalizer"):
        assert ours[part] == theirs[part], part
    assert parameter(package, "tensorrt_llm", "guided_decoding_backend") == "xgrammar"
    place = parameter(package, "tensorrt_llm", "xgrammar_tokenizer_info_path")
    assert place == "/package/engine/xgrammar_tokenizer_info.json"
    assert checks(cli, package, 0)["guided decoding"]["detail"] == "320 tokens"
    path = package / "engine/xgrammar_tokenizer_info.json"
    path.chmod(0o644)
    path.write_text(json.dumps(info | {"stop_token_ids": [0]}))
    assert "stop_token_ids is not that of the tokenizer" in checks(cli, package, 5)["guided decoding"]["problems"][0]
