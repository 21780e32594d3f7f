"""Write finished parts while the next one is computed; a part counts once its bytes are on the disk.

Two threads: one writes, the other waits for the disk and then tells the journal. A killed run loses what they had not
come to; it never counts on bytes that may be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType

import torch

from trtbuild.compress.background import Background
from trtbuild.compress.journal import Journal
from trtbuild.compress.shards import ShardWriter, Written
from trtbuild.compress.states import States


@dataclass(frozen=True, slots=True)
class Part:
    """One finished part.

    Args:
        write: Writes its tensors.
        found: What the journal keeps of it beside the tensors.
        behind: States that must be on the disk with it.
        spent: States that are of no more use then.
        told: Called at the end.
    """

    write: Callable[[ShardWriter], None]
    found: Mapping[str, object] = field(default_factory=dict)
    behind: Iterable[States] = ()
    spent: Iterable[States] = ()
    told: Callable[[], None] | None = None


class Storing:
    """Takes parts in their order; leaving the context waits for all of them.

    Args:
        journal: Told about every part.
        writer: Used by nobody else meanwhile.
    """

    def __init__(self, journal: Journal, writer: ShardWriter) -> None:
        self._journal, self._writer = journal, writer
        self._stack = ExitStack()
        self._syncing = Background("sync")
        self._writing = Background("write", limit=1)  # one part waits in memory while the next is computed

    def __enter__(self) -> Storing:
        self._stack.enter_context(self._syncing)
        self._stack.enter_context(self._writing)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def take(self, part: Part) -> None:
        """Store `part` behind those before it.

        Raises whatever went wrong with an earlier one.
        """
        self._writing.submit(lambda: self._write(part))

    def _write(self, part: Part) -> None:
        done = len(self._writer.written)
        part.write(self._writer)
        new = self._writer.written[done:]
        found, behind, spent, told = part.found, part.behind, part.spent, part.told  # not the tensors
        self._syncing.submit(lambda: self._finish(new, Part(_nothing, found, behind, spent, told)))

    def _finish(self, new: list[Written], part: Part) -> None:
        self._writer.sync(item.shard for item in new)
        for states in part.behind:
            states.sync()
        self._journal.finish({**part.found, "tensors": [item.to_json() for item in new]})
        for states in part.spent:
            states.discard()
        if part.told is not None:
            part.told()


def of_tensors(tensors: Mapping[str, torch.Tensor]) -> Callable[[ShardWriter], None]:
    """What writes whole tensors; those on a GPU as soon as it has computed them, beside what it computes next."""
    if not any(tensor.is_cuda for tensor in tensors.values()):
        return lambda writer: writer.append_all(tensors)
    ready = torch.cuda.current_stream().record_event()

    def write(writer: ShardWriter) -> None:
        stream = torch.cuda.Stream()
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            writer.append_all(tensors)

    return write


def _nothing(writer: ShardWriter) -> None:
    pass
