"""Compress one decoder layer at a time: memory does not grow with depth, and a killed run goes on where it was.

A layer is read, the calibration states run through it, ModelOpt prunes and quantizes it as a model with this layer
alone, its tensors are appended to the output's files, and it is freed. While one is computed, threads read the next and
write the one before. Every part (first what lies outside the layers, then each layer) ends with a line in the journal
once its bytes are on the disk; a run that finds a journal of the same key begins behind it.

What a layer gets is what it gets in the whole model: ModelOpt calibrates on the activations of the model that is not
yet quantized, and each layer's numbers depend on its own inputs and weights alone. Behind a layer that SparseGPT has
pruned or GPTQ has rounded, the states are those of the pruned or rounded one.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from trtbuild.compress import folding
from trtbuild.compress.auto import AUTO_FILE
from trtbuild.compress.batches import Batch
from trtbuild.compress.blocks import rounded_type
from trtbuild.compress.calibrate import tally_experts
from trtbuild.compress.change import change_layer
from trtbuild.compress.codings import SECTIONS
from trtbuild.compress.compressed_tensors import write_compressed_config
from trtbuild.compress.direct import Direct, is_direct
from trtbuild.compress.journal import Journal
from trtbuild.compress.layer_export import export_layer, plain_tensors
from trtbuild.compress.libraries import import_libraries, quick_collection
from trtbuild.compress.metadata import write_metadata
from trtbuild.compress.passes import LayerLoop
from trtbuild.compress.reading import LayerReader
from trtbuild.compress.request import Meter, Request
from trtbuild.compress.selection import Selection
from trtbuild.compress.shards import ShardWriter, Written, place_files, reserved_bytes
from trtbuild.compress.skeleton import Call, NotStreamableError, Skeleton
from trtbuild.compress.states_between import StatesBetween
from trtbuild.compress.storing import Part, Storing, of_tensors
from trtbuild.compress.threads import workers
from trtbuild.errors import ArtifactError, CompatibilityError, RecipeError, ToolError

# Names of a quantized layer's tensors beside its weight and bias are at most this long; there are at most five.
_SCALES = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "k_scale")


@dataclass(slots=True)
class Stream:
    """One compression, layer by layer.

    Args:
        request: What to do.
        skeleton: The model, probed by `prepare`.
        selection: Which layers are compressed.
        samples: The calibration samples, none if no text goes through the model.
        work: Where the unfinished files lie; on the file system of the output.
        key: Of everything that decides the bytes.
        meter: Told after every layer and sample.
        states: The hidden states of the samples.
        batches: Which samples run at once, in their order.
        ahead: Read the next layer while one is computed.
        errors: What SparseGPT or GPTQ did to the output of every layer that it changed, by names in files.
        unsmoothed: Layers without smoothing, by names in files; in the form of compressed-tensors.
        experts: Calibration tokens, by the name of the experts module.
        resumed: Decoder layers that an earlier run had finished.
    """

    request: Request
    skeleton: Skeleton
    selection: Selection
    samples: Sequence[Sequence[int]]
    work: Path
    key: str
    meter: Meter
    states: StatesBetween
    batches: Sequence[Batch]
    ahead: bool = True
    errors: dict[str, float] = field(default_factory=dict)
    unsmoothed: list[str] = field(default_factory=list)
    experts: dict[str, list[int]] = field(default_factory=dict)
    resumed: int = 0
    _calls: Mapping[tuple[int, int], Sequence[Call]] = field(default_factory=dict)
    _journal: Journal | None = None
    _direct: bool = False

    def prepare(self) -> None:
        """Find out what the layers are called with, and store the states before the first.

        Raises:
            NotStreamableError: This model cannot be compressed layer by layer; nothing was written to the output.
        """
        self.skeleton.refuse_outer(self.selection)
        self.work.mkdir(parents=True, exist_ok=True)
        self._journal = self._open_journal()
        self._direct = is_direct(self.skeleton, self.selection, self.request)
        if self._direct:
            return
        first = self.states.recomputed or not self._journal.parts
        longest = max(map(len, self.samples), default=0)
        one_of_each = list({len(sample): sample for sample in self.samples}.values())

        def take(index: int, hidden: torch.Tensor) -> None:
            self.states.shape = (1, longest, *hidden.shape[2:])
            if first:
                for states in self.states.all_before(0):
                    states.put(index, hidden)

        try:
            shapes = {batch.shape for batch in self.batches}
            self._calls = self.skeleton.probe(self.samples if first else one_of_each, take, shapes)
        except NotStreamableError:
            shutil.rmtree(self.work)
            raise

    def run(self) -> None:
        """Compress every layer that is not finished, and put the checkpoint in place.

        Raises:
            ArtifactError: A tensor holds NaN or infinity; a file disappeared or changed.
            ToolError: ModelOpt failed, or an activation is not finite.
        """
        journal = self._journal
        if journal is None:
            raise RuntimeError("prepare comes first")
        with self._kept_if_useful():
            written = [Written.of_json(item) for part in journal.parts for item in part["tensors"]]
            with ShardWriter(self.work, self._room(), written=written) as writer:
                self.resumed = max(len(journal.parts) - 1, 0)
                with workers() as pool, Storing(journal, writer) as storing:
                    if self._direct:
                        direct = Direct(self.skeleton, self.selection, self.request, pool)
                        self._straight(direct, journal, storing)
                    else:
                        if not journal.parts:
                            self._outer(storing)
                        self._layers(LayerReader(self.skeleton, pool, ahead=self.ahead), storing)
                files = writer.seal()
            place_files(self.request.output, files, writer.written)
            self.errors |= {name: error for part in journal.parts for name, error in part.get("errors", {}).items()}
            self.unsmoothed += [name for part in journal.parts for name in part.get("unsmoothed", [])]
            self.experts |= {name: seen for part in journal.parts for name, seen in part.get("experts", {}).items()}
            self._configure(journal)

    def _straight(self, direct: Direct, journal: Journal, storing: Storing) -> None:
        """All that is not finished, without loading a layer."""
        if not journal.parts:
            self.meter.advance(0, "write the checkpoint: embeddings")
            storing.take(Part(direct.outer()))
        for index in range(self.resumed, self.skeleton.depth):
            write, layers = direct.layer(index)
            self.meter.advance(0, f"write the checkpoint: layer {index + 1} of {self.skeleton.depth}")
            storing.take(Part(write, {"layers": layers, "kv_cache": None}, told=self._teller(index)))

    def _teller(self, index: int) -> Callable[[], None]:
        return lambda: self.meter.advance(1, f"layer {index + 1} of {self.skeleton.depth} is done")

    def _layers(self, reader: LayerReader, storing: Storing) -> None:
        again = self.states.recomputed and self.resumed < self.skeleton.depth
        reader.expect(0 if again else self.resumed)
        import_libraries(self.request)
        with quick_collection():
            for index in range(self.skeleton.depth):
                if index >= self.resumed:
                    self._layer(index, reader, storing)
                    gc.collect()  # ModelOpt's modules refer to themselves
                elif again:
                    self._pass_through(index, reader)
                else:
                    self.skeleton.skip(index)

    def _open_journal(self) -> Journal:
        """The journal, empty unless all that it counts on is there."""
        journal = Journal(self.work, self.key)
        if not self._intact(journal):
            for path in self.work.iterdir():
                if path.name != AUTO_FILE:
                    path.unlink()
            journal = Journal(self.work, self.key)
        return journal

    def _intact(self, journal: Journal) -> bool:
        if not journal.parts:
            return False
        ends: dict[int, int] = {}
        for part in journal.parts:
            ends |= {item[0]: item[5] for item in part["tensors"]}
        files = [(self.work / f"shard-{shard:05d}", end) for shard, end in ends.items()]
        begun = len(journal.parts) - 1
        if begun < self.skeleton.depth and self.states.missing(begun):
            return False
        return all(path.is_file() and path.stat().st_size >= end for path, end in files)

    def _room(self) -> int:
        names = [part.info.name for part in self.skeleton.parts.values()]
        names += [f"{disk}.{scale}" for disk in self.selection.compressed.values() for scale in _SCALES]
        names += [
            f"{self.skeleton.name_of(index)}.self_attn.k_proj.v_scale" for index in range(self.skeleton.depth)
        ] * 2
        return reserved_bytes(names)

    def _outer(self, storing: Storing) -> None:
        self.meter.advance(0, "write the checkpoint: embeddings")
        parts = {part.info.name: part.info for part in self.skeleton.outer_parts().values()}

        def write(writer: ShardWriter) -> None:
            for name in sorted(parts, key=lambda name: (-rounded_type(parts[name]).itemsize, name)):
                info = parts[name]
                writer.append(name, rounded_type(info), info.shape, self.skeleton.blocks.rounded(info))

        storing.take(Part(write, behind=self.states.all_before(0)))

    def _layer(self, index: int, reader: LayerReader, storing: Storing) -> None:
        name = self.skeleton.name_of(index)
        frame, layer = self.skeleton.frame(index, reader.take(index))
        selection = self.selection.within(self.skeleton.prefix, index)
        folds = folding.exact_folds(frame, selection) if self.request.checkpoint == "compressed-tensors" else None
        with tally_experts(layer, name, sum(map(len, self.samples))) as seen:
            loops = partial(self._loop, index, layer)
            errors = change_layer(frame, name, selection, self.request, loops, last=self._last(index))
        self.meter.advance(0, f"write the checkpoint: layer {index + 1} of {self.skeleton.depth}")
        found: dict[str, object] = {}
        if self.request.quantized:
            tensors, found = export_layer(frame, name, selection, folds)
        else:
            tensors = plain_tensors(self.skeleton, name, layer)
        storing.take(
            Part(
                of_tensors(tensors),
                found | {"errors": errors, "experts": seen},
                behind=[] if self._last(index) else self.states.all_before(index + 1),
                spent=self.states.spend(index),
                told=self._teller(index),
            )
        )

    def _pass_through(self, index: int, reader: LayerReader) -> None:
        """Compute the states behind a layer that an earlier run had finished."""
        _, layer = self.skeleton.frame(index, reader.take(index))
        self._loop(index, layer, [("compute again", 0)]).finish()
        self.states.spend(index)

    def _last(self, index: int) -> bool:
        return index + 1 == self.skeleton.depth

    def _loop(self, index: int, layer: nn.Module, passes: Sequence[tuple[str, int]], *, kept: bool = True) -> LayerLoop:
        """What runs the samples through a layer; `kept` says whether the states behind it are stored."""
        kept = kept and not self._last(index)
        return LayerLoop(
            layer=layer,
            name=self.skeleton.name_of(index),
            calls={shape: calls[index] for shape, calls in self._calls.items()},
            states=[
                (self.states.before(kind, index), self.states.before(kind, index + 1) if kept else None)
                for kind in self.states.kinds
            ],
            batches=self.batches,
            device=self.skeleton.device,
            passes=passes,
            meter=self.meter,
            where=f"layer {index + 1} of {self.skeleton.depth}",
        )

    def _configure(self, journal: Journal) -> None:
        if not self.request.quantized:
            write_metadata(self.request, None)
            return
        if self.request.checkpoint == "compressed-tensors":
            write_compressed_config(self.selection, self.request)
            return
        from trtbuild.compress.export import write_config, write_uniform_config

        if self._direct and not self.request.exclude:
            write_uniform_config(SECTIONS[self.request.format], self.selection, self.request)
            return
        layers = {name: value for part in journal.parts for name, value in part.get("layers", {}).items()}
        kv_cache = next((part["kv_cache"] for part in journal.parts if part.get("kv_cache")), None)
        write_config(self.skeleton.model, layers, kv_cache, self.selection, self.request)

    @contextmanager
    def _kept_if_useful(self) -> Iterator[None]:
        """Remove the unfinished files after an error that would come again."""
        try:
            yield
        except (RecipeError, CompatibilityError, ToolError):
            shutil.rmtree(self.work)
            raise
        except ArtifactError:
            if self.skeleton.blocks.unchanged():
                shutil.rmtree(self.work)
            raise
