"""What `verify` looks at in the engine directory of a package for TensorRT engines; see `trtllm_engine`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtbuild.adapters.trtllm_engine import CHECKPOINT, ENGINE_FILE, RECORD, SCRIPT, check_engine
from trtbuild.adapters.trtllm_tokenizer import tokenizer_info
from trtbuild.checkpoint_files import LocalFiles
from trtbuild.errors import ArtifactError
from trtbuild.manifest import read_json
from trtbuild.safetensors_header import HeaderError, TensorInfo, read_header
from trtbuild.trtllm_build import BUILT, DRAFT, EngineSpec, spec_from_json
from trtbuild.trtllm_engine_lora import ADAPTERS

_AGAIN = "build the package again"


@dataclass(frozen=True, slots=True)
class EngineCheck:
    """One check: what was looked at, and every problem found; `ran` is False where there was nothing to look at."""

    name: str
    problems: tuple[str, ...] = ()
    detail: str = ""
    ran: bool = True


def check(directory: Path, planned: Mapping[str, Any]) -> list[EngineCheck]:
    """Every check of an engine directory.

    Args:
        directory: the engine directory.
        planned: parameters of the engine step, as the package's lock has them.

    Raises:
        ArtifactError: a file is missing or no JSON.
        KeyError, TypeError: a file lacks something.
    """
    engine = read_json(directory / ENGINE_FILE)
    spec = spec_from_json(planned["spec"])
    checks = [
        EngineCheck("engine.json", tuple(_against_plan(engine, planned)), f"TensorRT-LLM {engine['version']}"),
        _checkpoint(directory / CHECKPOINT, spec, str(planned["dtype"])),
        _ranks(directory / CHECKPOINT, spec),
        _built(directory, spec, engine),
    ]
    if "tokenizer_info" in planned:
        checks.append(_tokenizer(directory, planned["tokenizer_info"]))
    if planned.get("lora", {}).get("adapters"):
        checks.append(_adapters(directory / ADAPTERS, planned["lora"]))
    if "draft" not in planned:
        return checks
    return checks + [replace(one, name=f"draft: {one.name}") for one in check(directory / DRAFT, planned["draft"])]


def _adapters(directory: Path, lora: Mapping[str, Any]) -> EngineCheck:
    from trtbuild.convert.lora.write import check_arrays  # numpy, which only this check needs

    problems = tuple(f"{problem}; {_AGAIN}" for problem in check_arrays(directory, lora))
    shown = ", ".join(f"{task}: {name}" for task, name in lora["adapters"].items())
    return EngineCheck("LoRA adapters", problems, shown)


def _tokenizer(directory: Path, name: str) -> EngineCheck:
    found, wanted = read_json(directory / name), tokenizer_info(directory)
    wrong = tuple(
        f"{name}: {key} is not that of the tokenizer beside it; {_AGAIN}"
        for key in wanted
        if found.get(key) != wanted[key]
    )
    return EngineCheck("guided decoding", wrong, f"{len(wanted['encoded_vocab'])} tokens")


def _against_plan(engine: Mapping[str, Any], planned: Mapping[str, Any]) -> list[str]:
    names = ("runtime", "version", "container", "image", "world_size", "dtype", "spec")
    found, wanted = (_leaves({name: one.get(name) for name in names}) for one in (engine, planned))
    return [
        f"{name} is {found.get(name)!r}, the plan says {wanted.get(name)!r}; {_AGAIN}"
        for name in sorted({*found, *wanted})
        if found.get(name) != wanted.get(name)
    ]


def _leaves(document: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Every value under its dotted path; an empty section is a value."""
    found: dict[str, Any] = {}
    for name, value in document.items():
        found |= _leaves(value, f"{at}{name}.") if isinstance(value, Mapping) and value else {f"{at}{name}": value}
    return found


def _checkpoint(directory: Path, spec: EngineSpec, dtype: str) -> EngineCheck:
    """The checkpoint's config against the plan."""
    config = read_json(directory / "config.json")
    mapping, quantization = config.get("mapping") or {}, config.get("quantization") or {}
    found = {
        "architecture": config.get("architecture"),
        "dtype": config.get("dtype"),
        **{f"mapping.{name}": mapping.get(name) for name in ("world_size", "tp_size", "pp_size")},
        "quantization.quant_algo": quantization.get("quant_algo"),
        "quantization.kv_cache_quant_algo": quantization.get("kv_cache_quant_algo"),
    }
    values = (spec.architecture, dtype, spec.world_size, spec.tp_size, spec.pp_size, spec.format, spec.kv_cache)
    wanted = dict(zip(found, values, strict=True))
    problems = tuple(
        f"config.json: {path} is {found[path]!r}, the plan says {value!r}; {_AGAIN}"
        for path, value in wanted.items()
        if found[path] != value
    )
    shown = f"{spec.architecture}, {spec.format or dtype}, KV cache {spec.kv_cache or dtype}"
    return EngineCheck("TensorRT-LLM checkpoint: config", problems, shown)


