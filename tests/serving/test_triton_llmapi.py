"""Repositories of the runtime `trtllm`, ours and the stock form: rendered, checked, and broken one fault at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from llm_helpers import spec
from trtllm_helpers import ARGS, make_engine

from trtbuild.adapters import triton_config
from trtbuild.adapters.triton import check_repository, render_repository
from trtbuild.errors import RecipeError

MODEL = "tensorrt_llm"
Change = Callable[[Path], Any]
OWN: dict[str, Any] = {"runtime": "trtllm", "lora_adapters": {"formal": "adapters/formal"}}
STOCK: dict[str, Any] = {"runtime": "trtllm", "model_py": "upstream", "llm_args": ARGS}
# Inputs of triton_backend/all_models/llmapi/tensorrt_llm/config.pbtxt @c8c6df08, restated.
STOCK_INPUTS = {
    "text_input", "streaming", "stop", "sampling_param_best_of", "sampling_param_temperature", "sampling_param_top_k",
    "sampling_param_top_p", "sampling_param_frequency_penalty", "sampling_param_presence_penalty",
    "sampling_param_max_tokens", "sampling_param_stop", "sampling_param_seed",
    "sampling_param_exclude_input_from_output", "sampling_param_return_perf_metrics", "return_finish_reason",
    "return_stop_reason", "return_cumulative_logprob",
}  # fmt: skip


def make(package: Path, root: Path, settings: dict[str, Any], **args: Any) -> Path:
    make_engine(package / "engine", root / "engine", **args)
    render_repository(spec(**settings), root / "model_repository")
    return root


def problems(root: Path) -> list[str]:
    return [str(problem) for problem in check_repository(root / "model_repository", engine=None)]


@pytest.fixture(scope="module")
def own(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(package, tmp_path_factory.mktemp("own"), OWN)


@pytest.fixture(scope="module")
def stock(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(package, tmp_path_factory.mktemp("stock"), STOCK)


def config(old: str, new: str) -> Change:
    def change(root: Path) -> None:
        path = root / "model_repository" / MODEL / "config.pbtxt"
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


def parameter(name: str, value: str) -> Change:
    def change(root: Path) -> None:
        path = root / "model_repository" / MODEL / "config.pbtxt"
        line = f'parameters {{ key: "{name}" value {{ string_value: {json.dumps(value)} }} }}\n'
        path.write_text(path.read_text(encoding="utf-8") + line, encoding="utf-8")

    return change


def both(*changes: Change) -> Change:
    return lambda root: [change(root) for change in changes]


def in_yaml(path: str, **changes: Any) -> Change:
    """Change entries of a YAML file, or of its triton_config for names that begin with in_; None removes one."""

    def change(root: Path) -> None:
        file = root / path
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
        for name, value in changes.items():
            place, key = (found["triton_config"], name[3:]) if name.startswith("in_") else (found, name)
            place.pop(key, None)
            if value is not None:
                place[key] = value
        file.write_text(yaml.safe_dump(found), encoding="utf-8")

    return change


def write(path: str, text: str | None) -> Change:
    def change(root: Path) -> None:
        if text is None:
            (root / path).unlink()
        else:
            (root / path).write_text(text, encoding="utf-8")

    return change


ARGS_FILE = "engine/llm_args.yaml"
TWO = config("count: 1", "count: 2")
TP2 = in_yaml(ARGS_FILE, tensor_parallel_size=2)
OWN_FAULTS: dict[str, tuple[Change, str]] = {
    "no LLM arguments": (write(ARGS_FILE, None), "engine/llm_args.yaml: the file is missing"),
    "no YAML": (write(ARGS_FILE, "a: [1\n"), "engine/llm_args.yaml: cannot be read"),
    "no mapping": (write(ARGS_FILE, "- 1\n"), "engine/llm_args.yaml: holds no mapping of LLM arguments"),
    "another length": (in_yaml(ARGS_FILE, max_seq_len=256), "and the engine's is 256 (llm_args.yaml)"),
    "prompt longer than a step": (
        in_yaml(ARGS_FILE, max_num_tokens=128), "max_input_tokens is 400, and one step takes max_num_tokens 128 while"
    ),
    "no GPUs for two": (TWO, "there are 2 instances, and parameter gpu_device_ids names no GPUs for them"),
    "groups and instances": (parameter("gpu_device_ids", "0;1"), "1 instances, and gpu_device_ids '0;1' has 2 groups"),
    "no numbers": (parameter("gpu_device_ids", "zero"), "parameter gpu_device_ids is 'zero'; write GPU numbers"),
    "too few GPUs": (
        both(parameter("gpu_device_ids", "0"), TP2),
        "the group 0 of gpu_device_ids has 1 GPUs, and the LLM arguments need 2 (tensor_parallel_size 2",
    ),
    "one GPU twice": (
        both(parameter("gpu_device_ids", "0,0"), TP2), "the GPUs 0,0 of one group are not distinct numbers from 0"
    ),
    "GPU instance": (config("KIND_CPU", "KIND_GPU"), "use KIND_CPU: TensorRT-LLM takes the GPUs of gpu_device_ids"),
    "adapter that is not there": (
        write("engine/adapters/formal/adapter_config.json", None), "'formal' has no adapter_config.json in engine/adap"
    ),
    "adapters that are no JSON": (config('{\\"formal\\"', "{"), "parameter lora_adapters is no JSON"),
    "adapters without LoRA": (in_yaml(ARGS_FILE, enable_lora=None), "and llm_args.yaml does not switch LoRA on"),
    "postprocess workers": (in_yaml(ARGS_FILE, num_postprocess_workers=2), "num_postprocess_workers sends whole"),
    "beams": (in_yaml(ARGS_FILE, max_beam_width=4), "max_beam_width is 4, and this model asks for one beam"),
    "no tokenizer": (write("engine/tokenizer.json", None), "engine: there are no tokenizer files"),
    "missing backend": (
        write(f"model_repository/{MODEL}/1/backend_trtllm.py", None), "imports backend_trtllm.py, which is missing"
    ),
    "missing input": (config('"lora_name"', '"adapter"'), "input lora_name of the llm layout is missing"),
    "streaming": (config("decoupled: true", "decoupled: false"), "parameter streaming is 'true', and model_"),
}  # fmt: skip
MODEL_YAML = f"model_repository/{MODEL}/1/model.yaml"
STOCK_FAULTS: dict[str, tuple[Change, str]] = {
    "no model.yaml": (write(MODEL_YAML, None), f"{MODEL}/1/model.yaml: the file is missing"),
    "no triton_config": (in_yaml(MODEL_YAML, triton_config=None), "triton_config is missing, and the container's"),
    "no batch size": (in_yaml(MODEL_YAML, in_max_batch_size=None), "triton_config.max_batch_size is None, and the"),
    "no decoupled": (in_yaml(MODEL_YAML, in_decoupled=None), "triton_config.decoupled is None, and the"),
    "batch size": (in_yaml(MODEL_YAML, in_max_batch_size=8), "max_batch_size is 8, and config.pbtxt says 0"),
    "decoupled": (in_yaml(MODEL_YAML, in_decoupled=False), "decoupled is false, and config.pbtxt says true"),
    "decoupled as text": (in_yaml(MODEL_YAML, in_decoupled="yes"), "triton_config.decoupled is 'yes', and the"),
    "decoupled in config.pbtxt": (config("decoupled: true", "decoupled: false"), "decoupled is true, and config.pbtxt"),
    "period": (in_yaml(MODEL_YAML, in_cancellation_check_period_ms=0), "cancellation_check_period_ms is 0"),
    "no model": (in_yaml(MODEL_YAML, model=None), "model is missing; name the engine's directory in the container"),
    "no GPUs for two": (TWO, "there are 2 instances, and parameter gpu_device_ids names no GPUs for them"),
    "too few GPUs": (
        both(parameter("gpu_device_ids", "3"), in_yaml(MODEL_YAML, pipeline_parallel_size=2)),
        "the group 3 of gpu_device_ids has 1 GPUs, and the LLM arguments need 2",
    ),
    "name": (config(f'name: "{MODEL}"', 'name: "other"'), "the name 'other' differs from the directory"),
}  # fmt: skip


def test_the_rendered_repositories_have_no_fault(own: Path, stock: Path) -> None:
    assert problems(own) == []
    assert problems(stock) == []


@pytest.mark.parametrize("fault", OWN_FAULTS)
def test_faults_of_our_own_form(fault: str, own: Path, tmp_path: Path) -> None:
    broken(own, tmp_path / "package", OWN_FAULTS[fault])


@pytest.mark.parametrize("fault", STOCK_FAULTS)
def test_faults_of_the_stock_form(fault: str, stock: Path, tmp_path: Path) -> None:
    broken(stock, tmp_path / "package", STOCK_FAULTS[fault])


def broken(good: Path, copy: Path, fault: tuple[Change, str]) -> None:
    change, sentence = fault
    shutil.copytree(good, copy)
    change(copy)
    found = problems(copy)
    assert any(sentence in problem for problem in found), found
    assert all("; " in problem for problem in found), "every sentence says what to do"


def test_chunked_prefill_takes_longer_prompts(package: Path, tmp_path: Path) -> None:
    make(package, tmp_path, OWN, max_num_tokens=128, enable_chunked_prefill=True)
    assert problems(tmp_path) == []


def test_instances_on_groups_of_gpus(package: Path, tmp_path: Path) -> None:
    settings = OWN | {"instance_count": 2, "gpu_device_ids": "0,1;2,3"}
    make(package, tmp_path, settings, tensor_parallel_size=2)
    assert problems(tmp_path) == []
    model, _ = triton_config.read_model(tmp_path / "model_repository" / MODEL)
    assert model is not None
    assert [(group.count, group.kind) for group in model.config.instance_group] == [(2, 2)], "KIND_CPU"
    assert model.parameter("gpu_device_ids") == "0,1;2,3"


def test_the_stock_form_is_the_container_s_but_for_its_python_files(stock: Path) -> None:
    directory = stock / "model_repository" / MODEL
    files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    assert files == ["1/model.yaml", "README.md", "config.pbtxt"]
    model, faults = triton_config.read_model(directory)
    assert model is not None
    assert not faults
    assert {tensor.name for tensor in model.config.input} == STOCK_INPUTS
    assert [tensor.name for tensor in model.config.input if not tensor.optional] == ["text_input"]
    assert (model.config.max_batch_size, model.config.model_transaction_policy.decoupled) == (0, True)
    found = yaml.safe_load((directory / "1" / "model.yaml").read_text(encoding="utf-8"))
    assert found.pop("triton_config") == {"max_batch_size": 0, "decoupled": True, "cancellation_check_period_ms": 50}
    assert (found.pop("model"), found.pop("tokenizer")) == ("/package/engine", "/package/engine")
    assert found == ARGS
    note = (directory / "README.md").read_text(encoding="utf-8")
    source = "/app/all_models/llmapi/tensorrt_llm/1"
    target = "/package/model_repository/tensorrt_llm/1/"
    assert f"RUN cp {source}/model.py {source}/helpers.py {target}" in note


def test_the_stock_form_without_streaming(package: Path, tmp_path: Path) -> None:
    settings = STOCK | {"streaming": False, "instance_count": 2, "gpu_device_ids": "0;0"}
    make(package, tmp_path, settings)
    assert problems(tmp_path) == []
    found = yaml.safe_load((tmp_path / MODEL_YAML).read_text(encoding="utf-8"))
    assert found["triton_config"]["decoupled"] is False
    note = (tmp_path / "model_repository" / MODEL / "README.md").read_text(encoding="utf-8")
    assert "launch_triton_server.py --no-mpi" in note


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"model_py": "stock", "runtime": "trtllm"},
            "serving.model_py: 'stock' is not known; use trtbuild or upstream",
        ),
        ({"model_py": "upstream"}, "the runtime embedded has no model_py; leave them out, or use the runtime trtllm"),
        ({"instance_count": 2, "gpu_device_ids": "0;1"}, "the runtime embedded has no instance_count, gpu_device_ids"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        render_repository(spec(**change), tmp_path)
    assert sentence in str(caught.value)


def test_rendering_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        for settings, folder in ((OWN, "own"), (STOCK, "stock")):
            render_repository(spec(**settings), tmp_path / name / folder)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 17
    assert all((tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes() for path in files)
