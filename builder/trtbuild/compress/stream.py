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
from pathlib import Path

import torch
from torch import nn

from trtbuild.compress import folding
from trtbuild.compress.auto import AUTO_FILE
from trtbuild.compress.blocks import rounded_type
from trtbuild.compress.codings import SECTIONS
from trtbuild.compress.compressed_tensors import write_compressed_config
from trtbuild.compress.direct import Direct, is_direct
from trtbuild.compress.journal import Journal
from trtbuild.compress.layer_export import export_layer
from trtbuild.compress.libraries import import_libraries, quick_collection
from trtbuild.compress.metadata import write_metadata
from trtbuild.compress.passes import LayerLoop
from trtbuild.compress.reading import LayerReader
from trtbuild.compress.request import Meter, Request
from trtbuild.compress.selection import Selection
from trtbuild.compress.shards import ShardWriter, Written, place_files, reserved_bytes
from trtbuild.compress.skeleton import Call, NotStreamableError, Skeleton
from trtbuild.compress.solve import Solved
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
    """

    request: Request
    skeleton: Skeleton
    selection: Selection
    samples: Sequence[Sequence[int]]
    work: Path
    key: str
    meter: Meter
    states: StatesBetween
    batch: int = 1  # samples that run at once
    ahead: bool = True  # read the next layer while one is computed
    idle: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)  # of every layer that SparseGPT or GPTQ changed
    unsmoothed: list[str] = field(default_factory=list)  # by names in files; in the form of compressed-tensors
    resumed: int = 0  # decoder layers that an earlier run had finished
    _calls: Mapping[int, Sequence[Call]] = field(default_factory=dict)
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
        samples = self.samples if first else self.samples[:1]

        def take(index: int, hidden: torch.Tensor) -> None:
            self.states.shape = tuple(hidden.shape)
            if first:
                for states in self.states.all_before(0):
                    states.put(index, hidden)

        count = len(self.samples)
        sizes = sorted({min(self.batch, count), count % self.batch} - {0})
        try:
            self._calls = self.skeleton.probe(samples, take, sizes)
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
            self.idle += [name for part in journal.parts for name in part.get("idle", [])]
            self.errors |= {name: error for part in journal.parts for name, error in part.get("errors", {}).items()}
            self.unsmoothed += [name for part in journal.parts for name in part.get("unsmoothed", [])]
            self._configure(journal)

    def _straight(self, direct: Direct, journal: Journal, storing: Storing) -> None:
        """All that is not finished, without loading a layer."""
        if not journal.parts:
            self.meter.advance(0, "write the checkpoint: embeddings")
            storing.take(Part(direct.outer()))
        for index in range(self.resumed, self.skeleton.depth):
            write, layers = direct.layer(index)
            self.meter.advance(0, f"write the checkpoint: layer {index + 1} of {self.skeleton.depth}")
            storing.take(Part(write, {"layers": layers, "kv_cache": None, "idle": []}, told=self._teller(index)))

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
        idle, errors = self._change(index, frame, layer, selection)
        self.meter.advance(0, f"write the checkpoint: layer {index + 1} of {self.skeleton.depth}")
        found: dict[str, object] = {}
        if self.request.quantized:
            tensors, found = export_layer(frame, name, selection, folds)
        else:
            tensors = self._plain(name, layer)
        storing.take(
            Part(
                of_tensors(tensors),
                found | {"idle": idle, "errors": errors},
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

    def _change(
        self, index: int, frame: nn.Module, layer: nn.Module, selection: Selection
    ) -> tuple[list[str], dict[str, float]]:
        """Prune and quantize one layer, and store the states behind it.

        Return the experts that no token reached, and what pruning and rounding by Hessians cost every linear layer.
        """
        from trtbuild.compress import sparsify

        solved, idle = Solved(), []
        if self.request.sparse and self.request.sparsity_method == "magnitude":
            sparsify.sparsify_by_magnitude(frame, selection)
        if self.request.by_hessians and not self.request.joint:
            run = self._loop(index, layer, sparsify.PASSES[:1], kept=False)
            solved = sparsify.sparsify_by_hessians(frame, selection, run, [self.skeleton.name_of(index)])
            if not self.request.reads_text:
                self._store(index, layer)
        if self.request.solved:
            from trtbuild.compress.gptq import quantize_by_gptq
            from trtbuild.compress.quantize import GPTQ_PASSES

            run = self._loop(index, layer, GPTQ_PASSES[:1], kept=False)
            parts = [self.skeleton.name_of(index)]
            solved = quantize_by_gptq(frame, selection, self.request, run, layers=1, parts=parts)
            self._store(index, layer)
        elif self.request.quantized:
            idle = self._quantize(index, frame, layer, selection)
        errors = {selection.compressed[name]: error for name, error in solved.errors.items()}
        return idle + sparsify.experts_of(solved.idle), errors

    def _store(self, index: int, layer: nn.Module) -> None:
        """Store the states behind a layer as it is now; where ModelOpt calibrates afterwards, its first pass does."""
        from trtbuild.compress import sparsify

        if not self._last(index):
            self._loop(index, layer, sparsify.PASSES[1:]).finish()

    def _quantize(self, index: int, frame: nn.Module, layer: nn.Module, selection: Selection) -> list[str]:
        from trtbuild.compress.mixed import layer_passes, quantize_layers

        steps = layer_passes(self.request, selection) if self.request.reads_text else ()
        loop = self._loop(index, layer, steps) if steps else None
        idle = quantize_layers(frame, selection, self.request, loop, layers=1)
        if loop is not None:
            loop.finish()
        return idle

    def _loop(self, index: int, layer: nn.Module, passes: Sequence[tuple[str, int]], *, kept: bool = True) -> LayerLoop:
        """What runs the samples through a layer; `kept` says whether the states behind it are stored."""
        kept = kept and not self._last(index)
        return LayerLoop(
            layer=layer,
            name=self.skeleton.name_of(index),
            calls={size: calls[index] for size, calls in self._calls.items()},
            states=[
                (self.states.before(kind, index), self.states.before(kind, index + 1) if kept else None)
                for kind in self.states.kinds
            ],
            count=len(self.samples),
            batch=self.batch,
            device=self.skeleton.device,
            passes=passes,
            meter=self.meter,
            where=f"layer {index + 1} of {self.skeleton.depth}",
        )

    def _plain(self, name: str, layer: nn.Module) -> dict[str, torch.Tensor]:
        """The layer's tensors by their names in files, in the types in which they are kept."""
        tensors = {}
        for leaf, value in layer.state_dict().items():
            info = self.skeleton.parts[f"{name}.{leaf}"].info
            if info.name in tensors or info.elements != value.numel():
                raise CompatibilityError(
                    f"{info.name} holds all experts of a layer, which 2:4 without a format cannot write yet",
                    "choose a compress.format too",
                )
            tensors[info.name] = value.to(rounded_type(info))
        return tensors

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
