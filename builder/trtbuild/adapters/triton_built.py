"""A `tensorrt_llm` model that TensorRT-LLM executes, against the engine directory that it loads.

The engine's ``config.json`` holds `version`, `pretrained_config` (with `mapping`) and `build_config` as `trtllm-build`
of TensorRT-LLM <= 1.2 writes them (tensorrt_llm/builder.py @008b2b8d); beside it lies ``rank{i}.engine`` for each rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtbuild.adapters.triton_config import Model
from trtbuild.adapters.triton_parameters import device_problems
from trtbuild.errors import Problem
from trtbuild.trtllm_build import BUILT

# `SpeculativeDecodingMode` of an engine, and the decoding mode that executes it.
_SPECULATIVE = {
    "MEDUSA": "medusa",
    "LOOKAHEAD_DECODING": "lookahead",
    "EXPLICIT_DRAFT_TOKENS": "redrafter",
    "EAGLE": "eagle",
}
_BUILD_AGAIN = "build the engine again, or change the configuration"


def place(directory: Path) -> Path:
    """Where an engine directory has the engine itself: in ours the build script puts it below."""
    return directory / BUILT if (directory / "engine.json").is_file() else directory


def check_engine(model: Model, directory: Path) -> list[Problem]:
    """Faults between the model's parameters and the engine in `directory`, or what it will be, where that is said."""
    problems: list[Problem] = []
    config = _config(directory, problems) if directory.is_dir() else _planned(directory.parent)
    if config is None:
        return problems
    build, world = config.get("build_config", {}), world_size(config)
    for rank in range(world) if directory.is_dir() else ():
        if not (directory / f"rank{rank}.engine").is_file():
            message = f"the file is missing, and the engine has {world} ranks"
            problems.append(Problem(f"engine/rank{rank}.engine", message, "build the engine again"))
    given = {name: str(value.string_value) for name, value in model.config.parameters.items()}
    problems += device_problems(given, f"{model.name}/config.pbtxt", world)
    return [*problems, *_sizes(model, build), *_features(model, given, build)]


def check_limits(model: Model, limits: Mapping[str, int], directory: Path) -> list[Problem]:
    """What preprocessing lets in must fit into the engine, where one lies beside the tokenizer."""
    problems: list[Problem] = []
    built = place(directory)
    config = _config(built, problems) if (built / "config.json").is_file() else _planned(directory)
    if config is None or "build_config" not in config:
        return problems  # a checkpoint with the tokenizer, not an engine
    build = config["build_config"]
    for ours, theirs in (("max_seq_len", "max_seq_len"), ("max_input_tokens", "max_input_len")):
        most = build.get(theirs)
        if ours in limits and isinstance(most, int) and limits[ours] > most:
            message = f"{ours} is {limits[ours]}, and the engine is for {theirs} {most}"
            problems.append(model.problem(message, f"at most {most}"))
    return problems


def _planned(directory: Path) -> dict[str, Any] | None:
    """What an engine that is not built yet will say of itself, from our engine.json; None where there is none."""
    try:
        said = json.loads((directory / "engine.json").read_text(encoding="utf-8"))
        mapping = {"world_size": int(said["world_size"])}
        return {"build_config": dict(said["limits"]), "pretrained_config": {"mapping": mapping}}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not ours, or damaged, which other checks say


def world_size(config: Mapping[str, Any]) -> int:
    """How many ranks the engine of this ``config.json`` has."""
    mapping = config.get("pretrained_config", {}).get("mapping", {})
    ranks = mapping.get("world_size") or mapping.get("tp_size", 1) * mapping.get("pp_size", 1)
    return int(ranks)


def _config(directory: Path, problems: list[Problem]) -> dict[str, Any] | None:
    """The engine's own description; what is wrong with the file goes to `problems`."""
    path, why = directory / "config.json", "does not hold a JSON object"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict):
            return data
    except (OSError, ValueError) as error:
        why = f"cannot be read ({error})"
    problems.append(Problem("engine/config.json", why, "build the engine again"))
    return None


def _sizes(model: Model, build: Mapping[str, Any]) -> list[Problem]:
    problems = []
    batch = build.get("max_batch_size")
    if isinstance(batch, int) and model.config.max_batch_size > batch:
        message = f"max_batch_size is {model.config.max_batch_size}, and the engine is for {batch}"
        problems.append(model.problem(message, f"at most {batch}"))
    beams, given = build.get("max_beam_width"), model.parameter("max_beam_width") or "1"
    if isinstance(beams, int) and given.isdecimal() and int(given) > beams:
        message = f"max_beam_width is {given}, and the engine is for {beams}"
        problems.append(model.problem(message, f"at most {beams}"))
    return problems


def _features(model: Model, given: Mapping[str, str], build: Mapping[str, Any]) -> list[Problem]:
    """Features that an engine must have been built for."""
    problems = []
    paged = build.get("plugin_config", {}).get("use_paged_context_fmha")
    for name in ("enable_kv_cache_reuse", "enable_chunked_context"):
        if paged is False and given.get(name, "").lower() in ("true", "1"):
            message = f"{name} is true, and the engine was built without use_paged_context_fmha"
            problems.append(model.problem(message, _BUILD_AGAIN))
    wanted = _SPECULATIVE.get(str(build.get("speculative_decoding_mode", "")).rsplit(".", 1)[-1].upper())
    mode = given.get("decoding_mode")
    if wanted is not None and mode != wanted:
        problems.append(
            model.problem(f"decoding_mode is {mode}, and the engine was built for {wanted}", f"write {wanted}")
        )
    if wanted is None and mode in _SPECULATIVE.values() and "speculative_decoding_mode" in build:
        problems.append(model.problem(f"decoding_mode is {mode}, and the engine was built without it", _BUILD_AGAIN))
    return problems
