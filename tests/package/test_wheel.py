"""The wheel: complete, and able to do the main job in an environment of its own, outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """A new virtual environment with the wheel; its dependencies are this one's, trtbuild itself is not."""
    path = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(path), "platbase": str(path)}))
    # A plain path in a .pth file adds the directory but none of its own .pth files: the editable install stays out.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(packages)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    return path


def test_wheel_holds_the_package_and_the_shipped_files(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("templates", "model_repo", "docker"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert len(files) >= 2
        for path in files:
            assert f"trtbuild/_data/{path.relative_to(ROOT).as_posix()}" in names
    for path in (ROOT / "builder" / "trtbuild").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT / "builder").as_posix() in names
    assert not [name for name in names if name.startswith(("tests", "examples", "benchmarks")) or "__pycache__" in name]


def test_installed_wheel_does_the_main_job(environment: Path, recipe: Path, tmp_path: Path) -> None:
    python = environment / "bin" / "python"
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [str(python), *arguments], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    home = run("-c", "import trtbuild; print(trtbuild.__file__)").strip()
    assert home.startswith(str(environment))
    run("-m", "trtbuild", "build", str(recipe), "-o", "package", "--set", f"store={tmp_path / 'store'}")
    assert "passed  served perplexity" in run("-m", "trtbuild", "verify", "package", "--served")
