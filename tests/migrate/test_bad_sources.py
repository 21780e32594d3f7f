"""Sources that cannot be migrated end in a sentence and the exit code of its kind; the command line prints the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from migrate.old_repositories import write_repository
from migrate.test_old_deployments import write_engine
from trtbuild.build_flags import flag_tables
from trtbuild.cli import main
from trtbuild.compat import facts
from trtbuild.migrate.fates import Fate, table
from trtbuild.migrate.values import TRANSFORMS
from trtbuild.recipe import Recipe
from trtbuild.recipe_file import load_recipe
from trtbuild.setting_values import recipe_value


def text_file(text: str | bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / "source"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


def two_engines(folder: Path) -> Path:
    repository = write_repository(folder / "repository", "0.17", changes={"tensorrt_llm_draft_model_name": ""})
    other = repository / "tensorrt_llm_2"
    (other / "1").mkdir(parents=True)
    text = (repository / "tensorrt_llm" / "config.pbtxt").read_text()
    (other / "config.pbtxt").write_text(text.replace('name: "tensorrt_llm"', 'name: "tensorrt_llm_2"'))
    return repository


def broken_pbtxt(folder: Path) -> Path:
    repository = write_repository(folder / "repository", "0.17")
    (repository / "tensorrt_llm" / "config.pbtxt").write_text('name: "tensorrt_llm"\nmax_batch_size: many\n')
    return repository


def binary_pbtxt(folder: Path) -> Path:
    repository = write_repository(folder / "repository", "0.17")
    (repository / "preprocessing" / "config.pbtxt").write_bytes(b"\xff\xfe\x00")
    return repository


def plain_checkpoint(folder: Path) -> Path:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model" / "model.safetensors").write_bytes(b"")
    return folder / "model"


def no_engine_model(folder: Path) -> Path:
    (folder / "repository" / "resnet" / "1").mkdir(parents=True)
    (folder / "repository" / "resnet" / "config.pbtxt").write_text('backend: "onnxruntime"\n')
    return folder / "repository"


def empty_directory(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def no_version(folder: Path) -> Path:
    return write_engine(folder / "engine", {"pretrained_config": {}, "build_config": {}})


def engine_of_text(folder: Path) -> Path:
    engine = write_engine(folder / "engine")
    (engine / "config.json").write_text("{")
    return engine


def bad_model_yaml(folder: Path) -> Path:
    (folder / "repository" / "m" / "1").mkdir(parents=True)
    (folder / "repository" / "m" / "config.pbtxt").write_text('backend: "python"\n')
    (folder / "repository" / "m" / "1" / "model.yaml").write_text("model: [\n")
    return folder / "repository"


BAD: list[tuple[Callable[[Path], Path], int, str]] = [
    (lambda folder: folder / "absent", 2, "does not exist; name a Triton model repository"),
    (empty_directory, 2, "is none of what can be migrated; name a Triton model repository, an engine directory"),
    (plain_checkpoint, 2, "is an original checkpoint, no deployment; use trtbuild init"),
    (no_engine_model, 2, "has no model of TensorRT-LLM or trtbuild"),
    (two_engines, 2, "has 2 models that execute: tensorrt_llm, tensorrt_llm_2; name the directory of one of them"),
    (broken_pbtxt, 5, "tensorrt_llm/config.pbtxt: line 2:17"),
    (binary_pbtxt, 5, "preprocessing/config.pbtxt: cannot be read"),
    (bad_model_yaml, 5, "model.yaml: cannot be read"),
    (no_version, 5, "config.json: version is missing, so it is no engine's configuration"),
    (engine_of_text, 5, "config.json: cannot be read"),
    (text_file(b"\x7fELF\x02\x01\x01\x00\x00"), 2, "source is a binary file"),
    (text_file(b"\xff\xfe"), 2, "source is not UTF-8 text (byte 0)"),
    (text_file(" \n"), 2, "source is empty"),
    (text_file("just some words\n"), 2, "is none of what can be migrated (it holds no mapping of LLM arguments)"),
    (text_file("a: [1\n"), 2, "is none of what can be migrated"),
    (text_file("7: 8\n"), 2, "holds 7, which are no LLM arguments"),
    (text_file("trtllm-build --output_dir 'x\n"), 2, "the command line cannot be read (No closing quotation); close"),
    (text_file("trtllm-build stray --x 1\n"), 2, "'stray' stands before the first flag"),
    (text_file("trtllm-build --workers 1 --workers 2\n"), 2, "--workers is given twice"),
    (text_file("trtllm-build --workers 1\ntrtllm-build --workers 2\n"), 2, "trtllm-build is called 2 times"),
    (text_file("engine_dir:/a,engine_dir:/b\n"), 2, "engine_dir is given twice, with different values"),
]


@pytest.mark.parametrize(("make", "code", "sentence"), BAD)
def test_bad_sources(make: Callable[[Path], Path], code: int, sentence: str, tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    done = CliRunner().invoke(main, ["migrate", str(make(tmp_path)), "-o", str(out)])
    assert (done.exit_code, sentence in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--version", "9.9.9"], 2, "--version: 9.9.9 is in no known release line"),
        (["--version", "0.17.0"], 3, "TensorRT-LLM 0.17.0 has TensorRT engines only; use 1.2.1"),
        (["--to", "trtllm-engine", "--version", "1.4.0rc1"], 3, "1.4.0rc1 has the LLM API only; use 1.2.1"),
        (["--to", "embedded", "--version", "1.2.1"], 2, "--version: 1.2.1: the embedded runtime has trtbuild's own"),
        (["--to", "vllm"], 2, "is not one of"),
        (["--model", "/no/such/checkpoint"], 2, "--model: /no/such/checkpoint does not exist"),
        (["-o", "/no/such/folder/recipe.yaml"], 2, "-o: /no/such/folder is no directory"),
    ],
)
def test_bad_options(arguments: list[str], code: int, sentence: str, tmp_path: Path) -> None:
    source = text_file("engine_dir:/a,max_beam_width:1\n")(tmp_path)
    default = [] if "-o" in arguments else ["-o", str(tmp_path / "recipe.yaml")]
    done = CliRunner().invoke(main, ["migrate", str(source), *arguments, *default])
    assert (done.exit_code, sentence in done.stderr) == (code, True), done.stderr


def test_a_draft_model_is_no_second_engine(tmp_path: Path) -> None:
    repository = two_engines(tmp_path)
    bls = repository / "tensorrt_llm_bls" / "config.pbtxt"
    named = 'key: "tensorrt_llm_draft_model_name" value: { string_value: "'
    bls.write_text(bls.read_text().replace(named, f"{named}tensorrt_llm_2"))
    done = CliRunner().invoke(main, ["migrate", str(repository), "-o", str(tmp_path / "r.yaml"), "--json"])
    assert done.exit_code == 0, done.stderr
    rows = {row["old"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["tensorrt_llm_draft_model_name"]["field"] == "speculative.method"


def test_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "new recipe.yaml"
    command = ["migrate", "-", "-o", str(out)]
    done = CliRunner().invoke(main, command, input="trtllm-build --max_batch_size 32 --max_beam_width 4 --frob\n")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["kept", "dropped", "not"]
    assert "beam search" in lines[2]
    assert "1 kept, 1 dropped, 1 not recognized; 2 with a loss, 0 unset" in done.stderr
    assert f"next: trtbuild build '{out}' -o 'new recipe' --set model.path=..." in done.stderr
    assert load_recipe(out).recipe.runtime.max_batch_size == 32
    text = out.read_text()
    assert "max_batch_size: 32  # max_batch_size in standard input" in text
    assert "#   max_beam_width = 4 (standard input): beam search" in text
    again = CliRunner().invoke(main, command, input="trtllm-build --max_batch_size 32\n")
    assert (again.exit_code, out.read_text()) == (2, text)
    assert "exists; name another file, or remove it" in again.stderr


def test_what_remains_to_be_mended_is_said(tmp_path: Path, tiny_llama: Path) -> None:
    out = tmp_path / "recipe.yaml"
    flags = "trtllm-build --tp_size 3 --max_batch_size 4\n"
    done = CliRunner().invoke(main, ["migrate", "-", "--model", str(tiny_llama), "-o", str(out)], input=flags)
    assert done.exit_code == 0, done.stderr
    assert f"to mend in {out}: runtime.tensor_parallel_size: 3" in done.stderr


def test_the_table_of_names_is_sound() -> None:
    silent = Recipe.model_validate({"schema_version": 1, "model": {"path": "."}, "runtime": {"kind": "embedded"}})
    for section in ("triton", "own", "build", "checkpoint", "llm"):
        for name, row in table()[section]["names"].items():
            fate = Fate(**row)
            assert fate.field or fate.extra or fate.moot or fate.drop, name
            assert not (fate.moot and (fate.field or fate.extra or fate.drop)), name
            assert fate.via in {"", "tokenizer", *TRANSFORMS}, name
            if fate.field:
                recipe_value(silent, fate.field)
    # Where the engine flow has a name for a recipe's field, the migration takes it back to that field.
    names = facts("engine_names")
    for section, part in (("build", "build"), ("triton", "triton"), ("checkpoint", "checkpoint")):
        for path, old in names[part].items():
            if path != "source":
                assert table()[section]["names"][old.lstrip("-")]["field"] == path
    flags = {flag.name for line in flag_tables() for flag in line.flags.values() if not flag.plugin}
    assert flags <= set(table()["build"]["names"])
