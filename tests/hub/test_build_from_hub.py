"""A recipe whose model is a hub id: planned from headers, resolved to a commit, downloaded once, built."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub, running

from trtbuild.errors import RecipeError
from trtbuild.pipeline import build, prepare
from trtbuild.report import Silent


@pytest.fixture
def served_llama(hub: FakeHub, tiny_llama: Path) -> FakeHub:
    """The loopback hub with a real tiny checkpoint, and weights beside it that nobody asked for."""
    hub.files = {path.name: path.read_bytes() for path in tiny_llama.iterdir()} | {"pytorch_model.bin": b"x" * 1000}
    return hub


def write_recipe(tmp_path: Path, revision: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"schema_version: 1\nmodel: {{path: org/model, revision: {revision}}}\n"
        f"runtime: {{kind: embedded}}\nstore: {tmp_path / 'store'}\n",
        encoding="utf-8",
    )
    return path


def test_plan_reads_headers_and_build_downloads_once(served_llama: FakeHub, tmp_path: Path) -> None:
    prepared = prepare(write_recipe(tmp_path, "v1.0"))
    assert (prepared.plan.source.repo_id, prepared.plan.source.commit) == ("org/model", COMMIT)
    assert prepared.plan.facts.architecture == "LlamaForCausalLM"
    weights = len(served_llama.files["model.safetensors"])
    first = build(prepared, tmp_path / "p", Silent(), last="compress").path
    assert (first / "model.safetensors").stat().st_size == weights
    assert not served_llama.asked("pytorch_model.bin")
    sent = served_llama.sent
    again = build(prepared, tmp_path / "p", Silent(), last="compress").path
    assert again == first
    assert served_llama.sent - sent < weights


def test_unknown_revision_is_a_recipe_error(served_llama: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="v9"):
        prepare(write_recipe(tmp_path, "v9"))


def test_a_directory_has_no_revision(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "main")
    with pytest.raises(RecipeError, match=r"model.revision: .* is a directory, it has no revisions; remove it"):
        prepare(recipe, [f"model.path={tiny_llama}"])


def test_the_fake_hub_is_on_loopback() -> None:
    with running(FakeHub({})) as server:
        assert server.url.startswith("http://127.0.0.1:")
