"""A LoRA adapter: its config and its tensors' headers, held against the base model and the engine's limits."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.adapter_file import read_adapter_config
from trtbuild.checkpoint_files import LocalFiles
from trtbuild.errors import Problem
from trtbuild.safetensors_header import HeaderError, TensorInfo, read_header

WEIGHTS = "adapter_model.safetensors"
_FLOATS = ("F16", "BF16", "F32")
_NAME = re.compile(r"(?:.*\.)?layers\.(\d+)\.((?:self_attn|mlp)\.\w+)\.lora_([AB])\.weight")
# What PEFT can do besides, and what must stand there for it to be off.
_OFF: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "use_dora": ((False, None), "scales the base weights (DoRA)"),
    "bias": (("none", None), "changes biases"),
    "modules_to_save": ((None, []), "brings modules of its own"),
    "alpha_pattern": ((None, {}), "scales modules differently"),
    "layer_replication": ((None, []), "repeats layers"),
    "fan_in_fan_out": ((False, None), "stores its weights transposed"),
    "trainable_token_indices": ((None, [], {}), "changes embeddings"),
    "lora_bias": ((False, None), "has biases"),
}


@dataclass(frozen=True, slots=True)
class Target:
    """One module of the base model: TensorRT-LLM's name and number, and its inputs and outputs."""

    name: str
    number: int
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine is built for: its modules by their names in the base model, layers, and the highest rank."""

    targets: Mapping[str, Target]
    layers: int
    max_rank: int

    @classmethod
    def of(cls, lora: Mapping[str, Any]) -> Limits:
        """From the parameters of a planned engine step."""
        targets = {
            module["name"]: Target(name, module["number"], *module["sizes"]) for name, module in lora["modules"].items()
        }
        return cls(targets=targets, layers=lora["layers"], max_rank=lora["max_rank"])


@dataclass(frozen=True, slots=True)
class Pair:
    """A and B of one module of one layer."""

    layer: int
    target: Target
    a: TensorInfo
    b: TensorInfo

    @property
    def rank(self) -> int:
        """Rows of A, columns of B."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A checked adapter: its pairs in order of layers and modules, and what its config says of the scale."""

    directory: Path
    alpha: float
    rslora: bool
    pairs: tuple[Pair, ...]

    def scale(self, rank: int) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)


def read_adapter(name: str, directory: Path, limits: Limits) -> Adapter | list[Problem]:
    """The adapter in `directory`, or everything that is wrong with it. Reads no tensor data."""
    at = f"model.adapters {name}"
    try:
        config = read_adapter_config(directory, "lora_alpha")
    except ValueError as error:
        return [Problem(at, str(error), "give an adapter as PEFT saves it")]
    kind, alpha = config.get("peft_type"), float(config["lora_alpha"])
    if kind != "LORA":
        return [Problem(at, f"is of type {kind}, not LORA", "give a LoRA adapter")]
    if not (directory / WEIGHTS).is_file():
        message = f"{directory} has no {WEIGHTS}"
        return [Problem(at, message, "save it as safetensors: pickles can run code")]
    try:
        tensors = read_header(LocalFiles(directory), WEIGHTS)[1]
    except HeaderError as error:
        return [Problem(at, f"{directory}: {error}", "copy it again")]
    problems = list(_features(at, config))
    pairs = [*_pairs(at, tensors, limits, problems)]
    if not pairs and not problems:
        problems.append(Problem(at, "adapts nothing", "give another adapter"))
    return problems or Adapter(directory, alpha, bool(config.get("use_rslora")), tuple(pairs))


def _features(at: str, config: Mapping[str, Any]) -> Iterable[Problem]:
    for key, (off, what) in _OFF.items():
        if config.get(key) not in off:
            yield Problem(at, f"{what} ({key}: {config[key]}), which engines take no adapter with", "train it without")


def _pairs(at: str, tensors: Iterable[TensorInfo], limits: Limits, problems: list[Problem]) -> Iterable[Pair]:
    found: dict[tuple[int, str], dict[str, TensorInfo]] = {}
    foreign: list[str] = []
    for tensor in tensors:
        match = _NAME.fullmatch(tensor.name)
        if match is None:
            foreign.append(tensor.name)
        else:
            found.setdefault((int(match[1]), match[2]), {})[match[3]] = tensor
    if foreign:
        message = f"has tensors that belong to no projection of a layer, {foreign[0]} for one"
        problems.append(Problem(at, message, f"adapt {', '.join(limits.targets)} alone"))
    unnamed = sorted({module for _, module in found if module not in limits.targets})
    if unnamed:
        message = f"adapts {', '.join(unnamed)}, which runtime.lora_config.lora_target_modules does not name"
        names = ", ".join(target.name for target in limits.targets.values())
        problems.append(Problem(at, message, f"it names {names}: add what is missing, or use another adapter"))
    known = [(key, pair) for key, pair in sorted(found.items(), key=_order(limits)) if key[1] in limits.targets]
    for (layer, module), pair in known:
        target, where = limits.targets[module], f"layers.{layer}.{module}"
        wrong = _fault(layer, target, pair, limits)
        if wrong is not None:
            problems.append(Problem(at, f"{where} {wrong[0]}", wrong[1]))
            return  # the others are most likely wrong in the same way
        yield Pair(layer, target, pair["A"], pair["B"])


def _order(limits: Limits) -> Any:
    def place(item: tuple[tuple[int, str], Any]) -> tuple[int, int]:
        (layer, module), _ = item
        target = limits.targets.get(module)
        return layer, -1 if target is None else target.number

    return place


def _fault(layer: int, target: Target, pair: Mapping[str, TensorInfo], limits: Limits) -> tuple[str, str] | None:
    """What is wrong with one module's two tensors, and what to do."""
    again = "give an adapter of this base model"
    if set(pair) != {"A", "B"}:
        return f"has lora_{next(iter(pair))} alone", "copy it again"
    if layer >= limits.layers:
        return f"is no layer of the base model, which has {limits.layers}", again
    a, b = pair["A"], pair["B"]
    odd = next((tensor.dtype for tensor in (a, b) if tensor.dtype not in _FLOATS), None)
    if odd is not None:
        return f"is of type {odd}", f"save it as one of {', '.join(_FLOATS)}"
    rank = a.shape[0] if len(a.shape) == 2 else 0
    if not rank or a.shape != (rank, target.inputs) or b.shape != (target.outputs, rank):
        wanted = f"[rank, {target.inputs}] and [{target.outputs}, rank]"
        return f"has shapes {list(a.shape)} and {list(b.shape)}, and the base model's are {wanted}", again
    if rank > limits.max_rank:
        hint = f"set runtime.lora_config.max_lora_rank: {rank}"
        return f"has rank {rank}, more than max_lora_rank {limits.max_rank}", hint
    return None
