"""Every verb as a user types it: what it prints where, and how it ends."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from trtbuild.cli import main
from trtbuild.pipeline import prepare

Cli = Callable[..., subprocess.CompletedProcess[str]]
VERBS = ("init", "check", "plan", "build", "inspect", "serve", "ask", "verify", "doctor")


def test_help_lists_every_verb_and_exit_code(cli: Cli) -> None:
    text = cli("--help").stdout
    for verb in VERBS:
        assert f"\n  {verb} " in text
        assert cli(verb, "--help").stdout.startswith("Usage: ")
    assert "7 a quality gate failed" in text.replace("\n", " ").replace("  ", " ")


@pytest.mark.parametrize("weight_format", ["none", "fp8", "int4_awq"])
def test_init_writes_a_recipe_that_plans_as_it_is(
    cli: Cli, tiny_llama: Path, tmp_path: Path, weight_format: str
) -> None:
    out = tmp_path / "my.yaml"
    assert cli("init", tiny_llama, "-o", out, "--format", weight_format).stdout.strip() == str(out)
    assert cli("check", out).stdout == f"{out}: no problems\n"
    assert "exists; name another file" in cli("init", tiny_llama, "-o", out, check=2).stderr
    assert "does not exist" in cli("init", tmp_path / "no", "-o", tmp_path / "b.yaml", check=2).stderr


@pytest.mark.parametrize(
    ("options", "values"),
    [
        (("--runtime", "trtllm", "--gpu", "H100"), ("trtllm", "1.2.1", "H100")),
        (("--runtime", "trtllm", "--version", "26.03", "--format", "none"), ("trtllm", "1.2.0", None)),
        (
            ("--runtime", "trtllm-engine", "--gpu", "L40S", "--format", "int4_awq", "--version", "1.2.1"),
            ("trtllm-engine", "1.2.1", "L40S"),
        ),
    ],
)
def test_init_writes_recipes_for_tensorrt_llm(
    tiny_llama: Path, tmp_path: Path, options: tuple[str, ...], values: tuple[str | None, ...]
) -> None:
    out = tmp_path / "my.yaml"
    done = CliRunner().invoke(main, ["init", str(tiny_llama), "-o", str(out), *options])
    assert (done.exit_code, done.stdout) == (0, f"{out}\n"), done.output
    checked = CliRunner().invoke(main, ["check", str(out)])
    assert (checked.exit_code, checked.stdout) == (0, f"{out}: no problems\n"), checked.output
    plan = prepare(out).plan
    assert tuple(plan.value(path) for path in ("runtime.kind", "runtime.version", "target.gpu")) == values
    if plan.value("compress.format") == "int4_awq":
        assert plan.value("compress.group_size") in (64, 128)


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (("--runtime", "trtllm-engine"), 2, "--gpu: is missing, and an engine is built for one GPU architecture; name"),
        (("--version", "1.2.1"), 2, "--version: 1.2.1: the embedded runtime has trtbuild's own; remove it"),
        (("--runtime", "trtllm", "--version", "9.9"), 2, "--version: 9.9 is in no known release line"),
        (
            ("--runtime", "trtllm-engine", "--gpu", "H100", "--version", "1.3.0rc22"),
            3,
            "--version: TensorRT-LLM 1.3.0rc22 has the LLM API only; use 1.2.1, or another --runtime",
        ),
        (("--runtime", "trtllm", "--gpu", "A100"), 3, "compress.format: fp8 does not run on A100 (SM80)"),
        (("--runtime", "trtllm", "--gpu", "H1000"), 3, "'H1000' is no known GPU; did you mean H100"),
        (("--runtime", "vllm"), 2, "'vllm' is not one of 'embedded', 'trtllm', 'trtllm-engine'"),
    ],
)
def test_init_refuses_what_would_not_pass_check(
    tiny_llama: Path, tmp_path: Path, options: tuple[str, ...], code: int, sentence: str
) -> None:
    done = CliRunner().invoke(main, ["init", str(tiny_llama), "-o", str(tmp_path / "my.yaml"), *options])
    assert done.exit_code == code, done.output
    assert sentence in done.stderr
    assert not (tmp_path / "my.yaml").exists()


def test_the_recipe_that_init_writes_builds_as_it_is(cli: Cli, tiny_llama: Path, tmp_path: Path, store: Path) -> None:
    cli("init", tiny_llama, "-o", tmp_path / "my.yaml")
    done = cli("build", tmp_path / "my.yaml", "-o", tmp_path / "package", "--set", f"store={store}")
    assert "quality.max_perplexity_ratio" in done.stderr
    cli("verify", tmp_path / "package")


def test_check_reports_all_problems_and_exit_codes(cli: Cli, recipe: Path) -> None:
    done = cli("check", recipe, "--set", "runtime.max_batch_size=0", "--set", "compress.format=fp7", check=2)
    assert done.stdout == ""
    assert "compress.format: 'fp7' is not allowed" in done.stderr
    assert "runtime.max_batch_size: 0 must be greater" in done.stderr
    assert (
        "speculative.method: lookahead" in cli("check", recipe, "--set", "speculative.method=lookahead", check=3).stderr
    )
    assert "Usage" in cli("check", check=2).stderr


def test_mistakes_of_every_kind_come_in_one_report(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    changes = (
        "compress.format=fp8",
        f"compress.calibration.data={tmp_path / 'none.txt'}",
        f"quality.data={tmp_path / 'empty.txt'}",
        f"model.tokenizer={tmp_path / 'empty.txt'}",
        "deploy.image=A B",
        "runtime.max_num_tokens=1",
        "speculative.method=lookahead",
    )
    done = cli("check", recipe, *(part for change in changes for part in ("--set", change)), check=2)
    assert [line.split(": ")[0] for line in done.stderr.removeprefix("error: ").splitlines()] == [
        "runtime.max_num_tokens",
        "compress.calibration.data",
        "model.tokenizer",
        "quality.data",
        "deploy.image",
        "speculative.method",
    ]
    assert "none.txt does not exist; name a file that ends in .txt, .md, .jsonl, .parquet" in done.stderr
    assert "quality.data: " + str(tmp_path / "empty.txt") + " is empty" in done.stderr
    assert "empty.txt is a file; name a directory with tokenizer files" in done.stderr


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("~nosuchuser/x", "model.path: '~nosuchuser/x' is no path (Could not determine home directory.)"),
        ('"a\\0b"', "model.path: 'a\\x00b' is no path (embedded null byte)"),
        ("a" * 300, "is no path (File name too long); name an existing place"),
    ],
)
def test_paths_that_no_file_can_have(cli: Cli, recipe: Path, path: str, message: str) -> None:
    assert message in cli("check", recipe, "--set", f"model.path={path}", check=2).stderr


def test_outputs_that_cannot_be_made(cli: Cli, recipe: Path, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = cli("build", recipe, "-o", tmp_path / "file" / "x", check=2)
    assert f"-o: {tmp_path / 'file'} is a file" in done.stderr
    assert "fetch" not in done.stderr
    done = cli("init", tiny_llama, "-o", tmp_path / "no" / "dir" / "r.yaml", check=2)
    assert f"-o: {tmp_path / 'no' / 'dir'} is no directory; make it first" in done.stderr
    done = cli("init", tiny_llama, "-o", tmp_path / ("a" * 300), check=6)
    assert "File name too long; check this path" in done.stderr
    assert "Traceback" not in done.stderr


def test_ports_out_of_range(cli: Cli, tmp_path: Path) -> None:
    assert "65535" in cli("serve", tmp_path, "--http-port", "99999", check=2).stderr


def test_schema_is_json(cli: Cli) -> None:
    assert json.loads(cli("check", "--schema").stdout)["title"] == "trtbuild recipe"


def test_plan_for_people_and_programs(cli: Cli, recipe: Path) -> None:
    text = cli("plan", recipe).stdout
    assert "runtime.max_batch_size" in text
    assert "LlamaForCausalLM" in text
    value = json.loads(cli("plan", recipe, "--json", "--set", "runtime.max_batch_size=3").stdout)
    assert {"path": "runtime.max_batch_size", "value": 3, "origin": "--set"} in value["values"]
    assert cli("plan", recipe, "--json").stdout == cli("plan", recipe, "--json").stdout


def test_inspect_checkpoint_engine_and_package(cli: Cli, tiny_llama: Path, package: Path, tmp_path: Path) -> None:
    described = json.loads(cli("inspect", tiny_llama, "--json").stdout)
    assert described["kind"] == "checkpoint"
    assert list(described["checkpoint"]["largest_layer"]) == ["parameters"], "the rest is for compression's memory"
    assert json.loads(cli("inspect", package / "engine", "--json").stdout)["engine"]["max_batch_size"] == 4
    found = json.loads(cli("inspect", package, "--json").stdout)
    assert found["kind"] == "package"
    assert found["quality"]["tokens"] >= 4096
    assert "checkpoint.architecture" in cli("inspect", package).stdout
    assert "does not exist" in cli("inspect", tmp_path / "no", check=2).stderr


def test_doctor_reports_this_host(cli: Cli) -> None:
    done = cli("doctor", "--json", check=None)
    findings = {finding["name"]: finding["status"] for finding in json.loads(done.stdout)}
    assert findings["torch"] == "ok"
    assert done.returncode == (6 if "missing" in findings.values() else 0)


def test_the_command_for_pickles_gives_a_checkpoint_that_builds(tmp_path: Path, tiny_llama: Path, cli: Cli) -> None:
    import torch
    from safetensors.torch import load_file

    source = Path(shutil.copytree(tiny_llama, tmp_path / "pickled"))
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    refused = cli("inspect", source, check=3).stderr
    command = refused[refused.index('python -c "') :].strip()
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, cwd=tmp_path, check=True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("schema_version: 1\nmodel: {path: SAFE_DIR}\nruntime: {kind: embedded}\n")
    cli("check", recipe)
    (source / "pytorch_model.bin").rename(source / "consolidated.00.pth")
    assert "take the model's Hugging Face version" in cli("inspect", source, check=3).stderr


def test_what_is_not_there_is_a_usage_error(tmp_path: Path, cli: Cli) -> None:
    for verb in ("inspect", "verify", "serve"):
        done = cli(verb, tmp_path / "none", check=2)
        assert f"{tmp_path / 'none'} does not exist" in done.stderr
        assert "hub id" not in done.stderr


def test_calibration_files_of_unknown_kinds_are_refused_before_any_work(recipe: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "a.csv").write_text("text\nhello\n")
    changes = ("compress.format=fp8", f"compress.calibration.data={tmp_path / 'a.csv'}")
    done = cli("check", recipe, "--set", changes[0], "--set", changes[1], check=2)
    assert "a.csv ends in .csv; name a file that ends in .txt, .md, .jsonl, .parquet" in done.stderr
