"""launch.sh of TensorRT engines holds the built engine against engine.json, the host's GPUs and its TensorRT-LLM.

The script runs with stand-ins for mpirun, the server and nvidia-smi, without trtbuild on its path.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from trtbuild.adapters.triton_launch import LaunchSpec, render_launch
from trtbuild.adapters.triton_parameters import EngineParameters

_KEY = "0" * 64


@dataclass
class Host:
    """A package with an engine for two GPUs of SM90 by TensorRT-LLM 1.2.1, and what the host says."""

    root: Path
    gpus: tuple[str, ...] = ("9.0", "9.0")
    installed: str | None = "1.2.1"
    engine_json: dict[str, Any] = field(default_factory=lambda: {"version": "1.2.1", "gpu": "9.0", "key": _KEY})
    config: dict[str, Any] = field(default_factory=lambda: {"version": "1.2.1"})
    record: dict[str, Any] | None = field(
        default_factory=lambda: {
            "compute_capability": "9.0",
            "key": _KEY,
            "bytes": {"rank0.engine": 3, "rank1.engine": 3},
        }
    )
    draft: bool = False

    def run(self, *, text: str = "abc") -> subprocess.CompletedProcess[str]:
        package, tools, site = self.root / "pack age", self.root / "tools", self.root / "site"
        self._engine(package / "engine", text)
        if self.draft:
            self._engine(package / "engine/draft", text, gpu="8.0")
        tools.mkdir()
        site.mkdir()
        if self.installed:
            info = site / f"tensorrt_llm-{self.installed}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: {self.installed}\n")
        kinds = "".join(f'echo "{kind}"\n' for kind in self.gpus) or "exit 9\n"
        scripts = {
            "mpirun": "echo started",
            "nvidia-smi": f'[ "$1" = --list-gpus ] && exec seq 2\necho "$@" >"{self.root}/asked"\n{kinds}',
            "tritonserver": "exit 1",
            "python3": f'exec "{sys.executable}" -S "$@"',
        }
        for name, body in scripts.items():
            (tools / name).write_text(f"#!/bin/sh\n{body}\n")
            (tools / name).chmod(0o755)
        mode = "orchestrator" if self.draft else "leader"
        of = lambda at: EngineParameters(str(package / at / "built"), tensor_parallel_size=2)  # noqa: E731
        draft = of("engine/draft") if self.draft else None
        spec = LaunchSpec(of("engine"), 2, "image", mode, package=str(package), draft=draft, described=True)
        script = self.root / "launch.sh"
        script.write_text(render_launch(spec))
        environment = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "TRITONSERVER": str(tools / "tritonserver"),
            "PYTHONPATH": str(site),
        }
        return subprocess.run(["sh", script], env=environment, capture_output=True, text=True, check=False, timeout=30)

    def _engine(self, at: Path, text: str, gpu: str | None = None) -> None:
        built = at / "built"
        built.mkdir(parents=True)
        (at / "engine.json").write_text(json.dumps(self.engine_json))
        mapping = {"world_size": 2, "tp_size": 2, "pp_size": 1}
        (built / "config.json").write_text(json.dumps(self.config | {"pretrained_config": {"mapping": mapping}}))
        if self.record is not None:
            record = self.record | ({"compute_capability": gpu} if gpu else {})
            (built / "trtbuild.json").write_text(json.dumps(record))
        for rank in range(2):
            (built / f"rank{rank}.engine").write_text(text)


def test_a_sound_engine_is_started(tmp_path: Path) -> None:
    host = Host(tmp_path)
    done = host.run()
    assert (done.returncode, done.stdout, done.stderr) == (0, "started\n", "")
    assert "--id=0,1" in (tmp_path / "asked").read_text().split()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"config": {"version": "1.1.0"}}, "is an engine of TensorRT-LLM 1.1.0, and this package is for 1.2.1; move"),
        ({"record": None}, "trtbuild.json is missing, and nothing else says for which GPU the engine was built; move"),
        (
            {"record": {"compute_capability": "8.0", "key": _KEY}},
            "was built for compute capability 8.0, and this package is for 9.0; move",
        ),
        (
            {"record": {"compute_capability": "9.0", "key": "1" * 64}},
            "was built from another checkpoint or with other arguments than this package's; move",
        ),
        (
            {"gpus": ("8.0", "8.0")},
            "GPUs 0,1 have compute capability 8.0, and the engine is for 9.0; start this on such",
        ),
        ({"gpus": ("8.0", "9.0")}, "have compute capability 8.0 and 9.0, and the engine is for 9.0"),
        ({"installed": "1.2.0"}, "TensorRT-LLM 1.2.0 is installed here, and the engine is of 1.2.1; start this in"),
        ({"engine_json": {"version": "1.2.1"}}, "cannot be held against its engine.json: KeyError('gpu'); build"),
    ],
)
def test_what_does_not_fit_ends_before_a_server_starts(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    done = Host(tmp_path, **change).run()
    assert (done.returncode, done.stdout) == (6, "")
    assert sentence in done.stderr
    assert all(line.startswith("launch.sh: ") for line in done.stderr.splitlines())


def test_a_rank_that_was_cut_short(tmp_path: Path) -> None:
    done = Host(tmp_path).run(text="a")
    assert done.returncode == 6
    assert "rank1.engine has 1 bytes, and 3 were written; move" in done.stderr


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    done = Host(tmp_path, config={"version": "1.1.0"}, gpus=("8.0", "8.0"), installed="1.2.0").run()
    assert len(done.stderr.splitlines()) == 3


def test_the_draft_model_s_engine_too(tmp_path: Path) -> None:
    done = Host(tmp_path, draft=True).run()
    assert done.returncode == 6
    assert "engine/draft/built was built for compute capability 8.0" in done.stderr


def test_what_cannot_be_asked_is_said(tmp_path: Path) -> None:
    done = Host(tmp_path, gpus=(), installed=None).run()
    assert (done.returncode, done.stdout) == (0, "started\n")
    assert [line.partition("; ")[0] for line in done.stderr.splitlines()] == [
        "launch.sh: note: nvidia-smi does not say the GPUs' compute capability",
        "launch.sh: note: no TensorRT-LLM of Python is installed here, so that its version was not checked",
    ]
