"""Import ModelOpt when it is needed, and keep Python's collector quick beside it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from trtbuild.compress.request import Request


def import_libraries(request: Request) -> None:
    """Import ModelOpt, which takes seconds; a caller with other threads lets them work meanwhile."""
    if request.quantized:
        import modelopt.torch.export
        import modelopt.torch.quantization
    if request.sparse:
        import modelopt.torch.sparsity  # noqa: F401


@contextmanager
def quick_collection() -> Iterator[None]:
    """While open, the collector leaves alone what was there before: libraries, which take a tenth of a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
