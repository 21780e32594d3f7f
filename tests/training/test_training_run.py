"""Heads and drafts are trained, exported and measured."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_requests import make_request, silent

from trtbuild.checkpoint_files import LocalFiles
from trtbuild.compress.run import run as compress
from trtbuild.eagle3_draft import misfits, read_eagle3
from trtbuild.errors import HostError, ToolError
from trtbuild.manifest import digest_json
from trtbuild.medusa_draft import MedusaHeads, read_medusa
from trtbuild.model import read_facts
from trtbuild.tokenizer_file import vocabulary
from trtbuild.trained_for import TrainedFor, read_record
from trtbuild.training.run import run

Trained = tuple[Path, dict[str, Any]]
BF16, INT64 = torch.bfloat16, torch.int64


def described(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in load_file(path).items()}


def test_medusa_heads_have_the_names_that_tensorrt_llm_reads(medusa: Trained, tiny_llama: Path) -> None:
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for head in range(2):
        expected[f"{head}.0.linear.weight"] = (BF16, (64, 64))
        expected[f"{head}.0.linear.bias"] = (BF16, (64,))
        expected[f"{head}.1.weight"] = (BF16, (320, 64))
    assert described(medusa[0] / "medusa_lm_head.safetensors") == expected
    config = json.loads((medusa[0] / "config.json").read_text())
    assert (config["medusa_num_heads"], config["medusa_num_layers"]) == (2, 1)
    heads = MedusaHeads(num_heads=2, num_layers=1, hidden_size=64, vocab_size=320)
    assert read_medusa(LocalFiles(medusa[0])) == heads


def test_an_eagle3_draft_is_what_its_loader_asks_for(eagle3: Trained, tiny_llama: Path) -> None:
    matrices = {
        "layers.0.self_attn.q_proj": (64, 128), "layers.0.self_attn.k_proj": (32, 128),
        "layers.0.self_attn.v_proj": (32, 128), "layers.0.self_attn.o_proj": (64, 64),
        "layers.0.mlp.gate_proj": (128, 64), "layers.0.mlp.up_proj": (128, 64), "layers.0.mlp.down_proj": (64, 128),
        "layers.0.hidden_norm": (64,), "layers.0.input_layernorm": (64,), "layers.0.post_attention_layernorm": (64,),
        "fc": (64, 128), "norm": (64,), "lm_head": (100, 64),
    }  # fmt: skip
    found = described(eagle3[0] / "model.safetensors")
    assert found.pop("d2t") == (INT64, (100,))
    assert found == {f"{name}.weight": (BF16, shape) for name, shape in matrices.items()}
    draft = read_eagle3(LocalFiles(eagle3[0]))
    assert (draft.captured, draft.draft_vocab_size, draft.context_length) == ((0, 1), 100, 512)
    assert misfits(draft, read_facts(LocalFiles(tiny_llama)), captured=2) == []
    config = json.loads((eagle3[0] / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (10000.0, None)
    tokens = load_file(eagle3[0] / "model.safetensors")["d2t"] + torch.arange(100)
    assert tokens.tolist() == sorted(set(tokens.tolist()))
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < 320


def test_a_draft_of_two_layers(tiny_llama: Path, tmp_path: Path) -> None:
    run(make_request(tiny_llama, tmp_path, "eagle3", num_layers=2, epochs=1, samples=6), silent)
    draft = read_eagle3(LocalFiles(tmp_path / "draft"))
    assert draft.num_layers == 2
    assert "midlayer.1.hidden_norm.weight" in draft.shapes
    assert misfits(draft, read_facts(LocalFiles(tiny_llama)), captured=2) == []


def test_a_target_in_fp8(tiny_llama: Path, tmp_path: Path) -> None:
    """Answers and hidden states are those of the quantized model."""
    request: dict[str, Any] = {
        "source": str(tiny_llama), "output": str(tmp_path / "fp8"), "format": "fp8", "group_size": None,
        "sparsity": "none", "kv_cache": "none", "calibration": {"data": None, "column": None, "count": 4, "length": 32,
        "seed": 0}, "device": "cpu",
    }  # fmt: skip
    compress(request, silent)
    result = run(make_request(tmp_path / "fp8", tmp_path, "medusa", format="fp8"), silent)
    assert result["acceptance"]["learned"]["match"][0] > 0.4
    record = read_record(tmp_path / "draft")
    assert record is not None
    assert record.format == "fp8"


def test_both_record_their_target(medusa: Trained, eagle3: Trained, tiny_llama: Path) -> None:
    tokens = vocabulary(json.loads((tiny_llama / "tokenizer.json").read_text()))
    expected = TrainedFor(
        method="medusa", weights="w" * 64, tokenizer=digest_json(tokens), hidden_size=64, vocab_size=320,
        num_layers=3, captured=None, format="none",
    )  # fmt: skip
    assert read_record(medusa[0]) == expected
    record = read_record(eagle3[0])
    assert record is not None
    assert (record.method, record.captured) == ("eagle3", (0, 1))


@pytest.mark.parametrize("method", ["medusa", "eagle3"])
def test_training_lowers_the_loss_and_learns_the_answers(method: str, request: pytest.FixtureRequest) -> None:
    result = request.getfixturevalue(method)[1]
    losses = [loss for _, loss in result["loss"]]
    assert [step for step, _ in result["loss"]] == list(range(1, result["steps"] + 1))
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    acceptance = result["acceptance"]
    assert acceptance["learned"]["match"][0] > 0.4  # by chance: 1 in 320
    for part in acceptance.values():
        assert part["accepted"][0] == part["match"][0]
        assert all(0 <= chain <= match <= 1 for chain, match in zip(part["accepted"], part["match"], strict=True))
        assert part["accepted"][1] <= part["accepted"][0]
        assert part["tokens_per_step"] == pytest.approx(1 + sum(part["accepted"]))
    assert result["prompts"] == {"learned": 16, "held_out": 4}


KILLER = """
    import json, os, signal, sys
    import torch
    import modelopt.torch.speculative
    from trtbuild.training.run import run

    torch.set_num_threads(1)
    request = json.loads(sys.argv[1])
    for moment in [*json.loads(sys.argv[2]), ""]:
        pid = os.fork()
        if pid == 0:
            def progress(done, total, what):
                if moment and what.startswith(moment):
                    os.kill(os.getpid(), signal.SIGKILL)
            print(json.dumps(run(request, progress)), flush=True)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        assert (status == signal.SIGKILL) == bool(moment), (moment, status)
