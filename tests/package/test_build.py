"""Builds through the command line: what is reused, what is redone, and what the package holds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Cli = Callable[..., subprocess.CompletedProcess[str]]
STEPS = ("compress", "engine", "repository", "deploy", "evaluate", "package")


def statuses(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Step -> built or reused, from what a build wrote to standard error."""
    found = {}
    for line in done.stderr.splitlines():
        name, _, rest = line.partition(": ")
        if name in STEPS and rest.split(" ")[0] in {"built", "reused"}:
            found[name] = rest.split(" ")[0]
    return found


def test_package_layout(package: Path) -> None:
    top = sorted(path.name for path in package.iterdir())
    assert top == ["deploy", "engine", "evidence", "manifest.json", "model_repository", "plan.lock.json", "recipe.yaml"]
    manifest = json.loads((package / "manifest.json").read_text())
    listed = {entry["path"] for entry in manifest["files"]}
    there = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    assert there - listed == {"manifest.json"}
    assert not any(path.is_symlink() for path in package.rglob("*"))
    quality = json.loads((package / "evidence" / "quality.json").read_text())
    assert quality["tokens"] >= 4096
    assert quality["gates"][0]["passed"] is True
    assert quality["usage"]["peak_memory_bytes"] > 0
    engine = json.loads((package / "engine" / "engine.json").read_text())
    assert engine["max_seq_len"] == 256


