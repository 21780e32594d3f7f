"""The rendered repository, and one broken repository for every kind of fault that Triton would meet."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llm_helpers import spec
from model_repo.llm.wire import INPUTS, OUTPUTS

from trtbuild.adapters import triton_config
from trtbuild.adapters.triton import check_repository, render_repository
from trtbuild.errors import RecipeError

MODEL = "tensorrt_llm"
EMPTY_CLASS = "class TritonPythonModel:\n    pass\n"
Change = Callable[[Path], Any]


@pytest.fixture
def copy(package: Path, tmp_path: Path) -> Path:
    """The tiny package, to be broken."""
    shutil.copytree(package, tmp_path / "package")
    return tmp_path / "package"


def config(old: str, new: str) -> Change:
    """A change of the first `old` in config.pbtxt."""

    def change(package: Path) -> None:
        path = package / "model_repository" / MODEL / "config.pbtxt"
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


def write(name: str, text: str) -> Change:
    def change(package: Path) -> None:
        path = package / "model_repository" / MODEL / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    return change


def engine_json(**changes: Any) -> Change:
    def change(package: Path) -> None:
        path = package / "engine" / "engine.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")

    return change


def remove(name: str) -> Change:
    def change(package: Path) -> None:
        path = package / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def foreign_tokenizer(package: Path) -> None:
    path = package / "engine" / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    data["model"]["vocab"] = {token: number + (1000 if number > 2 else 0) for token, number in vocabulary.items()}
    path.write_text(json.dumps(data), encoding="utf-8")


def lossy_tokenizer(package: Path) -> None:
    path = package / "engine" / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[a-z]"}, "content": "x"}
    path.write_text(json.dumps(data), encoding="utf-8")


M = f"model_repository/{MODEL}"
FAULTS: dict[str, tuple[Change, str]] = {
    "protobuf syntax": (config("max_batch_size: 0", "max_batch_size 0"), "config.pbtxt: line 5:16"),
    "unknown field": (config("max_batch_size", "max_batch"), 'has no field named "max_batch"'),
    "unknown type": (config("TYPE_STRING", "TYPE_STR"), 'no value named TYPE_STR'),
    "placeholder for a number": (config("max_batch_size: 0", "max_batch_size: ${n}"), "unfilled placeholder ${n}"),
    "placeholder in a string": (config('"../../engine"', '"${engine_dir}"'), "unfilled placeholder ${engine_dir}"),
    "jinja left over": (config('"../../engine"', '"{{ engine_dir }}"'), "unfilled placeholder {{ engine_dir }}"),
    "name": (config(f'name: "{MODEL}"', 'name: "other"'), "the name 'other' differs from the directory 'tensorrt_llm'"),
    "no version directory": (remove(f"{M}/1"), "there is no version directory"),
    "no model.py": (remove(f"{M}/1/model.py"), "1/model.py: the file is missing, and Triton hangs at start-up"),
    "no config": (remove(f"{M}/config.pbtxt"), "tensorrt_llm/config.pbtxt: the file is missing"),
    "unknown backend": (config('"python"', '"pyton"'), "the backend 'pyton' is not known; did you mean 'python'?"),
    "GPU instance": (config("KIND_CPU", "KIND_GPU"), "the instance group has kind KIND_GPU; use KIND_CPU"),
    "decoupled": (config("decoupled: true", "decoupled: false"), "parameter streaming is 'true', and model"),
    "missing input": (config('"sampling_param_top_k"', '"top_k"'), "input sampling_param_top_k of the llm layout is"),
    "wrong type": (config('"input_ids" data_type: TYPE_INT32', '"input_ids" data_type: TYPE_INT64'),
                   "input input_ids is TYPE_INT64 [-1], and the model sends and reads TYPE_INT32 [-1]"),
    "missing output": (config('"output_ids"', '"ids"'), "output output_ids of the llm layout is missing"),
    "missing parameter": (config('key: "default_max_tokens"', 'key: "x"'), "parameter default_max_tokens is missing"),
    "syntax error": (write("1/model.py", "def f(:\n"), "1/model.py: line 1: not valid Python (invalid syntax)"),
    "no model class": (write("1/model.py", "x = 1\n"), "1/model.py: the class TritonPythonModel is missing"),
    "no execute": (write("1/model.py", EMPTY_CLASS), "TritonPythonModel has no method execute"),
    "foreign import": (write("1/text.py", "import nonexistent_thing\n"), "line 1: imports nonexistent_thing"),
    "missing sibling": (remove(f"{M}/1/text.py"), "imports text.py, which is missing"),
    "missing name": (write("1/text.py", "class Codec: ...\n"), "text.py defines no IncrementalDecoder"),
    "longer than the engine": (engine_json(max_seq_len=256), "max_seq_len is 512, and the engine's is 256"),
    "input longer": (config('"400"', '"512"'), "max_input_tokens is 512, and the engine takes 512 tokens with prompt"),
    "no number": (config('"300"', '"many"'), "parameter max_output_tokens is 'many'; a whole number above 0"),
    "default above most": (config('"16"', '"301"'), "default_max_tokens 301 exceeds max_output_tokens"),
    "other runtime": (engine_json(runtime="trtllm"), "is for the runtime embedded, engine.json for trtllm"),
    "no engine": (remove("engine"), "there is no directory"),
    "no engine.json": (remove("engine/engine.json"), "engine/engine.json: the file is missing"),
    "no tokenizer": (remove("engine/tokenizer.json"), "engine: there are no tokenizer files"),
    "damaged tokenizer": (lambda package: (package / "engine/tokenizer.json").write_text("{"), "json: cannot"),
    "tokenizer of another model": (foreign_tokenizer, "is none of the model's 320"),
    "tokenizer that loses text": (lossy_tokenizer, "comes back as"),
}  # fmt: skip


def test_the_rendered_repository_has_no_fault(package: Path) -> None:
    assert check_repository(package / "model_repository", engine=package / "engine") == []
    assert check_repository(package / "model_repository", engine=None) == [], "the model's own engine_dir leads there"


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_a_sentence(fault: str, copy: Path) -> None:
    change, sentence = FAULTS[fault]
    change(copy)
    problems = [str(problem) for problem in check_repository(copy / "model_repository", engine=None)]
    assert any(sentence in problem for problem in problems), problems
    assert all("; " in problem for problem in problems), "every sentence says what to do"


def test_an_empty_or_missing_repository(tmp_path: Path) -> None:
    assert "holds no model" in str(check_repository(tmp_path, engine=None)[0])
    assert "no model repository here" in str(check_repository(tmp_path / "none", engine=None)[0])


TWO_STEPS = """
name: "both" platform: "ensemble" max_batch_size: 0
input [ { name: "IN" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "OUT" data_type: TYPE_INT32 dims: [ -1 ] } ]
ensemble_scheduling { step [
  { model_name: "first" model_version: -1 input_map { key: "A" value: "IN" } output_map { key: "B" value: "middle" } },
  { model_name: "second" model_version: -1 input_map { key: "C" value: "middle" } output_map { key: "D" value: "OUT" } }
] }
"""
STEP = """
name: "{name}" backend: "python" max_batch_size: 0
input [ {{ name: "{source}" data_type: {taken} dims: [ -1 ] }} ]
output [ {{ name: "{target}" data_type: {given} dims: [ -1 ] }} ]
"""


def ensemble(root: Path, text: str = TWO_STEPS) -> list[str]:
    steps = [("first", "A", "TYPE_STRING", "B", "TYPE_INT32"), ("second", "C", "TYPE_INT32", "D", "TYPE_INT32")]
    for name, source, taken, target, given in steps:
        (root / name / "1").mkdir(parents=True)
        (root / name / "1" / "model.py").write_text("class TritonPythonModel:\n    def execute(self, r): ...\n")
        filled = STEP.format(name=name, source=source, taken=taken, target=target, given=given)
        (root / name / "config.pbtxt").write_text(filled)
    (root / "both" / "1").mkdir(parents=True)
    (root / "both" / "config.pbtxt").write_text(text)
    return [str(problem) for problem in check_repository(root, engine=None)]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("", "", None),
        (
            '"second"',
            '"third"',
            "a step uses the model 'third', which is not in this repository; the others are: first",
        ),
        ('key: "C"', 'key: "WRONG"', "maps middle to the input WRONG, which the model second does not have; it has: C"),
        ('"OUT" data_type: TYPE_INT32', '"OUT" data_type: TYPE_STRING', "the tensor OUT is TYPE_INT32 as output D of"),
        ('"IN" data_type: TYPE_STRING', '"IN" data_type: TYPE_INT32', "the tensor IN is TYPE_INT32 as the ensemble's"),
        ('key: "C" value: "middle"', 'key: "C" value: "lost"', "the step second reads lost, which is no input of the"),
        ('key: "D" value: "OUT"', 'key: "D" value: "gone"', "no step produces the output OUT; map one in output_map"),
        ('input_map { key: "A" value: "IN" }', "", "the step first gets no input A, which is not optional"),
    ],
)
def test_ensembles(tmp_path: Path, old: str, new: str, sentence: str | None) -> None:
    problems = ensemble(tmp_path, TWO_STEPS.replace(old, new, 1) if old else TWO_STEPS)
    assert (not problems) if sentence is None else any(sentence in problem for problem in problems), problems


def test_template_and_model_agree_on_every_name_and_type(package: Path) -> None:
    model, problems = triton_config.read_model(package / "model_repository" / MODEL)
    assert model is not None
    assert not problems
    for kind, declared in (("input", INPUTS), ("output", OUTPUTS)):
        found = {tensor.name: triton_config.type_name(tensor) for tensor in getattr(model.config, kind)}
        assert found == declared
    assert all(tensor.optional for tensor in model.config.input)


@pytest.mark.parametrize("streaming", [True, False])
def test_values_come_back_from_the_parsed_configuration(tmp_path: Path, streaming: bool) -> None:
    asked = spec(streaming=streaming, engine_dir='a "quoted" \\ {dir}\n', trust_remote_code=True, model_name="m-1.x")
    render_repository(asked, tmp_path)
    model, problems = triton_config.read_model(tmp_path / "m-1.x")
    assert model is not None
    assert not problems
    assert model.parameter("engine_dir") == asked.engine_dir
    assert model.config.model_transaction_policy.decoupled is streaming
    assert [model.parameter(name) for name in ("max_seq_len", "trust_remote_code")] == ["512", "true"]


def test_rendering_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        render_repository(spec(), tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 14
    assert all((tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes() for path in files)


@pytest.mark.parametrize("change", [{"layout": "gpt"}, {"runtime": "trtllm-engine"}])
def test_what_has_no_repository_is_refused(tmp_path: Path, change: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match=next(iter(change.values()))):
        render_repository(spec(**change), tmp_path)
