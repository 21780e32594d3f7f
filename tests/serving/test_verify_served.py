"""The served check: a sound package passes, and one that serves something else than its engine does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from llm_helpers import START_S

from trtbuild.errors import ArtifactError
from trtbuild.serving.server import TritonServer
from trtbuild.serving.verify import compare_with_reference, served_perplexity, verify_served


@pytest.mark.triton
def test_a_sound_package_passes(package: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    report = verify_served(
        package,
        log=tmp_path / "served.log",
        max_tokens=12,
        perplexity_tokens=1024,
        startup_timeout_s=START_S,
        on_progress=lambda done, total, what: seen.append(what),
    )
    assert report.passed, report.problems
    assert (report.prompts, report.greedy_agreement, report.streaming_equal) == (4, 1.0, True)
    assert report.perplexity_tokens >= 1024
    assert report.perplexity == pytest.approx(report.engine_perplexity, rel=1e-6)
    assert report.tokens_per_second > 0
    assert {"greedy answers of the engine", "perplexity of the engine", "answers of the server"} <= set(seen)
    assert (tmp_path / "served.log").stat().st_size > 0


@pytest.mark.triton
def test_other_tokens_and_another_perplexity_are_found(server: TritonServer) -> None:
    prompt = [5, 6, 7]
    windows = [list(range(10, 60))]
    perplexity, tokens = served_perplexity(server.http_url, windows)
    assert tokens == 49
    reference = {"prompts": [prompt], "answers": [[1, 2, 3, 4]], "windows": windows, "perplexity": perplexity * 1.01}
    report = compare_with_reference(server, reference, model="tensorrt_llm", on_progress=lambda *_: None)
    assert not report.passed
    assert report.greedy_agreement < 1
    assert report.streaming_equal
    assert any(problem.startswith("prompt 0: the server's token 0 is") for problem in report.problems)
    assert any(problem.startswith("the served perplexity is") for problem in report.problems)


def test_a_package_without_a_model_is_refused(package: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no model of a known layout here"):
        verify_served(tmp_path, log=tmp_path / "log")
    shutil.copytree(package / "model_repository", tmp_path / "model_repository")
    config = tmp_path / "model_repository" / "tensorrt_llm" / "config.pbtxt"
    config.write_text(config.read_text().replace('"300"', '"many"'))
    with pytest.raises(ArtifactError, match="parameter max_output_tokens is 'many'"):
        verify_served(tmp_path, log=tmp_path / "log")
