"""The model without its weights, of which one decoder layer at a time gets storage.

Reading order: `open_skeleton`, `Skeleton.probe` (what the model calls its decoder layers with), `Skeleton.frame` (the
model with one layer that is filled).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trtbuild.compress.blocks import TensorBlocks
from trtbuild.compress.calibrate import forward_arguments, layer_list
from trtbuild.compress.places import Part, locate
from trtbuild.compress.request import Request
from trtbuild.compress.selection import Selection
from trtbuild.errors import ArtifactError
from trtbuild.runtime.checkpoint import empty_model, read_config
from trtbuild.runtime.checkpoint_fill import assign, refuse_unmatched, restore_tables
from trtbuild.runtime.experts import unfuse_experts
from trtbuild.safetensors_header import TensorInfo

_DUMMY = (1, 1)  # two tokens: enough to see which layers share an input


class NotStreamableError(Exception):
    """This model cannot be compressed layer by layer; the message says why."""


class _EnoughError(Exception):
    """The decoder layers have been called; the rest of the model is not needed."""


@dataclass(frozen=True, slots=True)
class Call:
    """What the model calls a decoder layer with beside the hidden state; the same for all batches of one shape."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's output for hidden states [B, T, H]."""
        output = layer(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True, slots=True)
class Probed:
    """The hidden states before the first layer, and what every layer is called with."""

    hidden: torch.Tensor
    calls: tuple[Call, ...]


