"""Kill a real build at many random moments: the store stays intact, and the next build ends with the same bytes."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from trtbuild.manifest import DigestCache
from trtbuild.package import damage, read_manifest
from trtbuild.store import Store

KILLS = 6
# Quantized, so that a kill can fall into calibration and export; a random model's perplexity is no matter here.
FP8 = ("compress.format=fp8", "compress.calibration={count: 2, length: 64}", "quality.max_perplexity_ratio=3")


@pytest.mark.parametrize("overrides", [(), FP8], ids=["bf16", "fp8"])
def test_killed_builds_leave_an_intact_store(recipe: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    def command(place: str) -> list[str]:
        changes = [f"store={tmp_path / place}", *overrides]
        arguments = [argument for change in changes for argument in ("--set", change)]
        return [sys.executable, "-m", "trtbuild", "build", str(recipe), "-o", str(tmp_path / place / "out"), *arguments]

    started = time.monotonic()
    subprocess.run(command("whole"), check=True, capture_output=True)
    duration = time.monotonic() - started
    moments = random.Random(7)
    killed = 0
    for _ in range(KILLS):
        process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.1, duration))
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGKILL)
        finished = process.wait() != -signal.SIGKILL
        psutil.wait_procs(children, timeout=20)
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        check_store(tmp_path / "killed")
        check_package(tmp_path / "killed" / "out")
        killed += not finished
        if finished:  # whatever an earlier run had done was reused: begin anew
            shutil.rmtree(tmp_path / "killed")
    assert killed >= KILLS // 2
    subprocess.run(command("killed"), check=True, capture_output=True)
    check_store(tmp_path / "killed")
    digests = {place: check_package(tmp_path / place / "out") for place in ("killed", "whole")}
    assert digests["killed"] == digests["whole"] is not None
    for name in ("staging", "unfinished"):
        assert not list((tmp_path / "killed" / name).iterdir())
    assert not [path.name for path in (tmp_path / "killed").iterdir() if path.name.startswith(".out")]


def test_a_killed_compression_goes_on(recipe: Path, tmp_path: Path) -> None:
    """Killed as soon as the journal has two layers; the next build does the third, and says so."""
    command = [sys.executable, "-m", "trtbuild", "build", str(recipe), "-o", str(tmp_path / "out")]
    for change in (f"store={tmp_path / 'store'}", *FP8[:1], "compress.calibration={count: 64, length: 128}", FP8[2]):
        command += ["--set", change]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journals = tmp_path / "store" / "unfinished"
    while process.poll() is None:
        lines = [line for path in journals.glob("*/journal.jsonl") for line in path.read_bytes().splitlines()]
        if len(lines) >= 4:  # the key, what lies outside the layers, two layers
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "compress: an earlier run had finished" in done.stderr
    assert check_package(tmp_path / "out") is not None
    assert not list(journals.iterdir())


def check_store(root: Path) -> None:
    """Everything that looks finished is sound."""
    if not root.is_dir():
        return
    store = Store(root)
    for kind in ("compress", "engine", "repository", "deploy", "evaluate"):
        for path in (root / kind).glob("*"):
            assert store.find(kind, path.name) is not None, str(path)
    assert not (root / "damaged").exists()


def check_package(out: Path) -> str | None:
    """The digest of a whole package, or None where there is none: a killed build never leaves half of one."""
    if not out.exists():
        return None
    assert damage(out, DigestCache(None)) == []
    return str(read_manifest(out)["digest"])
