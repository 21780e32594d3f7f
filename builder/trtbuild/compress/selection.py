"""Decide which linear layers are compressed, and refuse what a format cannot take, before any calibration."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from trtbuild.compress.groups import FUSED_BY_ENGINES, format_groups
from trtbuild.compress.request import Request
from trtbuild.errors import CompatibilityError, Problem, RecipeError
from trtbuild.runtime.experts import DiskNames, UnfusedExperts
from trtbuild.weight_formats import WEIGHT_FORMATS, takes_group

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Selection:
    """Linear layers by their name in the model, with their name in files.

    `formats` has the weight format of each layer that gets one, by its name in the model; `mixed` is whether the whole
    model has several.
    """

    compressed: Mapping[str, str]
    excluded: Mapping[str, str]  # by the recipe, and the output layer
    kept: frozenset[str] = frozenset()  # other modules with matrices, by their name in files: embeddings, routers
    formats: Mapping[str, str] = field(default_factory=dict)
    mixed: bool = False

    @property
    def uncompressed(self) -> frozenset[str]:
        """Every module with a matrix that is not quantized, by its name in files."""
        plain = (disk for name, disk in self.compressed.items() if self.formats and name not in self.formats)
        return self.kept | frozenset(self.excluded.values()) | frozenset(plain)

    @property
    def disk_formats(self) -> Mapping[str, str]:
        """The weight formats by names in files."""
        return {self.compressed[name]: chosen for name, chosen in self.formats.items()}

    def within(self, layers: str, index: int) -> Selection:
        """What of it concerns a model that has one decoder layer: number `index` of the list with the name `layers`."""
        layer = f"{layers}.{index}."
        compressed = {name: disk for name, disk in self.compressed.items() if name.startswith(layer)}
        excluded = {
            name: disk
            for name, disk in self.excluded.items()
            if name.startswith(layer) or not name.startswith(f"{layers}.")
        }
        formats = {name: chosen for name, chosen in self.formats.items() if name in compressed}
        return Selection(compressed, excluded, self.kept, formats, self.mixed)


def select(model: nn.Module, tensors: Iterable[str], request: Request) -> Selection:
    """Return what to compress in `model` (experts unfused), given the names of the source's tensors.

    Raises:
        CompatibilityError: The architecture has no linear layers of the usual class.
        RecipeError: A pattern that matches nothing, splits a group that engines fuse, or leaves nothing; a format
            that no layer has; a layer whose sides its format or the sparsity cannot take. All at once.
    """
    names = DiskNames(model)
    on_disk = {names.in_model(name).rpartition(".")[0]: name.rpartition(".")[0] for name in tensors}
    layers = {name: on_disk.get(name, name) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    fixed = _never_compressed(model)
    if not layers.keys() - fixed:
        raise CompatibilityError(
            f"{type(model).__name__} has no linear layers that a format or 2:4 could take",
            "use compress.format: none without sparsity",
        )
    kept = frozenset(on_disk.get(name, name) for name in fixed if name not in layers)
    known = kept | set(layers.values())
    excluded = {name: disk for name, disk in layers.items() if name in fixed or _matches(disk, request.exclude)}
    compressed = {name: disk for name, disk in layers.items() if name not in excluded}
    formats = _formats(compressed, request)
    problems = [
        *_unmatched_patterns("exclude", request.exclude, known),
        *_unmatched_patterns("overrides", [pattern for pattern, _ in request.overrides], set(compressed.values())),
        *_split_groups(compressed.values(), excluded.values()),
        *_mixed_groups(model, compressed, formats),
        *(_unused_formats(formats, request) if compressed else ()),
        *_unfit_layers(model, compressed, formats, request),
    ]
    if not compressed and not problems:
        problems.append(Problem("compress.exclude", "leaves no layer to compress", "exclude fewer modules"))
    if problems:
        raise RecipeError(problems)
    return Selection(compressed, excluded, kept, formats, mixed=len(set(formats.values())) > 1)


def _formats(compressed: Mapping[str, str], request: Request) -> dict[str, str]:
    """The format of each layer that gets one: that of the last override that matches, else the request's."""
    chosen = {}
    for name, disk in compressed.items():
        named = [override for pattern, override in request.overrides if fnmatchcase(disk, pattern)]
        chosen[name] = named[-1] if named else request.format
    return {name: value for name, value in chosen.items() if value != "none"}


def _unused_formats(formats: Mapping[str, str], request: Request) -> Iterator[Problem]:
    for name in request.formats:
        if name in formats.values():
            continue
        if name == request.format:
            yield Problem("compress.format", f"{name}: overrides name every layer, none is left for it", "use none")
        else:
            yield Problem("compress.overrides", f"{name}: later patterns match every layer of it", "remove its pattern")


def _never_compressed(model: nn.Module) -> set[str]:
    """The output layer, the embeddings, and what decides where tokens go beside experts."""
    head = model.get_output_embeddings()
    fixed = {name for name, module in model.named_modules() if module is head or isinstance(module, nn.Embedding)}
    for name, experts in model.named_modules():
        if isinstance(experts, UnfusedExperts):
            block = name.rpartition(".")[0]
            fixed |= {f"{block}.{child}" for child in _routers(model.get_submodule(block), experts)}
    return fixed


