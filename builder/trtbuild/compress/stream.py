"""Compress one decoder layer at a time: memory does not grow with depth, and a killed run goes on where it was.

A layer is read, the calibration states run through it, ModelOpt prunes and quantizes it as a model with this layer
alone, its tensors are appended to the output's files, and it is freed. Every part (first what lies outside the layers,
then each layer) ends with a line in the journal; a run that finds a journal of the same key begins behind it.

What a layer gets is what it gets in the whole model: ModelOpt calibrates on the activations of the model that is not
yet quantized, and each layer's numbers depend on its own inputs and weights alone.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from trtbuild.compress.blocks import rounded_type
from trtbuild.compress.calibrate import tally_experts
from trtbuild.compress.journal import Journal
from trtbuild.compress.metadata import write_metadata
from trtbuild.compress.passes import LayerLoop
from trtbuild.compress.request import Meter, Request
from trtbuild.compress.selection import Selection
from trtbuild.compress.shards import ShardWriter, Written, place_files, reserved_bytes
from trtbuild.compress.skeleton import Call, NotStreamableError, Skeleton
from trtbuild.compress.states import States
from trtbuild.compress.whole import SPARSEGPT_PASSES
from trtbuild.errors import ArtifactError, CompatibilityError, RecipeError, ToolError
from trtbuild.weight_formats import needs_text

# Names of a quantized layer's tensors beside its weight and bias are at most this long; there are at most five.
_SCALES = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "k_scale")
_ORIGINAL, _PRUNED, _CACHED = "original", "pruned", "cached"


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
    """

    request: Request
    skeleton: Skeleton
    selection: Selection
    samples: Sequence[Sequence[int]]
    work: Path
    key: str
    meter: Meter
    keep_states: bool = True  # hold the hidden states in memory too
    idle: list[str] = field(default_factory=list)
    experts: dict[str, list[int]] = field(default_factory=dict)  # calibration tokens, by the name of the experts module
    resumed: int = 0  # decoder layers that an earlier run had finished
    _calls: Mapping[int, Sequence[Call]] = field(default_factory=dict)
    _shape: tuple[int, ...] = ()
    _journal: Journal | None = None
    _known: dict[Path, States] = field(default_factory=dict)

    def prepare(self) -> None:
        """Find out what the layers are called with, and store the states before the first.

        Raises:
            NotStreamableError: This model cannot be compressed layer by layer; nothing was written to the output.
        """
        self.skeleton.refuse_outer(self.selection)
        self.work.mkdir(parents=True, exist_ok=True)
        self._journal = self._open_journal()
        first = not self._journal.parts
        longest = max(map(len, self.samples), default=0)
        one_of_each = list({len(sample): sample for sample in self.samples}.values())

        def take(index: int, hidden: torch.Tensor) -> None:
            self._shape = (1, longest, hidden.shape[2])
            if first:
                for stream in self._streams():
                    self._states(stream, 0).put(index, hidden)

        try:
            self._calls = self.skeleton.probe(self.samples if first else one_of_each, take)
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
                if not journal.parts:
                    self._outer(journal, writer)
                self.resumed = len(journal.parts) - 1
                for index in range(self.skeleton.depth):
                    if index < self.resumed:
                        self.skeleton.skip(index)
                    else:
                        self._layer(index, journal, writer)
                        gc.collect()  # ModelOpt's modules refer to themselves
                files = writer.seal()
            place_files(self.request.output, files, writer.written)
            self.idle += [name for part in journal.parts for name in part.get("idle", [])]
            self.experts |= {name: seen for part in journal.parts for name, seen in part.get("experts", {}).items()}
            self._configure(journal)

    def _open_journal(self) -> Journal:
        """The journal, empty unless all that it counts on is there."""
        journal = Journal(self.work, self.key)
        if not self._intact(journal):
            for path in self.work.iterdir():
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
        states = [self._states_path(stream, len(journal.parts) - 1) for stream in self._streams()]
        if len(journal.parts) > self.skeleton.depth:
            states = []
        return all(path.is_file() and path.stat().st_size >= end for path, end in files) and all(
            path.is_file() for path in states
        )

    def _room(self) -> int:
        names = [part.info.name for part in self.skeleton.parts.values()]
        names += [f"{disk}.{scale}" for disk in self.selection.compressed.values() for scale in _SCALES]
        names += [
            f"{self.skeleton.name_of(index)}.self_attn.k_proj.v_scale" for index in range(self.skeleton.depth)
        ] * 2
        return reserved_bytes(names)

    def _streams(self) -> tuple[str, ...]:
        """The kinds of states that go from layer to layer, each in the order of its use."""
        original = self.request.sparse and self.request.sparsity_method == "sparsegpt"
        return (() if not self.samples or not original else (_ORIGINAL,)) + self._quantized_streams()

    def _quantized_streams(self) -> tuple[str, ...]:
        """The states that calibration runs on: of the pruned model, and of the same with its KV cache rounded.

        ModelOpt's AWQ rounds the KV cache in its second pass, as the first has calibrated it.
        """
        from trtbuild.compress.quantize import passes

        if not self.samples or not needs_text(self.request.format, self.request.kv_cache):
            return ()
        cached = self.request.kv_cache != "none" and len(passes(self.request)) > 1
        return (_PRUNED, _CACHED) if cached else (_PRUNED,)

    def _states(self, stream: str, index: int) -> States:
        """The states before decoder layer `index`."""
        path = self._states_path(stream, index)
        if path not in self._known:
            kind = torch.float32 if self.skeleton.device.type == "cpu" else torch.bfloat16
            lengths = [len(sample) for sample in self.samples]
            self._known[path] = States(path, self._shape, kind, self.keep_states, lengths)
        return self._known[path]

    def _states_path(self, stream: str, index: int) -> Path:
        return self.work / f"states-{stream}-{index}"

    def _outer(self, journal: Journal, writer: ShardWriter) -> None:
        self.meter.advance(0, "write the checkpoint: embeddings")
        parts = {part.info.name: part.info for part in self.skeleton.outer_parts().values()}
        for name in sorted(parts, key=lambda name: (-rounded_type(parts[name]).itemsize, name)):
            info = parts[name]
            writer.append(name, rounded_type(info), info.shape, self.skeleton.blocks.rounded(info))
        self._finish(journal, writer, 0, {})

    def _layer(self, index: int, journal: Journal, writer: ShardWriter) -> None:
        done = len(writer.written)
        name = self.skeleton.name_of(index)
        frame, layer = self.skeleton.frame(index)
        selection = self.selection.within(self.skeleton.prefix, index)
        idle: list[str] = []
        found: dict[str, object] = {}
        with tally_experts(layer, name, sum(map(len, self.samples))) as seen:
            if self.request.sparse:
                idle += self._sparsify(index, frame, layer, selection)
            if self.request.quantized:
                idle += self._quantize(index, frame, layer, selection)
        if self.request.quantized:
            from trtbuild.compress.export import export_frame

            self.meter.advance(0, f"write the checkpoint: layer {index + 1} of {self.skeleton.depth}")
            with torch.no_grad():
                exported = export_frame(frame, name, self.request)
            tensors = exported.tensors
            found = {"layers": exported.layers, "kv_cache": exported.kv_cache}
        else:
            self.meter.advance(0, f"write the checkpoint: layer {index + 1} of {self.skeleton.depth}")
            tensors = self._plain(name, layer)
        writer.append_all(tensors)
        self._finish(journal, writer, done, found | {"idle": idle, "experts": seen})
        for stream in self._streams():
            self._states(stream, index).discard()
            del self._known[self._states_path(stream, index)]
        self.meter.advance(1, f"layer {index + 1} of {self.skeleton.depth} is done")

    def _sparsify(self, index: int, frame: nn.Module, layer: nn.Module, selection: Selection) -> list[str]:
        from trtbuild.compress import sparsify

        if self.request.sparsity_method != "sparsegpt":
            return sparsify.sparsify(frame, selection, self.request, None)
        loop = self._loop(index, layer, (_ORIGINAL,), SPARSEGPT_PASSES)
        idle = sparsify.sparsify(frame, selection, self.request, loop)
        loop.finish()
        return idle

    def _quantize(self, index: int, frame: nn.Module, layer: nn.Module, selection: Selection) -> list[str]:
        from trtbuild.compress.quantize import passes, quantize

        streams = self._quantized_streams()
        loop = self._loop(index, layer, streams, passes(self.request)) if streams else None
        idle = quantize(frame, selection, self.request, loop, layers=1)
        if loop is not None:
            loop.finish()
        return idle

    def _loop(
        self, index: int, layer: nn.Module, streams: Sequence[str], passes: Sequence[tuple[str, int]]
    ) -> LayerLoop:
        last = index + 1 == self.skeleton.depth
        return LayerLoop(
            layer=layer,
            name=self.skeleton.name_of(index),
            calls={length: calls[index] for length, calls in self._calls.items()},
            states=[
                (self._states(stream, index), None if last else self._states(stream, index + 1)) for stream in streams
            ],
            count=len(self.samples),
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

    def _finish(self, journal: Journal, writer: ShardWriter, done: int, found: dict[str, object]) -> None:
        writer.sync()
        index = len(journal.parts)
        if index < self.skeleton.depth:
            for stream in self._streams():
                self._states(stream, index).sync()
        journal.finish(found | {"tensors": [item.to_json() for item in writer.written[done:]]})

    def _configure(self, journal: Journal) -> None:
        if not self.request.quantized:
            write_metadata(self.request, None)
            return
        from trtbuild.compress.export import write_config

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
