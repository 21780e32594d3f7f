"""The room on the disk that a compression needs, and what is said when there is none."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from trtbuild.compress.request import Request
from trtbuild.errors import HostError
from trtbuild.model import ModelFacts
from trtbuild.weight_formats import file_bits

_MIN_FREE = 16 << 20  # room for config and tokenizer files beside the tensors


def expected_bytes(request: Request, facts: ModelFacts) -> int:
    """A little more than the output will take."""
    bits = max((file_bits(name, request.group_size) for name in request.formats), default=16.0)
    if request.overrides:
        bits = 16.0  # nobody knows yet what the patterns match
    rest = facts.parameters - facts.linear_parameters
    return int(facts.linear_parameters * bits / 8) + rest * 2 + _MIN_FREE


def refuse_full_disk(request: Request, needed: int) -> None:
    """Raise a HostError where fewer than `needed` bytes are free."""
    free = shutil.disk_usage(request.output).free
    if free < needed:
        raise _disk_full(request, needed, f"{free:,} are free")


@contextmanager
def disk_errors(request: Request, needed: int) -> Iterator[None]:
    """Turn a disk that fills up into a sentence; safetensors reports it as an error class of its own."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT} or "os error 28" in str(error)
        if not full:
            raise
        raise _disk_full(request, needed, "the disk is full") from error


def _disk_full(request: Request, needed: int, state: str) -> HostError:
    done = "layer" if request.quantized or request.sparse else "file"
    goes_on = f"; the next run goes on behind the last finished {done}"
    return HostError(
        f"{request.output}: the compressed checkpoint needs about {needed:,} bytes, {state}",
        f"free space there or move the store{goes_on}",
    )
