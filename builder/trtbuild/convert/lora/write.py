"""The two arrays of an adapter: made, written, and held against the engine's limits again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trtbuild.convert.lora.adapter import WEIGHTS, Adapter, Limits, read_adapter
from trtbuild.convert.values import NUMPY_TYPES, Array, Floats, from_float, to_float
from trtbuild.errors import CompatibilityError
from trtbuild.safetensors_header import TensorInfo
from trtbuild.worker import Progress

WEIGHTS_FILE, CONFIG_FILE = "model.lora_weights.npy", "model.lora_config.npy"


def run(raw: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Convert every adapter of a request.

    Args:
        raw: ``lora`` (of the planned engine step), ``adapters`` (directories by task id) and ``output``, below which
            a directory for each is made.
        progress: is told how many are done.

    Raises:
        CompatibilityError: an adapter does not fit the engine, or has a value beyond float16.
    """
    limits, output, made = Limits.of(raw["lora"]), Path(raw["output"]), {}
    for number, (task, source) in enumerate(sorted(raw["adapters"].items())):
        progress(number, len(raw["adapters"]), "adapters")
        name = raw["lora"]["adapters"][task]
        adapter = read_adapter(name, Path(source), limits)
        if isinstance(adapter, list):
            raise CompatibilityError("\n".join(str(problem) for problem in adapter))
        weights, config = arrays(name, adapter)
        directory = output / task
        directory.mkdir(parents=True)
        np.save(directory / WEIGHTS_FILE, weights, allow_pickle=False)
        np.save(directory / CONFIG_FILE, config, allow_pickle=False)
        made[name] = {"task": task, "modules": len(config), "bytes": int(weights.nbytes)}
    return {"adapters": made}


def arrays(name: str, adapter: Adapter) -> tuple[Array, Array]:
    """The weights, float16 [rows, width], and what each row is, int32 [rows, 3].

    Raises:
        CompatibilityError: a value is too large for float16.
    """
    width = max(pair.a.elements + pair.b.elements for pair in adapter.pairs)
    weights = np.zeros((len(adapter.pairs), width), dtype=np.float16)
    for row, pair in enumerate(adapter.pairs):
        scaled = _values(adapter.directory, pair.b) * np.float32(adapter.scale(pair.rank))
        both = np.concatenate([_values(adapter.directory, pair.a), scaled])
        try:
            weights[row, : both.size] = from_float(both, "F16")
        except OverflowError as error:
            message = f"model.adapters {name}: layers.{pair.layer} {pair.target.name} has {error}, the limit of float16"
            raise CompatibilityError(message, "scale it down, or use runtime.kind: trtllm") from None
    config = [[pair.target.number, pair.layer, pair.rank] for pair in adapter.pairs]
    return weights, np.array(config, dtype=np.int32)


def _values(directory: Path, tensor: TensorInfo) -> Floats:
    """A tensor in float32, flat."""
    with (directory / WEIGHTS).open("rb") as file:
        file.seek(tensor.begin)
        raw = file.read(tensor.bytes)
    return to_float(np.frombuffer(raw, NUMPY_TYPES[tensor.dtype]), tensor.dtype)


def check_arrays(directory: Path, lora: Mapping[str, Any]) -> list[str]:
    """What is wrong with the arrays of a finished engine directory's adapters, by the rules of the C++ runtime.

    As `loraValidateRequestTensors` (cpp/tensorrt_llm/runtime/loraUtils.cpp @77d24b5f).
    """
    problems = []
    targets = {target.number: target for target in Limits.of(lora).targets.values()}
    for task, name in lora["adapters"].items():
        try:
            weights = np.load(directory / task / WEIGHTS_FILE, mmap_mode="r", allow_pickle=False)
            config = np.load(directory / task / CONFIG_FILE, allow_pickle=False)
        except (OSError, ValueError) as error:
            problems.append(f"adapter {name}: {directory / task} cannot be read ({error})")
            continue
        if weights.dtype != np.float16 or config.dtype != np.int32 or weights.ndim != 2 or config.ndim != 2:
            problems.append(f"adapter {name}: its arrays are {weights.dtype} and {config.dtype}, not float16 and int32")
        elif config.shape != (len(weights), 3):
            problems.append(f"adapter {name}: {len(config)} rows of config for {len(weights)} rows of weights")
        else:
            problems += [
                f"adapter {name}: {fault}" for fault in _rows(config.tolist(), weights.shape[1], targets, lora)
            ]
    return problems


def _rows(rows: list[list[int]], width: int, targets: Mapping[int, Any], lora: Mapping[str, Any]) -> list[str]:
    for number, layer, rank in rows:
        target = targets.get(number)
        if target is None:
            return [f"module {number} is none that the engine was built for"]
        if not 0 <= layer < lora["layers"]:
            return [f"layer {layer} is none of {lora['layers']}"]
        if not 0 < rank <= lora["max_rank"] or rank * (target.inputs + target.outputs) > width:
            return [
                f"rank {rank} of {target.name} exceeds the engine's {lora['max_rank']}, or the row's {width} values"
            ]
    return []