"""


@pytest.mark.parametrize("method", ["medusa", "eagle3"])
def test_a_killed_training_ends_as_one_that_was_not(
    method: str, request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path
) -> None:
    changes = {} if method == "medusa" else {"draft_vocab_size": 100}
    asked = make_request(tiny_llama, tmp_path, method, save_seconds=0, **changes)
    moments = ["prompts answered", "step 2 of", "step 7 of"]
    command = [sys.executable, "-c", textwrap.dedent(KILLER), json.dumps(asked), json.dumps(moments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["notes"][-1] == "an earlier run had answered 20 prompts and finished 7 steps"
    folder, whole = request.getfixturevalue(method)
    assert result["loss"] == whole["loss"]
    assert result["acceptance"] == whole["acceptance"]
    for path in folder.iterdir():
        assert (tmp_path / "draft" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not (tmp_path / "work").exists()


class StopError(Exception):
    """Ends a run from inside."""


def test_unfinished_work_of_another_training_is_of_no_use(tiny_llama: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if what.startswith("step 4 of"):
            raise StopError

    asked = make_request(tiny_llama, tmp_path, "medusa", save_seconds=0)
    with pytest.raises(StopError):
        run(asked, stop)
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"journal.jsonl", "training.pt"}
    result = run(asked | {"learning_rate": 1e-3}, silent)
    assert not any("an earlier run" in note for note in result["notes"])


def test_a_full_disk_is_said(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(HostError, match=r"work: the disk is full; free space .*; the next run goes on where this one"):
        run(make_request(tiny_llama, tmp_path, "medusa"), silent)
    monkeypatch.setattr(torch, "save", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        run(make_request(tiny_llama, tmp_path, "medusa"), silent)


def test_a_damaged_state_is_of_no_use_either(medusa: Trained, tiny_llama: Path, tmp_path: Path) -> None:
    asked = make_request(tiny_llama, tmp_path, "medusa")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "training.pt").write_bytes(b"half a stat")
    assert run(asked, silent)["loss"] == medusa[1]["loss"]


def test_a_training_that_diverges_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"(no number|NaN or infinite values).*; lower speculative.train.learning_rate"):
        run(make_request(tiny_llama, tmp_path, "medusa", learning_rate=1e25), silent)
