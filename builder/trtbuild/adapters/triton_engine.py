"""A model against its engine: limits, transaction policy, tokenizer."""

from __future__ import annotations

import importlib
import json
import unicodedata
from pathlib import Path
from typing import Any

from trtbuild.adapters import triton_built, triton_llmapi
from trtbuild.adapters.triton_config import Model
from trtbuild.errors import Problem
from trtbuild.trtllm_build import DRAFT

_LIMITS = ("max_seq_len", "max_input_tokens", "max_output_tokens", "default_max_tokens", "cancellation_check_period_ms")
_DRAFT_MODEL = "tensorrt_llm_draft"
_PROBE = "The quick brown fox: 1 + 1 = 2."
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")

# Runtimes whose engine directory is a checkpoint with a file of ours beside it.
_OURS = ("embedded", "trtllm")


def check_against_engine(model: Model, engine: Path | None) -> list[Problem]:
    """Faults between a model of ours and the engine directory it loads; other models are not judged.

    A TensorRT engine lies where the server sees it: without `engine` it is judged only if it lies there on this host.
    """
    if model.parameter("gpt_model_path"):
        built = Path(str(model.parameter("gpt_model_path")))
        if engine is not None:
            built = triton_built.place(engine / DRAFT if model.name == _DRAFT_MODEL else engine)
        return triton_built.check_engine(model, built)
    name = next((name for name in ("engine_dir", "tokenizer_dir") if model.parameter(name) is not None), None)
    if name is None:
        return []
    directory = engine or (model.directory / str(model.parameter(name))).resolve()
    if not directory.is_dir():
        message = f"{name} {model.parameter(name)!r}: there is no directory {directory}"
        return [model.problem(message, "keep engine/ and model_repository/ of the package together")]
    limits, problems = _limits(model)
    if model.parameter("runtime") not in _OURS:
        return problems + triton_built.check_limits(model, limits, directory) + _tokenizer_of(model, directory, {})
    settings = _settings(model, directory, problems)
    checkpoint = _read_json(directory / "config.json", problems)
    if settings is not None:
        problems += _sizes(model, limits, settings)
    return problems + ([] if checkpoint is None else _tokenizer_of(model, directory, checkpoint))


def _tokenizer_of(model: Model, directory: Path, checkpoint: dict[str, Any]) -> list[Problem]:
    """Each tokenizer is judged once: where text becomes tokens."""
    reads_text = model.parameter("layout") != "ensemble" or model.name == "preprocessing"
    return _tokenizer(directory, checkpoint) if reads_text else []


def _settings(model: Model, directory: Path, problems: list[Problem]) -> dict[str, Any] | None:
    """What the engine directory says of its runtime and sizes: engine.json, or the LLM arguments."""
    if model.parameter("runtime") != "trtllm":
        return _read_json(directory / "engine.json", problems)
    args, faults = triton_llmapi.read_args(directory / triton_llmapi.ARGS_FILE, f"engine/{triton_llmapi.ARGS_FILE}")
    problems += faults
    if faults:
        return None
    problems += triton_llmapi.check_args(model, args)
    problems += triton_llmapi.check_own(args)
    problems += triton_llmapi.check_adapters(model, args, directory)
    return {"runtime": "trtllm", "max_seq_len": args.get("max_seq_len"), "source": triton_llmapi.ARGS_FILE}


def _limits(model: Model) -> tuple[dict[str, int], list[Problem]]:
    limits: dict[str, int] = {}
    problems: list[Problem] = []
    for name in _LIMITS:
        text = model.parameter(name)
        if text is None:
            continue  # reported with the layout's other missing parameters
        if text.isdecimal() and int(text) > 0:
            limits[name] = int(text)
        else:
            problems.append(model.problem(f"parameter {name} is {text!r}", "a whole number above 0"))
    trust = model.parameter("trust_remote_code")
    if trust not in (None, "true", "false"):
        problems.append(model.problem(f"parameter trust_remote_code is {trust!r}", "true or false"))
    return limits, problems


def _read_json(path: Path, problems: list[Problem]) -> dict[str, Any] | None:
    """The object in `path`; what is wrong with the file goes to `problems`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(Problem(f"engine/{path.name}", "the file is missing", "build the package again"))
        return None
    except (OSError, ValueError) as error:
        problems.append(Problem(f"engine/{path.name}", f"cannot be read ({error})", "build the package again"))
        return None
    if isinstance(data, dict):
        return data
    problems.append(Problem(f"engine/{path.name}", "does not hold a JSON object", "build the package again"))
    return None


def _sizes(model: Model, limits: dict[str, int], settings: dict[str, Any]) -> list[Problem]:
    """What the door lets in must fit into the engine."""
    problems = []
    if settings.get("runtime") != model.parameter("runtime"):
        message = (
            f"the repository is for the runtime {model.parameter('runtime')}, engine.json for {settings.get('runtime')}"
        )
        problems.append(model.problem(message, "build the package again"))
    longest = settings.get("max_seq_len")
    ours = limits.get("max_seq_len")
    if isinstance(longest, int) and ours is not None and ours != longest:
        message = f"max_seq_len is {ours}, and the engine's is {longest} ({settings.get('source', 'engine.json')})"
        problems.append(model.problem(message, f"write {longest}"))
    for name, room in (("max_input_tokens", 1), ("max_output_tokens", 1)):
        if name in limits and isinstance(longest, int) and limits[name] > longest - room:
            message = f"{name} is {limits[name]}, and the engine takes {longest} tokens with prompt and answer together"
            problems.append(model.problem(message, f"at most {longest - room}"))
    if limits.get("default_max_tokens", 0) > limits.get("max_output_tokens", 0):
        message = f"default_max_tokens {limits['default_max_tokens']} exceeds max_output_tokens"
        problems.append(model.problem(message, "lower it"))
    return problems


def _tokenizer(directory: Path, checkpoint: dict[str, Any]) -> list[Problem]:
    """There and back again through the tokenizer, and every token known to the model."""
    path = directory / "tokenizer.json"
    where = f"engine/{path.name}"
    if not path.is_file():
        if any((directory / name).is_file() for name in _TOKENIZER_FILES):
            return []  # read by Transformers' own Python code, which this process does not load
        return [Problem("engine", "there are no tokenizer files", f"one of: {', '.join(_TOKENIZER_FILES)}")]
    try:
        # Without stubs, and absent where nothing but planning is installed.
        tokenizers = importlib.import_module("tokenizers")
    except ImportError:
        return []  # a host that only plans and packages
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception for a file that it cannot read
        return [Problem(where, f"cannot be read ({error})", "take the tokenizer of the model's own checkpoint")]
    ids = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    problems = []
    if not ids or _plain(_PROBE) not in _plain(tokenizer.decode(ids)):
        shown = tokenizer.decode(ids)
        message = f"the text {_PROBE!r} comes back as {shown!r} after encoding and decoding"
        problems.append(Problem(where, message, "take the tokenizer of the model's own checkpoint"))
    size = checkpoint.get("vocab_size")
    largest = max(tokenizer.get_vocab().values(), default=0)
    if isinstance(size, int) and ids and max(ids) >= size:
        message = f"token {max(ids)} is none of the model's {size} (vocab_size of config.json; the file has {largest})"
        problems.append(Problem(where, message, "take the tokenizer of the model's own checkpoint"))
    return problems


def _plain(text: str) -> str:
    """What survives every usual normalizer: letters and digits without case and spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(char for char in folded if char.isalnum())
