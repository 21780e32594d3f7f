"""Threads that compute beside each other instead of sharing PyTorch's own."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

WORKERS = min(os.cpu_count() or 1, 8)


@contextmanager
def workers(count: int = WORKERS) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads leave PyTorch's own threads alone: each computes by itself.

    PyTorch remembers the number that was set last for threads that start later; the caller's stays as it was.
    """
    threads, ready = torch.get_num_threads(), threading.Barrier(count + 1)

    def alone() -> None:
        torch.set_num_threads(1)
        ready.wait()

    with ThreadPoolExecutor(count, thread_name_prefix="work") as pool:
        for _ in range(count):
            pool.submit(alone)
        ready.wait()
        torch.set_num_threads(threads)
        yield pool
