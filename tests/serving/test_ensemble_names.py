"""A step of an ensemble that names a tensor which its model does not have: the sentence names those spelled like it."""

from __future__ import annotations

from pathlib import Path

import pytest
from llm_helpers import spec

from trtbuild.adapters.triton import check_repository, render_repository


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("runtime_top_q", "did you mean runtime_top_p or runtime_top_k or runtime_top_p_min?"),
        ("xyzzy", "none of its 62 is spelled like it: they are in its config.pbtxt"),
    ],
)
def test_near_names_instead_of_sixty(tmp_path: Path, wrong: str, hint: str) -> None:
    render_repository(spec(layout="ensemble", max_batch_size=8), tmp_path / "repository")
    config = tmp_path / "repository/ensemble/config.pbtxt"
    text = config.read_text()
    changed = text.replace('key: "runtime_top_p" ', f'key: "{wrong}" ', 1)
    assert changed != text
    config.write_text(changed)
    found = [str(problem) for problem in check_repository(tmp_path / "repository", engine=None)]
    sentences = [one for one in found if f"the input {wrong}, which the model tensorrt_llm does not have; " in one]
    assert [one.partition("does not have; ")[2] for one in sentences] == [hint]
