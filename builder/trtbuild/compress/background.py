"""A thread that works off jobs in order beside the caller."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType


class Background:
    """Jobs in their order, on one thread; after a failed one no other is begun.

    Use it as a context manager: leaving it waits for all jobs, also after an error of the caller.

    Args:
        name: Of the thread.
        limit: How many jobs may be unfinished: `submit` waits for those before. None for any number.
    """

    def __init__(self, name: str, *, limit: int | None = None) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._room = None if limit is None else threading.Semaphore(limit)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def __enter__(self) -> Background:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._jobs.put(None)
        self._thread.join()
        if error is None:
            self._raise()

    def submit(self, job: Callable[[], None]) -> None:
        """Do `job` after those before it.

        Raises whatever an earlier job has raised.
        """
        if self._room is not None:
            self._room.acquire()
        self._raise()
        self._jobs.put(job)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._error is None:
                    job()
            except BaseException as error:  # noqa: BLE001  it is raised again where the jobs come from
                self._error = error
            del job  # with all that it holds
            if self._room is not None:
                self._room.release()
