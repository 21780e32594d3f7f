"""A host for building TensorRT engines: stand-ins for the tools that it has, first on PATH. See ``fake_engine/``."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

FAKES = Path(__file__).parent / "fake_engine"
# What a script needs of the system; docker and others may be installed where the tests run.
_SYSTEM = (
    *("bash", "env", "cat", "cksum", "cut", "dirname", "flock", "grep", "id", "mkdir", "mv", "paste", "rm", "sleep"),
    *("sort", "uname", "wc", "sh"),
)


class EngineHost:
    """One such host; `tools` are the stand-ins on its PATH, `gpus` the compute capabilities of its GPUs."""

    def __init__(self, path: Path, *tools: str, gpus: str = "9.0 9.0", **environment: str) -> None:
        self.log, self.gpus = path / "log", gpus
        self._more = environment
        self._bin = path / "bin"
        self._bin.mkdir(parents=True)
        self.log.touch()
        for name in _SYSTEM:
            found = next(place for place in (Path("/usr/bin", name), Path("/bin", name)) if place.exists())
            (self._bin / name).symlink_to(found)
        for name in tools:
            self.add(name)

    def add(self, name: str) -> None:
        """Install one more tool."""
        script = self._bin / name
        lines = [f"#!{sys.executable}", "import sys", f"sys.path.insert(0, {str(FAKES)!r})", "import tools"]
        source = "\n".join([*lines, "sys.exit(tools.main())", ""])
        script.write_text(source, encoding="utf-8")
        script.chmod(0o755)

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a process there."""
        own = {"PATH": str(self._bin), "FAKE_LOG": str(self.log), "FAKE_GPUS": self.gpus}
        return {"HOME": os.environ.get("HOME", "/")} | own | self._more | more

    def calls(self, tool: str, *beginning: str) -> list[list[str]]:
        """Arguments of every call of one tool that begin so."""
        lines = [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]
        return [line[1:] for line in lines if line[0] == tool and tuple(line[1 : 1 + len(beginning)]) == beginning]

    def built(self) -> list[str]:
        """The ranks that were built, in order."""
        return [rank for rank, *_ in self.calls("rank")]

    def containers(self) -> list[Path]:
        """Containers that run, and root file systems that were not removed."""
        return [*self.log.parent.glob("*.pid"), *self.log.parent.glob("*.rootfs")]

    def wait_for(self, text: str, path: Path, limit_s: float = 60.0) -> None:
        """Wait until a file has `text`."""
        deadline = time.monotonic() + limit_s
        while not (path.is_file() and text in path.read_text(encoding="utf-8", errors="replace")):
            assert time.monotonic() < deadline, f"{text!r} never came to {path}"
            time.sleep(0.02)
