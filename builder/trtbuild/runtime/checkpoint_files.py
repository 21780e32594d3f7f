"""The files of a checkpoint directory: what they say about quantization, and their tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trtbuild.errors import ArtifactError, CompatibilityError
from trtbuild.runtime.compressed_tensors import METHOD, UnpackedFiles, quantized_as
from trtbuild.runtime.numerics import NUMERICS

FP8 = "FP8"
MIXED = "MIXED_PRECISION"
_KV_CACHES = ("FP8", "NVFP4", "INT8")
REBUILD = "build the package again"
_INDEX = "model.safetensors.index.json"
_NOT_QUANTIZED = (None, "NO_QUANT")


@dataclass(frozen=True, slots=True)
class QuantizationFacts:
    """What a checkpoint says about its own quantization."""

    algorithm: str | None = None  # a name of `NUMERICS`, or None
    group_size: int | None = None
    kv_cache: str | None = None  # FP8, NVFP4, INT8 or None
    exclude: tuple[str, ...] = ()
    layers: Mapping[str, str] = field(default_factory=dict)  # of a mixed checkpoint, by their names in files

    def of(self, layer: str) -> str | None:
        """The algorithm of a layer by its name in files."""
        return self.layers.get(layer) if self.algorithm == MIXED else self.algorithm


def read_quantization(directory: Path) -> QuantizationFacts:
    """Return what hf_quant_config.json, else config.json, says; both of ModelOpt's shapes are understood.

    Raises:
        ArtifactError: A file is missing or is not JSON.
        CompatibilityError: The quantization is not one that the embedded engine computes; names the known.
    """
    nested = directory / "hf_quant_config.json"
    if nested.exists():
        section = read_json(nested).get("quantization") or {}
        kv_cache, exclude = section.get("kv_cache_quant_algo"), section.get("exclude_modules")
    else:
        section = read_json(directory / "config.json").get("quantization_config") or {}
        method = section.get("quant_method", "modelopt")
        if method == METHOD:
            algorithm, group, layers = quantized_as(section, directory)
            return QuantizationFacts(algorithm, group, None, tuple(section.get("ignore") or ()), layers)
        if not str(method).startswith("modelopt"):
            raise CompatibilityError(
                f"{directory}: quantized with {method!r}; the embedded engine reads ModelOpt's checkpoints",
                "build from the checkpoint that is not quantized",
            )
        scheme = section.get("kv_cache_scheme")
        kv_cache, exclude = ("FP8" if scheme == {"type": "float", "num_bits": 8, "dynamic": False} else None), None
        if scheme and kv_cache is None:
            kv_cache = str(scheme)
        exclude = section.get("ignore")
    if section.get("quant_algo") == MIXED:
        return _mixed(directory, section, kv_cache, exclude)
    return _known(directory, section.get("quant_algo"), section.get("group_size"), kv_cache, exclude)


def _mixed(directory: Path, section: Mapping[str, Any], kv_cache: Any, exclude: Any) -> QuantizationFacts:
    """A checkpoint whose `quantized_layers` say the format of each."""
    listed = section.get("quantized_layers")
    if not isinstance(listed, dict) or not listed or not all(isinstance(entry, dict) for entry in listed.values()):
        raise ArtifactError(
            f"{directory}: quant_algo is {MIXED}, but quantized_layers names no layer and its format", REBUILD
        )
    layers = {}
    for name, entry in listed.items():
        known = _known(directory, entry.get("quant_algo"), entry.get("group_size"), kv_cache, exclude)
        if known.algorithm is not None:
            layers[name] = known.algorithm
    return replace(known, algorithm=MIXED, group_size=None, layers=layers)


def _known(directory: Path, algorithm: Any, group: Any, kv_cache: Any, exclude: Any) -> QuantizationFacts:
    name = algorithm.upper() if isinstance(algorithm, str) else algorithm  # ModelOpt writes some in lower case
    if name not in (*_NOT_QUANTIZED, *NUMERICS):
        raise CompatibilityError(
            f"{directory}: quant_algo {algorithm!r} is not one that the embedded engine computes "
            f"({', '.join(NUMERICS)})",
            "compress with another format, or serve it with another runtime",
        )
    if kv_cache not in (None, *_KV_CACHES):
        raise CompatibilityError(
            f"{directory}: kv_cache_quant_algo {kv_cache!r} is not one that the embedded engine computes "
            f"({', '.join(_KV_CACHES)})",
            "compress with another kv_cache",
        )
    return QuantizationFacts(
        algorithm=None if name in _NOT_QUANTIZED else name,
        group_size=group,
        kv_cache=kv_cache,
        exclude=tuple(exclude or ()),
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in file `path`; an ArtifactError says what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})", REBUILD) from error
    except ValueError as error:
        raise ArtifactError(f"{path}: is not JSON ({error})", REBUILD) from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: is not a JSON object", REBUILD)
    return content


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files at the top of `directory` that hold the model, sorted by name.

    Other files may lie beside them: Mistral publishes the same weights again as ``consolidated.safetensors``, under
    names of its own. Those that the index names count; without an index ``model.safetensors``; without that, all.

    Raises:
        ArtifactError: There are none, or the index has no mapping of tensor names to file names.
    """
    index, whole = directory / _INDEX, directory / "model.safetensors"
    if index.is_file():
        weight_map = read_json(index).get("weight_map", {})
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ArtifactError(f"{index}: weight_map must map tensor names to file names", REBUILD)
        if weight_map:
            return [directory / name for name in sorted(set(weight_map.values()))]
    paths = [whole] if whole.is_file() else sorted(directory.glob("*.safetensors"))
    if not paths:
        raise ArtifactError(f"{directory}: no *.safetensors file", REBUILD)
    return paths


