"""The evaluation step on tiny models: from files to numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny import save_checkpoint
from trtbuild.errors import ArtifactError, RecipeError
from trtbuild.evaluate.run import run
from trtbuild.process import run_worker

MakeEngine = Callable[..., Path]


def request(source: Path, engine: Path, **changes: Any) -> dict[str, Any]:
    base = {"source": str(source), "engine": str(engine), "tokens": 4096, "length": 128, "data": None, "device": "cpu"}
    return base | {"trust_remote_code": False} | changes


def silent(done: int, total: int, what: str) -> None:
    assert 0 <= done <= total
    assert what


def _noise(tensors: dict[str, Any]) -> None:
    import torch

    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            tensors[name] = tensor + 0.05 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)


def test_unchanged_model_scores_as_the_original(source: Path, make_engine: MakeEngine) -> None:
    seen: list[tuple[int, int]] = []
    result = run(request(source, make_engine()), lambda done, total, what: seen.append((done, total)))
    assert result["tokens"] == 4096
    assert result["perplexity"]["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert result["kl_divergence"]["mean"] == pytest.approx(0.0, abs=1e-6)
    assert result["top1_agreement"]["share"] > 0.999
    assert result["bytes"]["reference"] == result["bytes"]["engine"] == (source / "model.safetensors").stat().st_size
    assert seen == [(number, 32) for number in range(33)]
    assert "float32 on cpu" in result["how"]
    json.dumps(result, allow_nan=False)


def test_the_report_says_how_scales_were_joined(source: Path, make_engine: MakeEngine) -> None:
    joined = {"gate_up": True, "kv_cache": True, "intermediate": "float32"}
    engine = make_engine()
    short = {"tokens": 64, "length": 32}
    how = run(request(source, engine, joined_scales=joined, **short), silent)["how"]
    assert "scales of joined projections (query, key and value, gate and up) brought to the largest" in how
    assert "rounded again through float32; keys and values with the larger of their scales, against" in how
    api = joined | {"gate_up": False, "kv_cache": False, "intermediate": "bfloat16"}
    how = run(request(source, engine, joined_scales=api, **short), silent)["how"]
    assert "(query, key and value, gate and up of experts) brought to the largest" in how
    assert "rounded again through bfloat16, against" in how
    assert "joined" not in run(request(source, engine, **short), silent)["how"]


def test_changed_weights_score_as_transformers_says(source: Path, make_engine: MakeEngine) -> None:
    """The numbers equal those of another program: Transformers on the changed weights, in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    from trtbuild.compress.textdata import HeldoutSpec, heldout_windows

    engine = make_engine(_noise)
    result = run(request(source, engine), silent)
    windows = torch.tensor(heldout_windows(HeldoutSpec(None, tokens=4096, length=128), source).input_ids)
    targets = windows[:, 1:, None]
    with torch.inference_mode():
        p, q = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)(windows[:, :-1]).logits.log_softmax(-1)
            for path in (source, engine)
        )
    difference = (p.gather(-1, targets) - q.gather(-1, targets)).mean(dim=(1, 2))
    ratio = math.exp(difference.mean())
    assert ratio > 1.01
    assert result["perplexity"]["reference"] == pytest.approx(math.exp(-p.gather(-1, targets).mean()), rel=1e-4)
    assert result["perplexity"]["ratio"] == pytest.approx(ratio, rel=1e-4)
    assert result["perplexity"]["ratio_standard_error"] == pytest.approx(
        ratio * float(difference.std()) / math.sqrt(32), rel=1e-2
    )
    assert result["kl_divergence"]["mean"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    agreement = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert result["top1_agreement"]["share"] == pytest.approx(agreement, abs=2e-3)


def test_named_numerics_need_no_engine_json(source: Path, make_engine: MakeEngine) -> None:
    engine = make_engine(_noise)
    with_file = run(request(source, engine), silent)
    (engine / "engine.json").unlink()
    numerics = {"kv_cache_dtype": "auto", "compute_dtype": "auto", "weights": "auto"}
    assert run(request(source, engine, **numerics), silent) == with_file
    with pytest.raises(ArtifactError, match=r"engine\.json"):
        run(request(source, engine), silent)


def test_one_window_has_no_standard_error(source: Path, make_engine: MakeEngine) -> None:
    result = run(request(source, make_engine(), tokens=128), silent)
    assert result["perplexity"]["ratio_standard_error"] is None
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_engine_that_computes_nonsense_is_named(source: Path, make_engine: MakeEngine, value: float) -> None:
    def break_norm(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"].fill_(value)

    with pytest.raises(ArtifactError, match="probabilities are not finite in window 1 of the held-out text"):
        run(request(source, make_engine(break_norm)), silent)


def test_two_different_models_are_not_compared(source: Path, make_engine: MakeEngine, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", overrides={"vocab_size": 384})
    with pytest.raises(ArtifactError, match=r"shape \[128, 320\], the original model \[128, 384\]"):
        run(request(other, make_engine()), silent)


def test_damaged_original_is_an_artifact_error(make_engine: MakeEngine, tmp_path: Path) -> None:
    broken = save_checkpoint(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x08\x00")
    with pytest.raises(ArtifactError, match="cannot load the original model"):
        run(request(broken, make_engine()), silent)


def test_calibration_text_is_refused(source: Path, make_engine: MakeEngine, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    lines = [f"Sentence {number} is long enough to be told apart from chance, surely.\n" for number in range(400)]
    text.write_text("".join(lines))
    wanted = request(source, make_engine(), data=str(text), calibration={"data": str(text), "column": None})
    with pytest.raises(RecipeError, match="is both calibration and held-out text"):
        run(wanted, silent)


def test_child_process_answers_and_reports_its_errors(
    source: Path, make_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2] / "builder"))
    engine = make_engine()
    progress: list[str] = []
    outcome = run_worker(
        "trtbuild.evaluate",
        request(source, engine),
        log=tmp_path / "log.txt",
        on_progress=lambda done, total, what: progress.append(what),
    )
    assert outcome.result["tokens"] == 4096
    assert progress[-1] == "windows evaluated"
    short = tmp_path / "short.txt"
    short.write_text("too little")
    with pytest.raises(RecipeError, match=r"quality\.data: .*short\.txt has 10 tokens") as caught:
        run_worker(
            "trtbuild.evaluate",
            request(source, engine, data=str(short)),
            log=tmp_path / "log.txt",
            on_progress=silent,
        )
    assert caught.value.problems[0].path == "quality.data"
