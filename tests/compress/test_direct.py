"""Weights that are coded from file to file: the same bytes as through ModelOpt's modules, and where they are used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_requests import make_request, silent
from safetensors.torch import load_file, save_file
from test_stream_resume import digests, killed

from tiny import save_checkpoint
from trtbuild.compress import stream
from trtbuild.compress.codings import CODINGS, SECTIONS
from trtbuild.compress.run import run
from trtbuild.compress_memory import STRAIGHT_FORMATS
from trtbuild.errors import ArtifactError

SIDES = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "num_hidden_layers": 2}


def through_modelopt(request: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    with patch.context() as patched:
        patched.setattr(stream, "is_direct", lambda *args: False)
        run(request, silent)


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with rows of zeros, tiny and huge weights, negative zeros, and sides of several blocks."""
    source = save_checkpoint(tmp_path_factory.mktemp("strange") / "source", "qwen2", overrides=SIDES)
    path = source / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            tensor[1] = 0
            tensor[2] *= 1e-30
            tensor[3] *= 1e30
            tensor[4, ::3] = -0.0
            tensor[5, 7] = 3e38
            tensor[128:, :128] = 0
    save_file(tensors, path, metadata={"format": "pt"})
    return source


@pytest.mark.parametrize("name", CODINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_same_bytes_as_through_modelopt(
    name: str, dtype: torch.dtype, strange: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in strange.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    limit = 6e4 if dtype == torch.float16 else 3e38
    save_file(
        {key: tensor.float().clamp(-limit, limit).to(dtype) for key, tensor in tensors.items()},
        source / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    request = make_request(source, tmp_path / "direct", format=name, exclude=["*layers.1.mlp*"])
    seen: list[bool] = []
    wanted = stream.is_direct
    monkeypatch.setattr(stream, "is_direct", lambda *args: seen.append(wanted(*args)) or seen[-1])
    run(request, silent)
    assert seen == [True]
    through_modelopt(request | {"output": str(tmp_path / "modelopt")}, monkeypatch)
    assert digests(tmp_path / "direct") == digests(tmp_path / "modelopt")


@pytest.mark.parametrize("name", CODINGS)
def test_configs_without_modelopt(name: str, strange: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = make_request(strange, tmp_path / "direct", format=name)
    with monkeypatch.context() as patch:
        patch.setattr(stream, "import_libraries", lambda request: pytest.fail("ModelOpt is not needed"))
        run(request, silent)
    through_modelopt(request | {"output": str(tmp_path / "modelopt")}, monkeypatch)
    for file in ("hf_quant_config.json", "config.json"):
        texts = [(tmp_path / way / file).read_text() for way in ("direct", "modelopt")]
        assert json.loads(texts[0]) == json.loads(texts[1])
        assert list(json.loads(texts[0])) == list(json.loads(texts[1]))


def test_nothing_says_the_formats_twice() -> None:
    assert tuple(CODINGS) == tuple(SECTIONS) == STRAIGHT_FORMATS


def test_what_is_not_finite_is_named(strange: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in strange.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    for value in (float("nan"), float("-inf")):
        tensors[name][200, 300] = value
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ArtifactError, match=f"{name} holds NaN or infinite values"):
            run(make_request(source, tmp_path / "out", format="mxfp8"), silent)
        assert list((tmp_path / "out").iterdir()) == []
        assert not (tmp_path / "out.unfinished").exists()


def test_killed_runs_go_on(strange: Path, tmp_path: Path) -> None:
    request = make_request(strange, tmp_path / "expected", format="fp8_block")
    run(request, silent)
    moments: list[str | int | None] = [
        "write the checkpoint: embeddings", 2, "layer 1 of 2 is done", 9, "layer 2 of 2 is done", None,
    ]  # fmt: skip
    result = json.loads(killed(request | {"output": str(tmp_path / "out")}, moments, tmp_path).splitlines()[-1])
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")
    assert result["notes"] == ["an earlier run had finished 2 of 2 layers"]