def _routers(block: nn.Module, experts: UnfusedExperts) -> Iterator[str]:
    """Modules of a mixture-of-experts block that score every expert, or gate its shared expert with one number."""
    inside = {id(module) for module in experts.modules()}
    for name, module in block.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        matrices = [tensor for tensor in own if tensor.dim() == 2]
        if id(module) not in inside and any(tensor.shape[0] in {experts.num_experts, 1} for tensor in matrices):
            yield name


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _unmatched_patterns(at: str, patterns: Sequence[str], known: Set[str]) -> list[Problem]:
    problems = []
    for index, pattern in enumerate(patterns):
        if not any(fnmatchcase(name, pattern) for name in known):
            near = difflib.get_close_matches(pattern, sorted(known), n=_SHOWN, cutoff=0.5)
            examples = near or sorted(known)[:_SHOWN]
            what = "module of this model" if at == "exclude" else "layer that is compressed"
            where = f"compress.exclude[{index}]" if at == "exclude" else f"compress.{at}"
            message = f"{pattern!r} matches no {what}"
            problems.append(Problem(where, message, f"names look like {', '.join(examples)}"))
    return problems


def _split_groups(compressed: Iterable[str], excluded: Iterable[str]) -> list[Problem]:
    """Engines load q, k and v (and gate and up) as one matrix: all of them or none can be excluded."""
    found: dict[tuple[str, tuple[str, ...]], dict[str, bool]] = defaultdict(dict)
    for names, is_excluded in ((compressed, False), (excluded, True)):
        for name in names:
            parent, _, leaf = name.rpartition(".")
            for group in FUSED_BY_ENGINES:
                if leaf in group:
                    found[parent, group][leaf] = is_excluded
    split = [(parent, group) for (parent, group), members in found.items() if len(set(members.values())) > 1]
    if not split:
        return []
    parent, group = split[0]
    message = f"{parent}: only a part of {', '.join(group)} is excluded, which engines load as one matrix"
    return [Problem("compress.exclude", message, "exclude all of them or none")]


def _mixed_groups(model: nn.Module, compressed: Mapping[str, str], formats: Mapping[str, str]) -> list[Problem]:
    """Overrides may not give the parts of what engines load as one different formats."""
    mixed = []
    for members in format_groups(model, compressed).values():
        chosen = {formats.get(name, "none"): compressed[name] for name in reversed(members)}
        if len(chosen) > 1:
            mixed.append(", ".join(f"{disk} is {name}" for name, disk in sorted(chosen.items())))
    if not mixed:
        return []
    more = f" (and {len(mixed) - 1} more such groups)" if len(mixed) > 1 else ""
    message = f"engines load them as one, but {mixed[0]}{more}"
    return [Problem("compress.overrides", message, "give q, k and v, gate and up, all experts of a layer one format")]


def _unfit_layers(
    model: nn.Module, compressed: Mapping[str, str], formats: Mapping[str, str], request: Request
) -> list[Problem]:
    shapes = {disk: tuple(model.get_submodule(name).weight.shape) for name, disk in compressed.items()}
    problems = []
    for chosen in sorted(set(formats.values())):
        of_format = {compressed[name]: shapes[compressed[name]] for name in formats if formats[name] == chosen}
        if takes_group(chosen) and request.group_size:
            problems += _unfit_groups(of_format, request.group_size)
        problems += _unfit_sides(of_format, chosen)
    if request.sparse:
        # NVIDIA/Model-Optimizer: modelopt/torch/sparsity/weight_sparsity/magnitude.py @0.47.0 skips others.
        rows, columns = (1, 4) if request.by_hessians else (8, 16)
        unfit = [name for name, (out, into) in shapes.items() if out % rows or into % columns]
        if unfit:
            message = (
                f"2:4 by {request.sparsity_method} needs outputs by {rows} and inputs by {columns}: {_some(unfit)}"
            )
            problems.append(Problem("compress.sparsity", message, "add these modules to compress.exclude"))
    return problems


def _unfit_groups(shapes: Mapping[str, tuple[int, ...]], group: int) -> list[Problem]:
    problems = []
    unfit = [name for name, (_, into) in shapes.items() if into % group]
    if unfit:
        sizes = sorted({shapes[name][1] for name in unfit})
        fitting = [size for size in (128, 64, 32, 16) if all(into % size == 0 for _, into in shapes.values())]
        hint = f"use {' or '.join(map(str, fitting))}" if fitting else "exclude these modules"
        message = f"{group} does not divide the input size {', '.join(map(str, sizes))} of {_some(unfit)}"
        problems.append(Problem("compress.group_size", message, hint))
    return problems


def _unfit_sides(shapes: Mapping[str, tuple[int, ...]], name: str) -> list[Problem]:
    rows, columns = WEIGHT_FORMATS[name].sides
    unfit = [layer for layer, (out, into) in shapes.items() if out % rows or into % columns]
    if not unfit:
        return []
    sides = [f"outputs by {rows}"] * (rows > 1) + [f"inputs by {columns}"] * (columns > 1)
    message = f"{name} needs {' and '.join(sides)}: {_some(unfit)}"
    return [Problem("compress.format", message, "add these modules to compress.exclude, or use another format")]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
