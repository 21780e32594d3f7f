"""Triton model repositories: TensorRT-LLM's five models, the stock llmapi model, and both layouts of trtbuild."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ruamel.yaml.error import YAMLError

from trtbuild.adapters.triton_config import CONFIG, Model, parse, type_name
from trtbuild.errors import ArtifactError, Problem, RecipeError
from trtbuild.migrate import engine_directory, llm_document
from trtbuild.migrate.legacy import Legacy, Section, Setting, Unset
from trtbuild.yaml_text import parse_yaml

# Earlier models decide where later ones differ: the engine's own comes first.
_ORDER = ("tensorrt_llm", "tensorrt_llm_bls", "ensemble", "preprocessing", "postprocessing")
_ENGINE_PARAMETERS = ("gpt_model_path", "gpt_model_type")
_HELPERS = ("preprocessing", "postprocessing", "ensemble", "tensorrt_llm_bls")
# Parts of a ModelConfig message that are the interface or that the readers below take apart.
_STRUCTURE = frozenset(
    {
        *("name", "platform", "backend", "input", "output", "max_batch_size", "parameters", "instance_group"),
        *("model_transaction_policy", "dynamic_batching", "ensemble_scheduling"),
    }
)
# Where no quotes stand around a placeholder, the text format needs a value of the field's type.
_OPEN = re.compile(r"(\w+)\s*:\s*\[?\s*\$\{(\w+)\}")
# Fields of a message with the placeholders that stand in them.
OpenFields = tuple[tuple[str, str], ...]
_NAMED = re.compile(r"\$\{(\w*)\}")
_STAND_INS = {"data_type": "TYPE_FP32", "decoupled": "false", "count": "1"}
_TYPES = {
    "context_logits": "logits_datatype",
    "encoder_input_features": "encoder_input_features_data_type",
    "prompt_embedding_table": "prompt_embedding_table_data_type",
}


def is_repository(path: Path) -> bool:
    """Whether a directory holds models, or is one."""
    return (path / CONFIG).is_file() or any((one / CONFIG).is_file() for one in path.iterdir() if one.is_dir())


def read_repository(path: Path) -> Legacy:
    """What every model of a repository says; the one that executes first.

    Raises:
        ArtifactError: a config.pbtxt or model.yaml is damaged.
        RecipeError: two models execute, and nothing says which one clients ask, or none does.
    """
    directories = [path] if (path / CONFIG).is_file() else [one for one in path.iterdir() if (one / CONFIG).is_file()]
    found = [_read(directory) for directory in sorted(directories, key=_place)]
    executing = [one for one in found if _executes(*one)]
    draft = _draft(found)
    executing = [one for one in executing if one[0].name != draft]
    if len(executing) != 1:
        raise _count(path, [model.name for model, _ in executing])
    engine = executing[0][0]
    if (engine.directory / "1" / "model.yaml").is_file():
        return _stock(engine, executing[0][1])
    read = [_settings(model, open_names) for model, open_names in found if model.name != draft]
    settings = [setting for part, _ in read for setting in part]
    unset = [one for _, part in read for one in part]
    settings += [setting for model, _ in found if model.name == draft for setting in _draft_settings(model)]
    ensemble = engine.parameter("layout") != "llm"
    legacy = Legacy(
        "a Triton model repository",
        engine.directory,
        tuple(settings),
        tuple(unset),
        clients="ensemble" if ensemble else "llm",
        model_name=None if ensemble else engine.name,
    )
    return _with_engine(legacy, engine)


def _place(directory: Path) -> tuple[int, str]:
    known = directory.name in _ORDER
    return (_ORDER.index(directory.name) if known else 0, directory.name)


def _read(directory: Path) -> tuple[Model, OpenFields]:
    """One model, and the fields that an unfilled placeholder leaves open."""
    path = directory / CONFIG
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error})", "write it as UTF-8 text") from None
    text = "\n".join("" if line.lstrip().startswith("#") else line for line in text.split("\n"))
    open_fields = tuple(dict.fromkeys(_OPEN.findall(text)))
    from google.protobuf.text_format import ParseError

    try:
        return Model(directory, parse(_OPEN.sub(_stand_in, text))), open_fields
    except ParseError as error:
        message = f"{path}: line {error} (protobuf text format)"
        raise ArtifactError(message, "fields and values are those of Triton's ModelConfig message") from None


def _stand_in(found: re.Match[str]) -> str:
    return found.group(0).replace("${" + found.group(2) + "}", _STAND_INS.get(found.group(1), "0"))


def _executes(model: Model, _: OpenFields) -> bool:
    if any(model.parameter(name) is not None for name in _ENGINE_PARAMETERS):
        return model.name not in _HELPERS
    has_document = (model.directory / "1" / "model.yaml").is_file()
    return has_document or (model.parameter("layout") is not None and model.name not in _HELPERS)


def _draft(found: Sequence[tuple[Model, OpenFields]]) -> str | None:
    """The model with the draft's engine, where the BLS model names one."""
    return next(
        (model.parameter("tensorrt_llm_draft_model_name") for model, _ in found if model.name == _ORDER[1]), None
    )


