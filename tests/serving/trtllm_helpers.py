"""An engine directory for the runtime `trtllm`, and the fake TensorRT-LLM in this process or in a server's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from model_repo.llm.backend import Output
from model_repo.llm.contract import Sampling

FAKE = Path(__file__).parent / "fake_trtllm"
FLAVOURS = ("v1_2", "newest")
ARGS: dict[str, Any] = {
    "backend": "pytorch",
    "max_batch_size": 8,
    "max_num_tokens": 512,
    "max_seq_len": 512,
    "enable_lora": True,
    "guided_decoding_backend": "xgrammar",
    "enable_iter_perf_stats": True,
    "return_perf_metrics": True,
    "kv_cache_config": {"enable_block_reuse": True},
}


def make_engine(checkpoint: Path, directory: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with LLM arguments and one LoRA adapter (the fake never reads its weights)."""
    shutil.copytree(checkpoint, directory)
    args = {name: value for name, value in (ARGS | changes).items() if value is not None}
    (directory / "llm_args.yaml").write_text(yaml.safe_dump(args), encoding="utf-8")
    (directory / "adapters" / "formal").mkdir(parents=True)
    (directory / "adapters" / "formal" / "adapter_config.json").write_text("{}", encoding="utf-8")
    return directory


@contextmanager
def fake_in_process(flavour: str, log: Path) -> Iterator[None]:
    """`import tensorrt_llm` finds this flavour of the fake, which writes its events to `log`; may be nested."""
    path, earlier = list(sys.path), os.environ.get("FAKE_TENSORRT_LLM_LOG")
    modules = _taken_out()
    sys.path[:0] = [str(FAKE / flavour), str(FAKE / "common")]
    os.environ["FAKE_TENSORRT_LLM_LOG"] = str(log)
    try:
        yield
    finally:
        _taken_out()
        sys.modules.update(modules)
        sys.path[:] = path
        os.environ.pop("FAKE_TENSORRT_LLM_LOG")
        if earlier is not None:
            os.environ["FAKE_TENSORRT_LLM_LOG"] = earlier


def _taken_out() -> dict[str, Any]:
    names = [name for name in sys.modules if name.split(".")[0] in ("tensorrt_llm", "fake_trtllm")]
    return {name: sys.modules.pop(name) for name in names}


def events(log: Path, kind: str) -> list[dict[str, Any]]:
    """What the fake has written of one kind."""
    if not log.exists():
        return []
    found = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [event for event in found if event["event"] == kind]


class Collector:
    """Gathers one sequence's outputs."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self._done = threading.Event()

    def __call__(self, output: Output) -> None:
        assert not self._done.is_set(), "an output after the last one"
        self.outputs.append(output)
        if output.finished:
            self._done.set()

    def wait(self) -> Output:
        assert self._done.wait(30), "no last output"
        return self.outputs[-1]

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(token for output in self.outputs for token in output.token_ids)

    @property
    def logprobs(self) -> list[Any]:
        return [entry for output in self.outputs for entry in output.logprobs or ()]


def run(backend: Any, prompt: list[int], *, banned: list[list[int]] | None = None, **sampling: Any) -> Collector:
    """Submit one sequence and wait for its end."""
    collector = Collector()
    backend.submit(prompt, Sampling(**{"max_tokens": 8} | sampling), banned or [], collector)
    collector.wait()
    return collector


_PLACES = """
import sysconfig
print(sysconfig.get_path("purelib"))
for name in ("LIBDIR", "INSTSONAME", "py_version_short"):
    print(sysconfig.get_config_var(name))
"""
_BLOCKER = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "trtbuild":
            raise ImportError("trtbuild is blocked in this environment")

sys.meta_path.insert(0, Blocked())
"""


def make_environment(directory: Path, flavour: str, *, python: str = sys.executable, blocked: bool = False) -> Path:
    """An environment for Triton's stub (EXECUTION_ENV_PATH): the packages of `python`, and the fake."""
    asked = [python, "-c", _PLACES]
    purelib, libraries, library, version = subprocess.run(
        asked, check=True, capture_output=True, text=True
    ).stdout.split()
    subprocess.run([python, "-m", "venv", "--without-pip", str(directory)], check=True)
    packages = directory / "lib" / f"python{version}" / "site-packages"
    paths = [FAKE / flavour, FAKE / "common", purelib]
    (packages / "fake_trtllm.pth").write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
    if blocked:
        (packages / "sitecustomize.py").write_text(_BLOCKER, encoding="utf-8")
    (directory / "lib" / library).symlink_to(Path(libraries) / library)  # Triton puts this directory first
    return directory


def use_environment(model: Path, environment: Path) -> None:
    """Have a model of a repository run in an environment."""
    config = model / "config.pbtxt"
    line = f'parameters {{ key: "EXECUTION_ENV_PATH" value {{ string_value: "{environment}" }} }}\n'
    config.write_text(config.read_text(encoding="utf-8") + line, encoding="utf-8")