class _Probe(nn.Module):
    """Stands for a decoder layer: notes what it is called with and hands the hidden state on unchanged."""

    def __init__(self, layer: nn.Module, calls: list[tuple[torch.Tensor, Call]], number: int) -> None:
        super().__init__()
        self.__dict__.update(_layer=layer, _calls=calls, _number=number)  # not as submodules

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)  # such as the kind of its attention

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the hidden state, or stop the model behind the last layer."""
        hidden: torch.Tensor = args[0] if args else kwargs.pop("hidden_states")
        self._calls.append((hidden, Call(args[1:], kwargs)))
        if len(self._calls) == self._number:
            raise _EnoughError
        return hidden


class Skeleton:
    """A model whose tensors are all on the meta device; its decoder layers are taken out when it is probed.

    Args:
        model: The class, experts unfused.
        prefix: Name of the list of decoder layers, such as "model.layers".
        parts: For every tensor of the model that the files have, where it lies.
        blocks: Reads the files.
        device: Where layers are filled and run.
    """

    def __init__(
        self, model: nn.Module, prefix: str, parts: Mapping[str, Part], blocks: TensorBlocks, device: torch.device
    ) -> None:
        self.model, self.prefix, self.parts, self.blocks, self.device = model, prefix, parts, blocks, device
        self._layers: list[nn.Module | None] = list(model.get_submodule(prefix).children())
        self._slots = model.state_dict(keep_vars=True)
        self._dummy: Probed | None = None

    @property
    def depth(self) -> int:
        """The number of decoder layers."""
        return len(self._layers)

    def name_of(self, index: int) -> str:
        """The name of a decoder layer in the model."""
        return f"{self.prefix}.{index}"

    def slot(self, place: str) -> torch.Tensor:
        """The tensor of the model, without storage, that a part of the files belongs to."""
        return self._slots[place]

    def outer_parts(self) -> dict[str, Part]:
        """What the files hold of the model outside its decoder layers: embeddings, the last norm, the output layer."""
        return {place: part for place, part in self.parts.items() if not place.startswith(f"{self.prefix}.")}

    def refuse_outer(self, selection: Selection) -> None:
        """Raise if a layer that is to be compressed is no part of a decoder layer.

        Raises:
            NotStreamableError: Names the layer.
        """
        outside = [name for name in selection.compressed if not name.startswith(f"{self.prefix}.")]
        if outside:
            raise NotStreamableError(f"{outside[0]} lies outside the decoder layers")

    def probe(
        self,
        samples: Sequence[Sequence[int]],
        take: Callable[[int, torch.Tensor], None],
        shapes: Iterable[tuple[int, int]],
    ) -> dict[tuple[int, int], tuple[Call, ...]]:
        """Find what the layers are called with; `take` gets each sample's hidden state before the first layer.

        Returns the layers' calls for batches of each of `shapes` (samples, tokens); `samples` has all these lengths.

        Raises:
            NotStreamableError: The model does more between its layers than handing the hidden state on.
        """
        self._put_layers(nn.ModuleList())
        self._fill_outer({token for sample in samples for token in sample} | set(_DUMMY))
        self._dummy = self._calls([_DUMMY])
        of_length = {len(sample): sample for sample in samples}
        found = {shape: self._calls([of_length[shape[1]]] * shape[0]).calls for shape in sorted(set(shapes))}
        for index, sample in enumerate(samples):
            take(index, self._run_probes([sample], 1)[0][0])
        self._put_layers(nn.ModuleList())
        self.model.to("meta")
        return found

    def wanted(self, index: int) -> dict[str, tuple[Part, torch.Tensor]]:
        """The tensors of decoder layer `index` by their names in it: where each lies, and its slot."""
        layer = self._layers[index]
        if layer is None:
            raise RuntimeError(f"layer {index} was taken before")
        slots = layer.state_dict(keep_vars=True)
        return {name: (self.parts[f"{self.name_of(index)}.{name}"], slot) for name, slot in slots.items()}

    def frame(self, index: int, values: dict[str, torch.Tensor]) -> tuple[nn.Module, nn.Module]:
        """Return (model, layer): the model with nothing but one decoder layer, under its own name and filled.

        A frame is given once: it is spoiled by what ModelOpt does to it.

        Args:
            index: Of the layer.
            values: Its tensors by their names in it, of any type; they are taken out, to be freed.
        """
        layer, self._layers[index] = self._layers[index], None
        if layer is None or self._dummy is None:
            raise RuntimeError(f"layer {index} was taken before, or the model was not probed")
        # Copies, so that the collector, which leaves alone what is older than the work, frees what ModelOpt ties up.
        frame, layer = copy.deepcopy(self.model), copy.deepcopy(layer)
        frame.get_submodule(self.prefix).add_module(str(index), layer)
        with torch.no_grad():
            for name, slot in layer.state_dict(keep_vars=True).items():
                assign(layer, name, slot, values.pop(name).to(slot.dtype))
            restore_tables(frame, layer.modules(), self.device)
        hidden, call = self._dummy.hidden, self._dummy.calls[index]
        # ModelOpt's exporter runs the model once to see which linear layers share an input; it asks for these.
        frame.get_dummy_inputs = dict
        frame.forward = lambda: call.run(layer, hidden)
        return frame, layer

    def skip(self, index: int) -> None:
        """Drop a layer that an earlier run has finished."""
        self._layers[index] = None

    def _read(self, part: Part, slot: torch.Tensor) -> torch.Tensor:
        value = torch.empty(slot.shape, dtype=slot.dtype, device=self.device)
        self.blocks.read(part.info, value, part.first)
        return value

    def _fill_outer(self, tokens: set[int]) -> None:
        """Give storage to what runs before the first layer; of the embeddings to the rows of `tokens` alone.

        The table has its whole size, but pages that nobody touches take no memory.
        """
        embeddings, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        for owner, module in self.model.named_modules():
            if module is head and module is not embeddings:
                continue
            for leaf, slot in _own_state(module):
                part = self.parts.get(f"{owner}.{leaf}" if owner else leaf)
                if part is None:
                    continue
                if module is embeddings and slot.dim() == 2:
                    value = torch.empty(slot.shape, dtype=slot.dtype, device=self.device)
                    for token in sorted(tokens):
                        self.blocks.read(part.info, value[token], part.first + token * slot.shape[1])
                else:
                    value = self._read(part, slot)
                assign(module, leaf, slot, value)
        restore_tables(self.model, self.model.modules(), self.device)

    def _calls(self, samples: Sequence[Sequence[int]]) -> Probed:
        calls = self._run_probes(samples, self.depth)
        strange = [index for index, (hidden, _) in enumerate(calls) if hidden is not calls[0][0]]
        if strange or len(calls) != self.depth:
            raise NotStreamableError(
                f"{type(self.model).__name__} does more between its decoder layers than handing the hidden state on"
            )
        return Probed(calls[0][0], tuple(call for _, call in calls))

    def _run_probes(self, samples: Sequence[Sequence[int]], number: int) -> list[tuple[torch.Tensor, Call]]:
        """Run the model with probes in place of its layers, up to the call of layer `number`."""
        calls: list[tuple[torch.Tensor, Call]] = []
        self._put_layers(nn.ModuleList(_Probe(layer, calls, number) for layer in self._layers if layer is not None))
        ids = torch.tensor([list(sample) for sample in samples], device=self.device)
        try:
            with torch.no_grad():
                self.model(input_ids=ids, **forward_arguments(self.model))
        except _EnoughError:
            pass
        except (TypeError, IndexError, AttributeError, ValueError, RuntimeError) as error:
            raise NotStreamableError(
                f"{type(self.model).__name__} does not run without its decoder layers ({error})"
            ) from error
        return calls

    def _put_layers(self, layers: nn.ModuleList) -> None:
        self.model.set_submodule(self.prefix, layers)


def open_skeleton(request: Request, source: Mapping[str, TensorInfo], device: torch.device) -> Skeleton:
    """The model of the request's source, in float32 on a CPU (three times faster there than bf16), else bf16.

    Raises:
        ArtifactError: A tensor is missing, unexpected or of a wrong shape.
        CompatibilityError: An architecture that cannot be built, or experts that cannot be separated.
        NotStreamableError: The class has no list of decoder layers.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    config = read_config(request.source, trust_remote_code=request.trust_remote_code)
    model = empty_model(config, dtype, "sdpa", trust_remote_code=request.trust_remote_code)
    unfuse_experts(model)
    model.requires_grad_(requires_grad=False).eval()
    found = layer_list(model)
    if found is None:
        raise NotStreamableError(f"{type(model).__name__} has no list of {config.num_hidden_layers} decoder layers")
    parts, extra = locate(model, source)
    tied = set(model.all_tied_weights_keys)
    missing = []
    for place, slot in model.state_dict(keep_vars=True).items():
        part = parts.get(place)
        if part is None:
            missing += [] if place in tied else [place]
        elif not part.fits(slot):
            raise ArtifactError(
                f"{place}: shape {list(part.info.shape)} in the files, {list(slot.shape)} in the model",
                "use the model's original files",
            )
    refuse_unmatched(model, missing, extra)
    blocks = TensorBlocks(request.source, source, pinned=device.type == "cuda")
    return Skeleton(model, found[0], parts, blocks, device)


def _own_state(module: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """The parameters and persistent buffers that are `module`'s own."""
    passing = module._non_persistent_buffers_set  # noqa: SLF001
    buffers = [(name, value) for name, value in module.named_buffers(recurse=False) if name not in passing]
    return [*module.named_parameters(recurse=False), *buffers]
