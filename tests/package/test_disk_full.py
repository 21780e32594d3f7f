"""A disk that fills up: a sentence with exit code 6, nothing half-written, and the next build goes on."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import save_checkpoint


def can_mount() -> bool:
    """Whether this user may mount a small file system in a namespace of its own."""
    if shutil.which("unshare") is None:
        return False
    probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs unshare with the right to mount a tmpfs in a user namespace")
def test_full_store_is_host_error_and_the_build_resumes(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "ckpt", overrides={"hidden_size": 256, "intermediate_size": 1024})
    recipe = tmp_path / "recipe.yaml"
    store = tmp_path / "store"
    store.mkdir()
    recipe.write_text(
        f"schema_version: 1\nmodel: {{path: {checkpoint}}}\nruntime: {{kind: embedded}}\nstore: {store}\n"
    )
    build = shlex.join([sys.executable, "-m", "trtbuild", "build", str(recipe), "--until", "engine"])
    # The store has room for half of the checkpoint; then the same file system grows, as after a clean-up.
    script = f"""
        mount -t tmpfs -o size=3m none {store} || exit 99
        {build}; echo "first: $?"
        ls {store}/compress 2>/dev/null; echo "listed"
        mount -o remount,size=64m {store}
        {build} >{tmp_path}/artifact; echo "second: $?"
        cp "$(cat {tmp_path}/artifact)/model.safetensors" {tmp_path}/result.safetensors
    """
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert "first: 6\nlisted\nsecond: 0\n" in done.stdout, done.stdout + done.stderr
    assert "the compressed checkpoint needs about" in done.stderr
    assert "free space there or move the store" in done.stderr
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "result.safetensors").stat().st_size == (checkpoint / "model.safetensors").stat().st_size


@pytest.mark.skipif(not can_mount(), reason="needs unshare with the right to mount a tmpfs in a user namespace")
def test_a_full_output_disk_is_the_one_that_is_named(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "ckpt")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"schema_version: 1\nmodel: {{path: {checkpoint}}}\nruntime: {{kind: embedded}}\nstore: {tmp_path / 'store'}\n"
    )
    out = tmp_path / "small"
    out.mkdir()
    build = shlex.join([sys.executable, "-m", "trtbuild", "build", str(recipe), "-o", str(out / "package")])
    script = f"mount -t tmpfs -o size=100k none {out} || exit 99\n{build}; echo $?; ls -A {out}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "6\n", done.stdout + done.stderr  # and nothing is left there
    assert f"no space left on the device of {out}/" in done.stderr
