"""A server that is started again when Triton's own defect has ended it, and tests that are then run again.

Triton 2.51 makes the arrays of BLS responses without Python's lock (`trtbuild.serving.verify.BLS_DEFECT`), so that the
process of `tensorrt_llm_bls` dies in about one of a hundred requests. That, as the server's log says it, is the only
failure that is forgiven, and only so many times; every other one, and every other model's death, is the test's result.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_helpers import START_S

from trtbuild.serving.server import TritonServer

_ATTEMPTS = 4


class RestartingServer:
    """Stands for a `TritonServer` over one repository: its attributes are those of the server that runs now."""

    def __init__(self, repository: Path, log: Path) -> None:
        self._start = functools.partial(TritonServer.start, repository, log=log, startup_timeout_s=START_S)
        self._server = self._start()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

    def __enter__(self) -> RestartingServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    def restart(self) -> None:
        """Replace a server that has ended."""
        self._server.stop()
        self._server = self._start()


def forgiving(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test again when the process of `tensorrt_llm_bls` has died under it."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        servers = [value for value in fixtures.values() if isinstance(value, RestartingServer)]
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                test(**fixtures)
            except BaseException:
                lost = {server: server.lost_stub(timeout_s=6) for server in servers}
                for server in (server for server, said in lost.items() if said):
                    server.restart()
                known = any("'tensorrt_llm_bls' was ended by signal" in said for said in lost.values() if said)
                if attempt == _ATTEMPTS or not known:
                    raise
                print(f"Triton's tensorrt_llm_bls has died, attempt {attempt}: {lost}", file=sys.stderr)
            else:
                return

    return run
