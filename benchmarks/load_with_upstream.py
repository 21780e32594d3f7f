"""Load TensorRT-LLM checkpoints with upstream's own model classes, without TensorRT, its C++ bindings or a GPU.

    python benchmarks/load_with_upstream.py SOURCES CHECKPOINT...

SOURCES is a directory that holds the Python package `tensorrt_llm` of some version, as its repository has it;
CHECKPOINT is what the conversion writes. For each rank `from_checkpoint` of the class in MODEL_MAP is called: it
preprocesses the weights, builds the model and asks for every parameter by name and shape. TensorRT and the bindings are
stand-ins, and so are the kernels' own reorderings of weights: names, shapes and types are proven, and no layout inside
a tensor.

Prints one line for each outcome with the ranks that had it; exit code 1 where a rank did not load or kept a tensor.
"""

from __future__ import annotations

import ast
import enum
import importlib
import importlib.abc
import importlib.machinery
import json
import sys
import types
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch

# Packages that upstream imports and loading does not need, beside what is missing here.
STAND_INS = {
    "tensorrt",
    "triton",
    "polygraphy",
    "mpi4py",
    "onnx",
    "h5py",
    "pynvml",
    "cuda",
    "flashinfer",
    "sentencepiece",
}
STAND_INS |= {"datasets", "evaluate", "diffusers", "torchvision", "ray", "zmq", "nvtx", "onnx_graphsurgeon", "xgrammar"}
INNER = ("bindings", "libs", "llmapi", "_torch", "executor", "runtime", "auto_parallel", "inputs")
MODULES = {
    "Llama": "llama", "Mistral": "llama", "Mixtral": "llama", "Qwen2": "qwen", "Qwen2Moe": "qwen", "Qwen3": "qwen",
    "Qwen3Moe": "qwen", "Gemma2": "gemma", "Gemma3": "gemma", "Phi3": "phi3",
}  # fmt: skip
TYPES = ("float32", "float16", "int8", "int32", "bool", "uint8", "fp8", "bfloat16", "int64", "int4", "fp4")
LONG = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


class _Text(str, enum.Enum):  # noqa: UP042 - enum.StrEnum would make the names small
    """strenum.StrEnum: auto() is the name itself."""

    @staticmethod
    def _generate_next_value_(name: str, *_: Any) -> str:
        return name


class _AnyName(type):
    """A class that has every attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


def _nothing(*_: Any, **__: Any) -> None:
    """A constructor that takes anything."""


def _same(tensor: Any, *_: Any, **__: Any) -> Any:
    """A kernel that leaves a tensor as it is, and a move to a GPU that is not there."""
    return tensor


class _Module(types.ModuleType):
    """A module that has every name: classes that take any arguments, and functions that do nothing."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__all__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return "10.9.0"
        if name.startswith("__"):
            raise AttributeError(name)
        if self.__name__ == "tensorrt" and (name == "DataType" or name in TYPES):
            return DATA_TYPE if name == "DataType" else DATA_TYPE[name]
        made: Any = MagicMock(name=name)
        if name[:1].isupper():
            made = _AnyName(name, (), {"__init__": _nothing})
        setattr(self, name, made)
        return made


DATA_TYPE: Any = enum.Enum(
    "DataType",
    {name: at for at, name in enumerate(TYPES)}
    | {name.upper(): at for at, name in enumerate(TYPES)}
    | {long: TYPES.index(name) for long, name in LONG.items()},
)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        first, _, rest = name.partition(".")
        inner = first == "tensorrt_llm" and rest.partition(".")[0] in INNER
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if first in STAND_INS or inner else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def prepare(sources: Path) -> Any:
    """The module `tensorrt_llm.models.modeling_utils` of these sources, its packages without their own __init__."""
    sys.meta_path.insert(0, _Finder())
    sys.modules["strenum"] = types.ModuleType("strenum")
    sys.modules["strenum"].StrEnum = _Text
    for name in ("tensorrt_llm", "tensorrt_llm.models"):
        package = types.ModuleType(name)
        package.__path__ = [str(sources / name.replace(".", "/"))]
        sys.modules[name] = package
    top: Any = sys.modules["tensorrt_llm"]
    top.models = sys.modules["tensorrt_llm.models"]
    for name in ("network", "functional", "module", "parameter"):
        setattr(top, name, importlib.import_module(f"tensorrt_llm.{name}"))
    top.Mapping = importlib.import_module("tensorrt_llm.mapping").Mapping
    utils = importlib.import_module("tensorrt_llm.models.modeling_utils")
    torch.ops.trtllm = types.SimpleNamespace(preprocess_weights_for_mixed_gemm=_same)
    torch.Tensor.cuda = _same
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(major=8, minor=0)  # an A100
    return utils


def model_map(sources: Path) -> dict[str, Any]:
    """Upstream's MODEL_MAP, for the architectures that the conversion knows."""
    tree = ast.parse((sources / "tensorrt_llm/models/__init__.py").read_text(encoding="utf-8"))
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODEL_MAP":
            assert isinstance(node.value, ast.Dict)
            found = {
                ast.unparse(key).strip("'"): ast.unparse(one)
                for key, one in zip(node.value.keys, node.value.values, strict=True)
                if key
            }
    made = {}
    for short, module in MODULES.items():
        name = found.get(f"{short}ForCausalLM") or found.get(f"{short.upper()}_ARCHITECTURE")
        if name is not None:
            made[f"{short}ForCausalLM"] = getattr(importlib.import_module(f"tensorrt_llm.models.{module}.model"), name)
    sys.modules["tensorrt_llm.models"].MODEL_MAP = made
    return made


def outcome(checkpoint: Path, rank: int, known: dict[str, Any], utils: Any) -> str:
    """Whether one rank loads, and what upstream said."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config["architecture"] not in known:
        return f"no class for {config['architecture']}"
    said: list[str] = []
    logger = importlib.import_module("tensorrt_llm.logger").logger
    for level in ("warning", "info", "error"):
        setattr(logger, level, lambda *words: said.append(" ".join(map(str, words))))
    model = known[config["architecture"]]
    try:
        made = (getattr(model, "config_class", None) or utils.PretrainedConfig).from_dict(config)
        made.set_rank(rank)
        model.from_checkpoint(str(checkpoint), config=made)
    except Exception as error:  # noqa: BLE001 - whatever upstream raises is the finding
        return f"{type(error).__name__}: {error}"[:200]
    odd = [line[:160] for line in said if line.startswith(("Provided but not", "Parameter was initialized"))]
    return "loaded" + "".join(f"; {line}" for line in sorted(set(odd)))


def main(sources: Path, checkpoints: list[Path]) -> int:
    """Print every outcome; 1 where one is not "loaded"."""
    utils = prepare(sources)
    known = model_map(sources)
    found: dict[str, list[str]] = defaultdict(list)
    for checkpoint in checkpoints:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        for rank in range(config["mapping"]["world_size"]):
            found[outcome(checkpoint, rank, known, utils)].append(f"{checkpoint.name}#{rank}")
    for text, ranks in found.items():
        print(f"{len(ranks)} {text}: {', '.join(ranks[:6])}{', ...' if len(ranks) > 6 else ''}")
    return int(set(found) != {"loaded"})


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), [Path(name) for name in sys.argv[2:]]))
