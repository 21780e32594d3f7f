"""What enters the key of a step besides its inputs and parameters."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from trtbuild import toolchain
from trtbuild.compress import textdata
from trtbuild.errors import HostError
from trtbuild.toolchain import require, tool_versions


@pytest.mark.parametrize(
    ("name", "steps"), [("calibration.jsonl", {"compress", "evaluate"}), ("heldout.jsonl", {"evaluate"})]
)
def test_another_shipped_text_is_another_step(
    name: str, steps: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "_text"
    shutil.copytree(textdata.CALIBRATION_TEXT.parent, texts)
    before = tool_versions()
    monkeypatch.setattr(toolchain, "_TEXTS", texts)
    assert tool_versions() == before
    with (texts / name).open("ab") as file:
        file.write(b"\n")
    after = tool_versions()
    assert {step for step in before if before[step] != after[step]} == steps


def test_the_digests_are_of_the_texts_that_are_read_and_those_are_small() -> None:
    for path in (textdata.CALIBRATION_TEXT, textdata.HELDOUT_TEXT):
        assert path.parent == toolchain._TEXTS
        assert 0 < path.stat().st_size < 1 << 20


@pytest.mark.parametrize("name", ["model_repo/llm/text.py", "model_repo/ensemble/chain.py", "templates/ensemble/a.j2"])
def test_another_shipped_model_is_another_repository(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trtbuild.render import data_dir

    for kind in ("templates", "model_repo"):
        shutil.copytree(data_dir(kind), tmp_path / kind, ignore=shutil.ignore_patterns("__pycache__"))
    before = tool_versions()
    monkeypatch.setattr(toolchain, "data_dir", lambda kind: tmp_path / kind)
    assert tool_versions() == before
    with (tmp_path / name).open("ab") as file:
        file.write(b"\n")
    after = tool_versions()
    assert {step for step in before if before[step] != after[step]} == {"repository"}


def test_missing_tools_are_all_named() -> None:
    with pytest.raises(HostError, match="the step compress needs torch, safetensors, not installed"):
        require("compress", {"torch": None, "revision": "1", "safetensors": None})