def test_unchanged_recipe_reuses_everything_without_torch(package: Path, recipe: Path, cli: Cli) -> None:
    before = (package / "manifest.json").stat().st_mtime_ns
    done = cli("build", recipe, "-o", package, PYTHONPROFILEIMPORTTIME="1")
    assert statuses(done) == dict.fromkeys(STEPS, "reused")
    imported = [line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert len(imported) > 100
    assert not [name for name in imported if name.split(".")[0] in {"torch", "transformers", "modelopt"}]
    assert (package / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("override", "redone"),
    [
        ("serving.model_name=other", {"repository", "deploy", "package"}),
        ("runtime.max_batch_size=2", {"engine", "deploy", "package"}),
        ("quality.max_perplexity_ratio=3", {"package"}),
    ],
)
def test_one_field_redoes_exactly_its_steps(
    package: Path, recipe: Path, cli: Cli, tmp_path: Path, override: str, redone: set[str]
) -> None:
    out = Path(shutil.copytree(package, tmp_path / "p"))
    done = cli("build", recipe, "-o", out, "--set", override)
    assert {step for step, status in statuses(done).items() if status == "built"} == redone
    assert override.split("=", maxsplit=1)[0] in (out / "recipe.yaml").read_text().splitlines()[0]
    cli("verify", out)


def test_two_builds_share_the_package_digest(package: Path, recipe: Path, cli: Cli, tmp_path: Path) -> None:
    cli("build", recipe, "-o", tmp_path / "again", "--set", f"store={tmp_path / 'store'}")
    first, second = (
        json.loads((path / "manifest.json").read_text())["digest"] for path in (package, tmp_path / "again")
    )
    assert first == second


def test_changed_source_bytes_are_never_reused(tiny_llama: Path, recipe: Path, cli: Cli, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    arguments = ("--set", f"model.path={source}", "--until", "compress")
    first = cli("build", recipe, *arguments).stdout
    data = bytearray((source / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (source / "model.safetensors").write_bytes(data)
    second = cli("build", recipe, *arguments).stdout
    assert first != second
    data[-1] ^= 1
    (source / "model.safetensors").write_bytes(data)
    assert cli("build", recipe, *arguments).stdout == first


def test_until_stops_and_prints_the_artifact(recipe: Path, cli: Cli, tmp_path: Path) -> None:
    done = cli("build", recipe, "-o", tmp_path / "no", "--until", "engine")
    assert (Path(done.stdout.strip()) / "engine.json").is_file()
    assert not (tmp_path / "no").exists()
    assert "is no step; steps are fetch, compress" in cli("build", recipe, "--until", "all", check=2).stderr


def test_failed_gate_is_exit_7_and_keeps_the_evidence(recipe: Path, cli: Cli, tmp_path: Path, package: Path) -> None:
    done = cli("build", recipe, "-o", tmp_path / "p", "--set", "quality.max_perplexity_ratio=0.5", check=7)
    assert "quality.max_perplexity_ratio: 1" in done.stderr
    assert "exceeds 0.5 by 0.5" in done.stderr
    evidence = Path(done.stderr.split("the evidence is ")[1].split(";")[0])
    assert json.loads((evidence / "quality.json").read_text())["tokens"] >= 4096
    assert not (tmp_path / "p").exists()


def test_foreign_directory_is_never_replaced(recipe: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    done = cli("build", recipe, "-o", tmp_path / "mine", check=2)
    assert "exists and is no trtbuild package; name a new directory" in done.stderr
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_files_that_a_user_put_into_a_package_are_never_lost(
    package: Path, recipe: Path, cli: Cli, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(package, tmp_path / "p"))
    (out / "notes.txt").write_text("mine")
    done = cli("build", recipe, "-o", out, "--set", "serving.default_max_tokens=7", check=2)
    assert "holds notes.txt, which is no part of the package there; move it away" in done.stderr
    assert (out / "notes.txt").read_text() == "mine"


def test_a_link_to_a_package_stays_a_link(package: Path, recipe: Path, cli: Cli, tmp_path: Path) -> None:
    real = Path(shutil.copytree(package, tmp_path / "real"))
    link = tmp_path / "current"
    link.symlink_to(real)
    for tokens in (7, 8):
        cli("build", recipe, "-o", link, "--set", f"serving.default_max_tokens={tokens}")
        assert link.is_symlink()
        cli("verify", real)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "real"]


def test_until_evaluate_gates_too_and_until_fetch_prints_the_source(
    recipe: Path, cli: Cli, package: Path, tiny_llama: Path
) -> None:
    assert cli("build", recipe, "--until", "fetch").stdout.strip() == str(tiny_llama)
    assert "quality.json" in {
        path.name for path in Path(cli("build", recipe, "--until", "evaluate").stdout.strip()).iterdir()
    }
    cli("build", recipe, "--until", "evaluate", "--set", "quality.max_perplexity_ratio=0.5", check=7)


def test_linked_files_are_readable_for_all_and_writable_for_nobody(package: Path) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in package.rglob("*") if path.is_file()}
    assert modes["launch.sh"] == 0o755
    assert modes["config.json"] == 0o644
    assert all(mode & 0o044 for name, mode in modes.items() if not name.startswith(("manifest", "plan.lock", "recipe")))


def test_two_builds_at_once_share_the_work(recipe: Path, tmp_path: Path) -> None:
    store = f"store={tmp_path / 'store'}"
    command = [sys.executable, "-m", "trtbuild", "build", str(recipe), "--set", store]
    running = [
        subprocess.Popen([*command, "-o", str(tmp_path / name)], stderr=subprocess.PIPE, text=True)
        for name in ("a", "b")
    ]
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    built = [
        status
        for text in errors
        for line in text.splitlines()
        if (status := line.partition(": ")[2]).startswith("built")
    ]
    assert len(built) == 5 + 2  # each step once, and two packages
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


def test_verify_holds_the_files_against_the_lock(package: Path, cli: Cli, tmp_path: Path) -> None:
    """A change that the manifest was made to agree with is still not what the lock names."""
    from trtbuild.manifest import DigestCache, canonical_json, entries_json, list_tree
    from trtbuild.package import _package_digest

    copy = Path(shutil.copytree(package, tmp_path / "p"))
    (copy / "engine" / "generation_config.json").write_text("{}")
    entries = list_tree(copy, DigestCache(None), skip=("manifest.json",))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest |= {"files": entries_json(entries), "digest": _package_digest(entries)}
    (copy / "manifest.json").write_text(canonical_json(manifest))
    assert "engine/ is not the engine artifact that plan.lock.json names" in cli("verify", copy, check=5).stdout


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("manifest.json", '{"kind": "package"}', "is no trtbuild package"),
        ("manifest.json", "[]", "is no trtbuild package"),
        ("engine/engine.json", "[]", "engine"),
        ("plan.lock.json", "[]", "lock"),
    ],
)
def test_verify_of_senseless_files_is_exit_5(
    package: Path, cli: Cli, tmp_path: Path, name: str, content: str, expected: str
) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "p"))
    (copy / name).write_text(content)
    done = cli("verify", copy, check=5)
    assert "Traceback" not in done.stderr
    assert expected in done.stdout + done.stderr


@pytest.mark.parametrize("damage", ["flip", "remove", "add", "lock"])
def test_verify_finds_damage(package: Path, cli: Cli, tmp_path: Path, damage: str) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "p"))
    weights = copy / "engine" / "model.safetensors"
    if damage == "flip":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.chmod(0o644)
        weights.write_bytes(data)
        expected = "engine/model.safetensors has other bytes than were recorded"
    elif damage == "remove":
        (copy / "engine" / "engine.json").unlink()
        expected = "engine/engine.json is missing"
    elif damage == "add":
        (copy / "deploy" / "more").write_text("x")
        expected = "deploy/more was not part of it"
    else:
        (copy / "plan.lock.json").write_text("{}")
        expected = "plan.lock.json has 2 bytes instead of"
    done = cli("verify", copy, check=5)
    assert expected in done.stdout + done.stderr


def test_verify_says_what_it_checked(package: Path, cli: Cli) -> None:
    done = cli("verify", package)
    for name in ("bytes", "lock", "engine", "model repository"):
        assert f"{name}" in done.stdout
    assert "is no trtbuild package" in cli("verify", package / "engine", check=5).stderr
