"""Quantize weights straight from file to file where a format needs nothing else: no ModelOpt, no layer in memory.

Threads take a few rows each: read, find the scales, compute the codes, write them where they belong. What comes out is
what ModelOpt makes of the same weights, byte for byte (`codings`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from trtbuild.compress.blocks import TORCH_TYPES, TensorBlocks, rounded_type
from trtbuild.compress.codings import CODINGS, SOURCE_TYPES, Coding, NotFiniteError
from trtbuild.compress.request import Request
from trtbuild.compress.selection import Selection
from trtbuild.compress.shards import ShardWriter, Slot
from trtbuild.compress.skeleton import Skeleton
from trtbuild.errors import ArtifactError
from trtbuild.runtime.experts import UnfusedExperts
from trtbuild.safetensors_header import TensorInfo
from trtbuild.weight_formats import WEIGHT_FORMATS

_BLOCK_ELEMENTS = 1 << 18  # their bf16, float32 and coded forms fit in a core's cache
_COPIED_ELEMENTS = 1 << 23


@dataclass(frozen=True, slots=True)
class _Output:
    """One tensor to write: copied from `info`, or its codes; `scale_of` says whose scales it holds."""

    kind: torch.dtype
    shape: tuple[int, ...]
    info: TensorInfo | None
    coded: bool = False
    scale_of: str | None = None


class Direct:
    """Writes parts of a checkpoint without loading them.

    Args:
        skeleton: Knows the layers and where their tensors lie.
        selection: Which layers are coded.
        request: Says the format.
        pool: Threads that do the work.
    """

    def __init__(self, skeleton: Skeleton, selection: Selection, request: Request, pool: ThreadPoolExecutor) -> None:
        self._skeleton, self._selection, self._pool = skeleton, selection, pool
        self._coding = CODINGS[request.format]
        infos = {part.info.name: part.info for part in skeleton.parts.values()}
        self._raw = TensorBlocks(request.source, infos, finite=False)  # the coding finds what is not finite
        self._own = threading.local()

    def outer(self) -> Callable[[ShardWriter], None]:
        """What writes everything outside the decoder layers."""
        infos = {part.info.name: part.info for part in self._skeleton.outer_parts().values()}
        return self._writing({name: _copied(info) for name, info in infos.items()})

    def layer(self, index: int) -> tuple[Callable[[ShardWriter], None], dict[str, object]]:
        """What writes a decoder layer, and its formats as ModelOpt's exporter would collect them."""
        outputs: dict[str, _Output] = {}
        layers: dict[str, object] = {}
        name = self._skeleton.name_of(index)
        for leaf, (part, _) in self._skeleton.wanted(index).items():
            module = f"{name}.{leaf}".removesuffix(".weight")
            disk = self._selection.compressed.get(module) if leaf.endswith(".weight") else None
            if disk is None:
                outputs[part.info.name] = _copied(part.info)
            else:
                out, into = part.info.shape
                shape = self._coding.scale_shape(out, into)
                outputs[f"{disk}.weight"] = _Output(self._coding.kind, (out, into), part.info, coded=True)
                outputs[f"{disk}.weight_scale"] = _Output(
                    self._coding.scale_kind, shape, None, scale_of=f"{disk}.weight"
                )
            if disk is not None or module in self._selection.excluded:
                algorithm, group = self._coding.algorithm if disk is not None else (None, 0)
                layers |= {f"{module}.quantization": algorithm, f"{module}.awq_block_size": group}
        return self._writing(outputs), layers

    def _writing(self, outputs: Mapping[str, _Output]) -> Callable[[ShardWriter], None]:
        def write(writer: ShardWriter) -> None:
            slots = {}
            for name in sorted(outputs, key=lambda name: (-outputs[name].kind.itemsize, name)):
                slots[name] = writer.reserve(name, outputs[name].kind, outputs[name].shape)
            pieces: dict[str, list[Future[torch.Tensor | None]]] = {}
            for name, output in outputs.items():
                if output.info is not None:
                    pieces[name] = list(self._pieces(output, slots[name]))
            scales = {name: [piece.result() for piece in found] for name, found in pieces.items()}
            for name, output in outputs.items():
                if output.scale_of is not None:
                    parts = [scale for scale in scales[output.scale_of] if scale is not None]
                    slots[name].write(torch.cat(parts), 0)

        return write

    def _pieces(self, output: _Output, slot: Slot) -> Iterator[Future[torch.Tensor | None]]:
        info = output.info
        if info is None:
            return
        if not output.coded:
            for first in range(0, info.elements, _COPIED_ELEMENTS):
                count = min(_COPIED_ELEMENTS, info.elements - first)
                yield self._pool.submit(self._copy, info, slot, first, count)
            return
        out, into = output.shape
        unit = self._coding.rows
        rows = max(_BLOCK_ELEMENTS // into // unit, 1) * unit
        for first in range(0, out, rows):
            yield self._pool.submit(self._code, self._coding, info, slot, first, min(rows, out - first))

    def _copy(self, info: TensorInfo, slot: Slot, first: int, count: int) -> None:
        for block in self._skeleton.blocks.blocks(info, first, count):
            slot.write(block.to(rounded_type(info)), first)
            first += block.numel()

    def _code(self, coding: Coding, info: TensorInfo, slot: Slot, first: int, rows: int) -> torch.Tensor:
        into = info.shape[1]
        kind = TORCH_TYPES[info.dtype]
        block = self._buffer("block", rows * into, kind).view(rows, into)
        wide = self._buffer("wide", rows * into, torch.float32).view(rows, into)
        codes = self._buffer("codes", rows * into, coding.kind).view(rows, into)
        self._raw.read(info, block, first * into)
        try:
            scale = coding.code(block, wide, codes)
        except NotFiniteError as error:
            raise ArtifactError(
                f"{self._raw.directory}: {info.name} holds NaN or infinite values", "use an undamaged checkpoint"
            ) from error
        slot.write(codes.view(-1), first * into)
        return scale

    def _buffer(self, name: str, count: int, kind: torch.dtype) -> torch.Tensor:
        """This thread's buffer of a name, large enough."""
        size = count * kind.itemsize
        buffer: torch.Tensor | None = getattr(self._own, name, None)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.uint8)
            setattr(self._own, name, buffer)
        return buffer[:size].view(kind)


def is_direct(skeleton: Skeleton, selection: Selection, request: Request) -> bool:
    """Whether this compression needs nothing but each weight by itself."""
    # ModelOpt gives the gate and up projections of an expert common ranges, where the format has ranges.
    joined = WEIGHT_FORMATS[request.format].weight_range if request.format in CODINGS else False
    if joined and any(isinstance(module, UnfusedExperts) for module in skeleton.model.modules()):
        return False
    weights = [skeleton.parts[f"{name}.weight"] for name in selection.compressed]
    return (
        request.format in CODINGS
        and request.checkpoint == "modelopt"
        and not request.mixed
        and selection.formats.keys() == selection.compressed.keys()
        and request.kv_cache == "none"
        and not request.sparse
        and all(part.is_whole(skeleton.slot(place)) for place, part in skeleton.parts.items())
        and all(TORCH_TYPES[part.info.dtype] in SOURCE_TYPES for part in weights)
    )


def _copied(info: TensorInfo) -> _Output:
    return _Output(rounded_type(info), info.shape, info)