class TensorFiles:
    """The tensors of a directory's model (see `weight_files`), mapped into memory when first read."""

    def __init__(self, directory: Path) -> None:
        self._handles: list[Any] = []
        self._handle_of: dict[str, Any] = {}
        for path in weight_files(directory):
            try:
                handle = safe_open(path, framework="pt")
                names = list(handle.keys())  # type: ignore[no-untyped-call]
            except (SafetensorError, OSError) as error:
                raise ArtifactError(f"{path}: damaged safetensors file: {error}", REBUILD) from error
            repeated = [name for name in names if name in self._handle_of]
            if repeated:
                raise ArtifactError(f"{path}: holds tensor {repeated[0]} that another file holds too")
            self._handle_of.update(dict.fromkeys(names, handle))
        self.names = sorted(self._handle_of)

    def tensor(self, name: str) -> torch.Tensor:
        """Tensor `name`, backed by the mapped file."""
        return self._handle_of[name].get_tensor(name)

    def dtype(self, name: str) -> str:
        """The safetensors type of tensor `name`, such as "F8_E4M3"."""
        return str(self._handle_of[name].get_slice(name).get_dtype())

    def shape(self, name: str) -> list[int]:
        """The shape of tensor `name` as its file has it."""
        return list(self._handle_of[name].get_slice(name).get_shape())


def open_tensors(directory: Path) -> TensorFiles | UnpackedFiles:
    """The tensors of a checkpoint directory, in ModelOpt's form whatever form the files have."""
    files = TensorFiles(directory)
    packed = any(name.endswith(".weight_packed") for name in files.names)
    return UnpackedFiles(files) if packed else files


@dataclass(frozen=True, slots=True)
class TensorSource:
    """The files and, for every place in the model, the tensor of the files that belongs there."""

    files: TensorFiles | UnpackedFiles
    disk_name: dict[str, str]

    def take(self, place: str) -> torch.Tensor | None:
        """The tensor for `place`, once; None if the files have none."""
        name = self.disk_name.pop(place, None)
        return None if name is None else self.files.tensor(name)
