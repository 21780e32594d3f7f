"""What goes wrong in the middle: one sentence, nothing half-written, and the work that is still good is kept."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_requests import make_request, silent
from safetensors.torch import load_file, save_file
from test_stream_resume import digests

from tiny import save_checkpoint
from trtbuild.compress import shards
from trtbuild.compress.run import run
from trtbuild.errors import ArtifactError, HostError, ToolError

FORMATS: list[dict[str, Any]] = [{"format": "fp8"}, {"format": "int8_weight_only"}]


def change(source: Path, name: str, edit: Any) -> None:
    """Edit one tensor of a checkpoint in its file."""
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            edit(tensors[name])
            save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("changes", FORMATS, ids=["fp8", "int8"])
def test_nan_in_the_last_layer(changes: dict[str, Any], tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "qwen3_moe")
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    change(source, name, lambda tensor: tensor[5].fill_(float("nan")))
    with pytest.raises(ArtifactError, match=f"{name} holds NaN or infinite values; use an undamaged checkpoint"):
        run(make_request(source, tmp_path / "out", **changes), silent)
    assert list((tmp_path / "out").iterdir()) == []
    assert not (tmp_path / "out.unfinished").exists()  # it would happen again


def test_nan_outside_the_layers(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama")
    change(source, "lm_head.weight", lambda tensor: tensor[7].fill_(float("inf")))
    with pytest.raises(ArtifactError, match="lm_head.weight holds NaN or infinite values"):
        run(make_request(source, tmp_path / "out", format="fp8"), silent)
    assert not (tmp_path / "out.unfinished").exists()


def test_an_activation_that_overflows(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama")
    for leaf in ("gate_proj", "up_proj"):
        change(source, f"model.layers.1.mlp.{leaf}.weight", lambda tensor: tensor.fill_(1e37))
    message = (
        "calibration sample 1: the input of model.layers.1.mlp.down_proj is not finite in torch.float32; the model"
    )
    with pytest.raises(ToolError, match=message):
        run(make_request(source, tmp_path / "out", format="fp8"), silent)
    assert list((tmp_path / "out").iterdir()) == []
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.parametrize("damage", ["gone", "changed", "shorter"])
def test_a_shard_that_disappears_midway(damage: str, tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama", max_shard_size="60KB", overrides={"num_hidden_layers": 6})
    request = make_request(source, tmp_path / "out", format="fp8")
    run(request | {"output": str(tmp_path / "expected")}, silent)
    shard = next(
        path for path in sorted(source.glob("*.safetensors")) if "model.layers.5.mlp.up_proj.weight" in load_file(path)
    )
    aside = tmp_path / shard.name
    shutil.copy2(shard, aside)

    def spoil(done: int, total: int, what: str) -> None:
        if what.startswith("calibrate: layer 2 of 6, sample 1 "):  # the third layer is being read
            if damage == "gone":
                shard.rename(aside)
            elif damage == "shorter":
                shard.write_bytes(shard.read_bytes()[:-1000])
            else:
                shard.write_bytes(shard.read_bytes())

    with pytest.raises(
        ArtifactError, match=rf"{re.escape(str(shard))} has changed or disappeared while it was read; put"
    ):
        run(request, spoil)
    assert list((tmp_path / "out").iterdir()) == []
    if damage != "gone":
        return
    aside.rename(shard)
    assert run(request, silent)["notes"] == ["an earlier run had finished 5 of 6 layers"]
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")


def test_source_of_another_shape_is_named(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama")
    path = source / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = torch.zeros(64, 128, dtype=torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=rf"{name}"):
        run(make_request(source, tmp_path / "out", format="fp8"), silent)
    assert not list((tmp_path / "out").glob("*"))


def test_a_shard_that_disappears_while_it_is_copied(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama", max_shard_size="60KB")
    last = max(source.glob("*.safetensors"))

    def spoil(done: int, total: int, what: str) -> None:
        if what.startswith("copy: file 1 "):
            last.unlink(missing_ok=True)

    with pytest.raises(
        ArtifactError, match=rf"{re.escape(str(last))} has changed or disappeared while it was read; put"
    ):
        run(make_request(source, tmp_path / "out"), spoil)


def test_a_disk_that_fills_up_under_a_tensor(sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As test_full_disk, where no file system of its own can be mounted."""
    request = make_request(sources("llama"), tmp_path / "out", format="fp8")
    write, left = shards._write, [40]

    def full(descriptor: int, block: torch.Tensor, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, block, offset)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write", full)
        message = (
            r"needs about [\d,]+ bytes, the disk is full; free space .* the next run goes on behind the last finished"
        )
        with pytest.raises(HostError, match=message):
            run(request, silent)
    assert list((tmp_path / "out").iterdir()) == []
    assert run(request, silent)["notes"] == ["an earlier run had finished 1 of 3 layers"]
    run(request | {"output": str(tmp_path / "expected")}, silent)
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")
