"""What is checked before a server is started, and what is read from the log of one that did not start."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest

from trtbuild.errors import ArtifactError, HostError
from trtbuild.serving import installation
from trtbuild.serving.installation import find_triton
from trtbuild.serving.server import TritonServer
from trtbuild.serving.startup_log import fatal_line, reason, taken_port


def test_the_installation_is_complete_and_leaves_site_packages_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = find_triton()
    site_packages = found.libraries.parent
    before = sorted(path.name for path in (site_packages / "pytriton/tritonserver/backends/python").iterdir())
    assert find_triton().backends == found.backends, "made once"
    assert sorted(path.name for path in found.backends.rglob("*") if path.is_file()) == [
        "libtriton_python.so", "triton_python_backend_stub", "triton_python_backend_utils.py"
    ]  # fmt: skip
    assert found.backends.is_relative_to(tmp_path)
    after = sorted(path.name for path in (site_packages / "pytriton/tritonserver/backends/python").iterdir())
    assert before == after
    assert "triton_python_backend_stub" not in after


def test_the_server_s_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"PATH": "/usr/bin", "HF_TOKEN": "hf_secret", "PYTHONHOME": "/nowhere", "OMP_NUM_THREADS": "3"}
    environment = find_triton().environment(base)
    assert environment["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), "/usr/bin"]
    assert "nvidia_pytriton.libs" in environment["LD_LIBRARY_PATH"]
    assert not {"HF_TOKEN", "PYTHONHOME"} & set(environment)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_numpy_2_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.1.0" if name == "numpy" else real(name))
    with pytest.raises(HostError, match=r"numpy 2.1.0 is installed.*; pip install 'numpy<2'"):
        find_triton()


def test_a_missing_wheel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytriton", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HostError, match=r"nvidia-pytriton.*is not installed.*pip install 'trtbuild\[serve\]'"):
        find_triton()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("libpython3.11.so.1.0 => not found", "apt-get install libpython3."),
        ("/lib/libc.so.6: version `GLIBC_2.38' not found (required by tritonserver)", "glibc 2.35 or newer is needed"),
    ],
)
def test_a_missing_library_is_named(line: str, sentence: str) -> None:
    error = installation._missing_library(line, Path("/x/tritonserver"))
    assert isinstance(error, HostError)
    assert line.split(maxsplit=1)[0] in str(error)
    assert sentence in str(error)


def test_no_repository_no_server(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no model repository here"):
        TritonServer.start(tmp_path / "none", log=tmp_path / "log")


NOISE = 'E1123 15:21:56.920357 4642 server.cc:241] "CudaDriverHelper has not been initialized."\n'
EXCEPTION = r"""
E1123 15:21:57.308290 4642 backend_model.cc:692] "ERROR: Failed to create instance: Value: no"
E1123 15:21:57.308440 4642 model_lifecycle.cc:642] "failed to load 'm' version 1: Internal: Value: no\n\nAt:\n  /r: f\n"
"""
PARSE = """
[libprotobuf ERROR /tmp/x/text_format.cc:337] Error parsing text-format inference.ModelConfig: 5:10: Oops.
E1123 15:22:02.144747 4769 model_repository_manager.cc:1460] "Poll failed for model directory 'm': failed to read /r/m"
"""
LOGS = {
    "exception": (EXCEPTION, "model 'm': Value: no (at /r: f)"),
    "parse": (PARSE, "Poll failed for model directory 'm': failed to read /r/m; 5:10: Oops."),
    "nothing": ("error: something else\n", f"its log ends with\n{NOISE}error: something else"),
}


@pytest.mark.parametrize("name", LOGS)
def test_the_reason_is_found_in_the_log(tmp_path: Path, name: str) -> None:
    text, sentence = LOGS[name]
    (tmp_path / "log").write_text(NOISE + text, encoding="utf-8")
    assert reason(tmp_path / "log") == sentence
    assert fatal_line(tmp_path / "log") is None
    assert taken_port(tmp_path / "log") is None


def test_a_log_that_is_not_there_yet(tmp_path: Path) -> None:
    assert fatal_line(tmp_path / "none") is None
    assert "the log is empty" in reason(tmp_path / "none")
