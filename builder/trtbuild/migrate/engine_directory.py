"""Engine directories: TensorRT engines with the ``config.json`` of ``trtllm-build``, and ``engine.json`` of trtbuild.

The former holds `version`, `pretrained_config` and `build_config` (NVIDIA/TensorRT-LLM, builder.py @008b2b8d,
EngineConfig).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ruamel.yaml.error import YAMLError

from trtbuild.errors import ArtifactError
from trtbuild.migrate.legacy import Legacy, Setting, Unset, leaves, split_unset
from trtbuild.yaml_text import parse_yaml

CONFIG, OURS, ARGUMENTS, QUANTIZATION = "config.json", "engine.json", "llm_args.yaml", "hf_quant_config.json"
_PARTS = ("version", "pretrained_config", "build_config")


def is_engine(path: Path) -> bool:
    """Whether a directory holds an engine, also a damaged one, but no checkpoint of Transformers."""
    if (path / OURS).is_file():
        return True
    if not (path / CONFIG).is_file():
        return False
    return any(path.glob("rank*.engine")) or '"pretrained_config"' in (path / CONFIG).read_text(errors="replace")


def read_engine(path: Path) -> Legacy:
    """What an engine directory says of how it was built.

    Raises:
        ArtifactError: its configuration is damaged or incomplete.
    """
    return _ours(path) if (path / OURS).is_file() else _tensorrt(path)


def _tensorrt(path: Path) -> Legacy:
    config = read_config(path / CONFIG)
    missing = [name for name in _PARTS if name not in config]
    if missing:
        message = f"{path / CONFIG}: {', '.join(missing)} is missing, so it is no engine's configuration"
        raise ArtifactError(message, "name the output directory of trtllm-build")
    odd = [name for name in _PARTS[1:] if not isinstance(config[name], dict)]
    if odd or not isinstance(config["version"], str):
        raise ArtifactError(
            f"{path / CONFIG}: {', '.join(odd) or 'version'} is of another type", "build the engine again"
        )
    where = f"{path.name}/{CONFIG}"
    build, open_build = split_unset("build", leaves(config["build_config"]), where)
    model, open_model = split_unset("checkpoint", leaves(config["pretrained_config"]), where)
    others = [Setting("build", name, config[name], where) for name in config if name not in _PARTS[1:]]
    return Legacy(
        f"a TensorRT engine of TensorRT-LLM {config['version']}",
        path,
        (*build, *model, *others),
        (*open_build, *open_model),
        version=config["version"],
    )


def _ours(path: Path) -> Legacy:
    """An engine of trtbuild: ``engine.json``, and the files beside it that a recipe's fields became."""
    config = read_config(path / OURS)
    version = config.get("version") if isinstance(config.get("version"), str) else None
    pairs = [(name, value) for name, value in leaves(config) if not name.startswith(("llm_args.", "adapters."))]
    pairs += [(name, config[name]) for name in ("llm_args", "adapters") if config.get(name)]
    settings, unset = split_unset("own", pairs, OURS)
    if (path / ARGUMENTS).is_file():
        more, open_more = split_unset("llm", _arguments(path / ARGUMENTS), ARGUMENTS)
        settings, unset = more + settings, open_more + unset
    if (path / QUANTIZATION).is_file():
        more, open_more = _quantization(path)
        settings, unset = settings + more, unset + open_more
    return Legacy("an engine directory of trtbuild", path, tuple(settings), tuple(unset), version=version)


def _arguments(path: Path) -> list[tuple[str, Any]]:
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error})", "build the package again") from None
    if not isinstance(document, dict):
        raise ArtifactError(f"{path}: holds no mapping of LLM arguments", "build the package again")
    return [
        (name, False if name == "cuda_graph_config" and value is None else value) for name, value in leaves(document)
    ]


def _quantization(path: Path) -> tuple[list[Setting], list[Unset]]:
    found = read_config(path / QUANTIZATION).get("quantization", {})
    pairs = [(f"quantization.{name}", value) for name, value in leaves(found)] if isinstance(found, dict) else []
    return split_unset("checkpoint", pairs, QUANTIZATION)


def read_config(path: Path) -> dict[str, Any]:
    """The object in a JSON file of an engine or of a TensorRT-LLM checkpoint.

    Raises:
        ArtifactError: it cannot be read or holds no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error})", "name an undamaged directory") from None
    if not isinstance(found, dict):
        raise ArtifactError(f"{path}: does not hold a JSON object", "name an undamaged directory")
    return found