def _draft_settings(model: Model) -> list[Setting]:
    """Of the draft model's own configuration what differs from the model's: its engine, and its share of the memory."""
    given = [(name, model.parameter(name)) for name in ("gpt_model_path", "kv_cache_free_gpu_mem_fraction")]
    return [
        Setting("triton", f"draft_{name}", text, f"{model.name}/{CONFIG}")
        for name, text in given
        if text and not _NAMED.search(text)
    ]


def _count(path: Path, names: Sequence[str]) -> RecipeError:
    if names:
        hint = f"name the directory of one of them, such as {path / names[0]}"
        return RecipeError(
            [Problem("SOURCE", f"{path} has {len(names)} models that execute: {', '.join(names)}", hint)]
        )
    message = f"{path} has no model of TensorRT-LLM or trtbuild"
    hint = "its tensorrt_llm/config.pbtxt has a parameter gpt_model_path, or a file 1/model.yaml beside it"
    return RecipeError([Problem("SOURCE", message, hint)])


def _settings(model: Model, open_fields: OpenFields) -> tuple[list[Setting], list[Unset]]:
    where = f"{model.name}/{CONFIG}"
    section: Section = "own" if model.parameter("layout") is not None else "triton"
    open_names = {field for field, _ in open_fields}
    pairs = [pair for pair in _structure(model) if _field(pair[0]) not in open_names]
    pairs += [(name, str(value.string_value)) for name, value in sorted(model.config.parameters.items())]
    settings = [Setting(section, name, text, where) for name, text in pairs if text and not _NAMED.search(text)]
    unset = [Unset(name, text, where) for name, text in pairs if not text or _NAMED.search(text)]
    unset += [Unset(name, "${" + placeholder + "}", where) for name, placeholder in open_fields]
    return settings, unset


def _field(name: str) -> str:
    """The field of the message that a structural setting stands in."""
    if name.endswith("instance_count"):
        return "count"
    return "data_type" if name in _TYPES.values() else name


def _structure(model: Model) -> list[tuple[str, str]]:
    """What the message's own fields say, where they are there."""
    config = model.config
    batching, engine = config.dynamic_batching, model.name not in _HELPERS
    pairs = [("backend", str(config.backend))] if engine and config.backend else []
    if config.max_batch_size:
        pairs.append(("max_batch_size", str(config.max_batch_size)))
    if config.HasField("model_transaction_policy"):
        pairs.append(("decoupled", str(bool(config.model_transaction_policy.decoupled)).lower()))
    if config.HasField("dynamic_batching"):
        queue = batching.default_queue_policy
        pairs += [("preferred_batch_size", str(size)) for size in list(batching.preferred_batch_size)[:1]]
        pairs.append(("max_queue_delay_microseconds", str(batching.max_queue_delay_microseconds)))
        if batching.HasField("default_queue_policy"):
            pairs.append(("max_queue_size", str(queue.max_queue_size)))
    if config.instance_group:
        prefix = model.name.removeprefix("tensorrt_llm_") if model.name in _HELPERS else ""
        name = f"{prefix}_instance_count" if prefix else "instance_count"
        pairs.append((name, str(sum(group.count or 1 for group in config.instance_group))))
    if engine:
        tensors = [*config.input, *config.output]
        pairs += [(_TYPES[tensor.name], type_name(tensor)) for tensor in tensors if tensor.name in _TYPES]
    more = [field.name for field, _ in config.ListFields() if field.name not in _STRUCTURE]
    return pairs + [(name, " ".join(str(getattr(config, name)).split())) for name in more]


def _stock(engine: Model, open_fields: OpenFields) -> Legacy:
    """The container's own model: model.yaml, and what config.pbtxt says besides."""
    path = engine.directory / "1" / "model.yaml"
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError) as error:
        raise ArtifactError(f"{path}: cannot be read ({' '.join(str(error).split())})", "mend the file") from None
    if not isinstance(document, dict):
        raise ArtifactError(f"{path}: holds no mapping of LLM arguments", "mend the file")
    legacy = llm_document.read_document(
        document, f"{engine.name}/1/model.yaml", engine.directory, model_name=engine.name
    )
    settings, unset = _settings(engine, open_fields)
    return replace(
        legacy,
        form="a Triton model repository of the llmapi form",
        settings=(*legacy.settings, *settings),
        unset=(*legacy.unset, *unset),
    )


def _with_engine(legacy: Legacy, engine: Model) -> Legacy:
    """Add the engine that the model loads, where it is on this machine."""
    place = engine.parameter("gpt_model_path") or engine.parameter("engine_dir")
    if not place or _NAMED.search(place):
        return legacy
    directory = (engine.directory / Path(place).expanduser()).resolve()
    if not directory.is_dir() or not engine_directory.is_engine(directory):
        return legacy
    built: Any = engine_directory.read_engine(directory)
    return replace(
        legacy,
        form=f"{legacy.form} with {built.form}",
        settings=(*legacy.settings, *built.settings),
        unset=(*legacy.unset, *built.unset),
        version=built.version,
    )
