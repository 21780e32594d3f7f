"""A disk that fills up during a training, as a sentence."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from trtbuild.errors import HostError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_LEAST = 1 << 20  # bytes; torch and safetensors have error classes of their own for a write that failed


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Raise a HostError in the place of any error that a full disk below `place` has caused."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = getattr(error, "errno", None) in _FULL or shutil.disk_usage(place).free < _LEAST
        if not full:
            raise
        raise HostError(
            f"{place}: the disk is full", "free space there or move the store; the next run goes on where this one was"
        ) from error
