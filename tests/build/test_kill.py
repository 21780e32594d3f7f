"""Kill a real build at many random moments: the store stays intact, and the next build ends with the same bytes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from trtbuild.store import Store

KILLS = 12


def test_killed_builds_leave_an_intact_store(recipe: Path, package: Path, tmp_path: Path) -> None:
    store, out = tmp_path / "store", tmp_path / "out" / "package"
    command = [sys.executable, "-m", "trtbuild", "build", str(recipe), "-o", str(out), "--set", f"store={store}"]
    started = time.monotonic()
    subprocess.run([*command[:-1], f"store={tmp_path / 'timing'}"], check=True, capture_output=True)
    duration = time.monotonic() - started
    assert out.is_dir()
    moments = random.Random(7)
    killed = 0
    for _ in range(KILLS):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.1, duration))
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        psutil.wait_procs(children, timeout=20)
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        check_store(store)
        check_package(out)
    assert killed >= KILLS // 3
    subprocess.run(command, check=True, capture_output=True)
    check_store(store)
    assert check_package(out) == check_package(package)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def check_store(root: Path) -> None:
    """Everything that looks finished is sound."""
    if not root.is_dir():
        return
    store = Store(root)
    for kind in ("compress", "engine", "repository", "deploy", "evaluate"):
        for path in (root / kind).glob("*"):
            assert store.find(kind, path.name) is not None, str(path)
    assert not (root / "damaged").exists()


def check_package(out: Path) -> str:
    """The package digest of a whole package: a killed build never leaves half of one."""
    from trtbuild.manifest import DigestCache
    from trtbuild.package import damage, read_manifest

    assert damage(out, DigestCache(None)) == []
    return str(json.loads(json.dumps(read_manifest(out)))["digest"])
