"""Every command, recipe and program in README is executed or parsed, and the examples plan."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import click
import pytest

from trtbuild.cli import main
from trtbuild.pipeline import prepare
from trtbuild.recipe_fields import RuntimeKind
from trtbuild.recipe_file import load_recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted((ROOT / "docs").glob("runtime-*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    found: list[str] = []
    fence: str | None = None
    lines: list[str] = []
    for line in README.splitlines():
        if not line.startswith("```"):
            lines.append(line)
        elif fence is None:
            fence, lines = line.removeprefix("```"), []
        else:
            if fence == language:
                found.append("\n".join(lines) + "\n")
            fence = None
    return found


def commands(program: str) -> list[list[str]]:
    """Every command line of one program in the plain blocks, continuation lines joined."""
    lines = "\n".join(blocks("")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(f"{program} ")]


def test_readme_has_what_this_test_reads() -> None:
    assert len(commands("trtbuild")) >= 9
    assert len(commands("make")) == 2
    assert len(commands("curl")) == 2
    assert len(blocks("yaml")) == 1
    assert len(blocks("python")) == 1


@pytest.mark.parametrize("command", commands("trtbuild"), ids=" ".join)
def test_trtbuild_commands_parse(command: list[str]) -> None:
    verb, *arguments = command[1:]
    parsed = main.commands[verb].make_context(verb, list(arguments))
    assert isinstance(parsed, click.Context)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for _, target in commands("make"):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_recipe_in_readme_is_the_demos(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(blocks("yaml")[0], encoding="utf-8")
    demo = load_recipe(ROOT / "examples" / "smollm2-fp8.yaml").recipe
    assert load_recipe(path).recipe == demo


def test_bodies_of_the_curl_commands_are_json_with_inputs_of_their_models() -> None:
    bodies = [json.loads(command[command.index("-d") + 1]) for command in commands("curl")]
    assert json.loads(bodies[0]["messages"])[0]["role"] == "user"
    for body, template in zip(bodies, ("llm/config", "ensemble/tensorrt_llm_bls"), strict=True):
        text = (ROOT / "templates" / f"{template}.pbtxt.j2").read_text(encoding="utf-8")
        assert all(f'{{ name: "{name}"' in text for name in body)


def test_python_in_readme_runs(package: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", blocks("python")[0]], cwd=package.parent, check=True, capture_output=True, text=True
    )
    assert len(done.stdout.splitlines()) >= 1


@pytest.mark.smollm2
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_plan(path: Path, smollm2: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trtbuild", "check", str(path)], check=True, capture_output=True, text=True
    )
    assert done.stdout == f"{path}: no problems\n"


def test_there_are_four_examples() -> None:
    assert [path.stem for path in EXAMPLES] == ["smollm2-2to4-fp8", "smollm2-bf16", "smollm2-fp8", "smollm2-int4-awq"]


def test_links_lead_somewhere() -> None:
    for document in (*(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md")), *PAGES):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            assert target.startswith("http") or (document.parent / target).exists(), f"{document}: {target}"


def test_there_is_a_page_for_each_runtime() -> None:
    assert {path.stem for path in PAGES} == {f"runtime-{kind}" for kind in get_args(RuntimeKind)}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_recipe_of_each_page_plans(page: Path, tiny_llama: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    small = (f"model.path={tiny_llama}", "runtime.max_seq_len=256")
    plan = prepare(recipe, small).plan
    assert plan.value("runtime.kind") == page.stem.removeprefix("runtime-")
    for command in re.findall(r"^trtbuild (.*)", text, flags=re.MULTILINE):
        verb, *arguments = shlex.split(command, comments=True)
        assert isinstance(main.commands[verb].make_context(verb, arguments), click.Context)


def test_architecture_names_modules_that_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[a-z_]+/)+[a-z_0-9]+\.(?:py|toml|j2))`", text))
    assert len(named) >= 10
    roots = (ROOT / "builder" / "trtbuild", ROOT)
    assert [name for name in sorted(named) if not any((root / name).exists() for root in roots)] == []
