"""Speculation in the python model for the LLM API: the draft's place, its numbers, and sampling beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from llm_helpers import spec
from model_repo.llm import backend_trtllm
from model_repo.llm.trtllm_process import SetupError, place_draft
from model_repo.llm.wire import BadRequestError
from trtllm_helpers import ARGS, FLAVOURS, events, fake_in_process, make_engine, run

from drafts import save_eagle3
from trtbuild.adapters.triton import check_repository, render_repository

PROMPT = [5, 6, 7, 40, 41]
EAGLE3 = {"decoding_type": "Eagle", "max_draft_len": 3, "speculative_model": "draft", "allow_advanced_sampling": True}


@pytest.fixture(scope="module")
def engine_dir(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_engine(package / "engine", tmp_path_factory.mktemp("drafts") / "engine", speculative_config=EAGLE3)
    save_eagle3(directory / "draft")
    return directory


@contextmanager
def loaded(engine_dir: Path, flavour: str, log: Path) -> Iterator[Any]:
    with fake_in_process(flavour, log):
        backend = backend_trtllm.load(engine_dir, gpus=None, adapters={})
        try:
            yield backend
        finally:
            backend.close()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_draft_is_found_and_counted(engine_dir: Path, flavour: str, tmp_path: Path) -> None:
    with loaded(engine_dir, flavour, tmp_path / "log") as backend:
        (found,) = events(tmp_path / "log", "draft")
        assert (found["place"], found["architecture"]) == (str(engine_dir / "draft"), "LlamaForCausalLMEagle3")
        (start,) = events(tmp_path / "log", "start")
        assert start["args"]["speculative_config"] == {**EAGLE3, "speculative_model": str(engine_dir / "draft")}
        metrics = run(backend, PROMPT, perf_metrics=True, max_tokens=4).wait().metrics
        numbers = (metrics.acceptance_rate, metrics.total_accepted_draft_tokens, metrics.total_draft_tokens)
        # Four tokens in three steps. Only newer versions say how many tokens were drafted.
        assert numbers == ((1 / 6, 1, 6) if flavour == "newest" else (None, 1, None))
        run(backend, PROMPT, temperature=2.0)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_drafts_that_are_verified_greedily(engine_dir: Path, flavour: str, tmp_path: Path) -> None:
    args = json.loads(json.dumps(ARGS | {"speculative_config": EAGLE3 | {"allow_advanced_sampling": False}}))
    directory = tmp_path / "engine"
    directory.symlink_to(engine_dir)
    with pytest.MonkeyPatch.context() as patch, fake_in_process(flavour, tmp_path / "log"):
        patch.setattr(backend_trtllm, "read_args", lambda _: args)
        backend = backend_trtllm.load(directory, gpus=None, adapters={})
        try:
            assert run(backend, PROMPT, temperature=0.0).ids == run(backend, PROMPT).ids
            if flavour == "newest":
                run(backend, PROMPT, temperature=2.0)
                return
            with pytest.raises(BadRequestError, match=r"temperature: TensorRT-LLM 1\.2\S* verifies .* drafts greedily"):
                run(backend, PROMPT, temperature=2.0)
        finally:
            backend.close()


def test_places(engine_dir: Path, tmp_path: Path) -> None:
    assert place_draft({"max_batch_size": 1}, tmp_path) == {"max_batch_size": 1}
    elsewhere = {"speculative_config": {"decoding_type": "Eagle", "speculative_model_dir": "org/draft"}}
    assert place_draft(elsewhere, tmp_path) == elsewhere
    older = {"speculative_config": {"decoding_type": "Eagle", "speculative_model_dir": "draft"}}
    placed = place_draft(older, engine_dir)["speculative_config"]
    assert placed["speculative_model_dir"] == str(engine_dir / "draft")
    with pytest.raises(SetupError, match="draft: holds no draft model; build the package again"):
        place_draft(older, tmp_path)


def test_the_stock_form_names_the_whole_path(tmp_path: Path) -> None:
    repository = tmp_path / "model_repository"
    made = spec(runtime="trtllm", model_py="upstream", llm_args=ARGS | {"speculative_config": EAGLE3})
    render_repository(made, repository)
    path = repository / "tensorrt_llm" / "1" / "model.yaml"
    text = path.read_text(encoding="utf-8")
    model = next(line for line in text.splitlines() if line.startswith("model: ")).removeprefix("model: ")
    assert f"speculative_model: {model}/draft\n" in text
    assert check_repository(repository, engine=None) == []
    path.write_text(text.replace(f"{model}/draft", "draft"), encoding="utf-8")
    (problem,) = check_repository(repository, engine=None)
    assert "speculative_config names the draft as draft, which the container looks for in its working" in str(problem)