def _ranks(directory: Path, spec: EngineSpec) -> EngineCheck:
    """One sound file for each rank, and the same tensors on every rank of a pipeline stage."""
    files, problems = LocalFiles(directory), []
    there, wanted = files.names_and_sizes(), [f"rank{rank}.safetensors" for rank in range(spec.world_size)]
    problems += [
        f"{name} is missing, and there are {spec.world_size} ranks; {_AGAIN}" for name in wanted if name not in there
    ]
    more = sorted(name for name in there if name.startswith("rank") and name not in wanted)
    problems += [f"{name} belongs to no rank of {spec.world_size}; {_AGAIN}" for name in more]
    tensors: dict[str, dict[str, TensorInfo]] = {}
    for name in (name for name in wanted if name in there):
        try:
            tensors[name] = {tensor.name: tensor for tensor in read_header(files, name)[1]}
        except HeaderError as error:
            problems.append(f"{error}; {_AGAIN}")
    for rank, name in enumerate(wanted):
        first = wanted[rank - rank % spec.tp_size]
        if name in tensors and first in tensors:
            problems += _differences(first, tensors[first], name, tensors[name])
    count = sum(map(len, tensors.values()))
    return EngineCheck("TensorRT-LLM checkpoint: ranks", tuple(problems), f"{count} tensors on {spec.world_size} ranks")


def _differences(first: str, ours: Mapping[str, TensorInfo], other: str, theirs: Mapping[str, TensorInfo]) -> list[str]:
    """Where a rank of a stage has other tensors than the stage's first."""
    return [
        f"{name} differs between {first} and {other}, ranks of one pipeline stage; {_AGAIN}"
        for name in sorted(set(ours) | set(theirs))
        if _layout(ours.get(name)) != _layout(theirs.get(name))
    ]


def _layout(tensor: TensorInfo | None) -> tuple[str, tuple[int, ...]] | None:
    return None if tensor is None else (tensor.dtype, tensor.shape)


def _built(directory: Path, spec: EngineSpec, engine: Mapping[str, Any]) -> EngineCheck:
    """The engine that was built, if it was."""
    built, name = directory / BUILT, "TensorRT engine"
    if not built.is_dir():
        image = engine["image"] or "an image that it is told (--image)"
        return EngineCheck(name, (), f"not built yet: engine/{SCRIPT} builds it in {image}", ran=False)
    again = f"move engine/{BUILT} away and run engine/{SCRIPT}"
    found = tuple(f"{problem}; {again}" for problem in check_built(built, spec, key=engine["key"]))
    return EngineCheck(name, found, f"TensorRT-LLM {spec.version}, {spec.world_size} ranks, SM{spec.gpu}")


def check_built(built: Path, spec: EngineSpec, *, key: str) -> list[str]:
    """What is wrong with a built engine, read back: its config, its record, a whole file for each rank.

    Args:
        built: what ``trtllm-build`` has made.
        spec: what it was to be built for.
        key: of the engine, see `trtllm_engine.build_key`.
    """
    try:
        config, record = read_json(built / "config.json"), read_record(built)
    except ArtifactError as error:
        return [str(error)]
    problems = [f"{problem.path}: {problem.message}" for problem in check_engine(config, record, spec)]
    if record is not None and record.get("key") != key:
        problems.append(f"{RECORD}: key: is {record.get('key')!r}, another checkpoint or other arguments than {key!r}")
    sizes = (record or {}).get("bytes", {})
    for name in (f"rank{rank}.engine" for rank in range(spec.world_size)):
        path = built / name
        if not path.is_file():
            problems.append(f"{name} is missing, and there are {spec.world_size} ranks")
        elif name in sizes and path.stat().st_size != sizes[name]:
            problems.append(f"{name} has {path.stat().st_size} bytes, and {sizes[name]} were written")
    return problems


def read_record(built: Path) -> dict[str, Any] | None:
    """What the script has recorded about an engine, or None where it has not.

    Raises:
        ArtifactError: the record cannot be read.
    """
    if not (built / RECORD).is_file():
        return None
    record = read_json(built / RECORD)
    if not isinstance(record, dict):
        raise ArtifactError(f"{built / RECORD} holds no JSON object", "build the engine again")
    return record
