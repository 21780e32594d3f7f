"""Which form an older deployment has, and what it says.

A repository's model is followed to its engine directory where that lies on this machine: an engine's sizes are part of
the deployment.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ruamel.yaml.error import YAMLError

from trtbuild.errors import Problem, RecipeError
from trtbuild.migrate import arguments, checkpoint_directory, engine_directory, llm_document, package_recipe, repository
from trtbuild.migrate.legacy import Legacy
from trtbuild.migrate.places import is_checkpoint
from trtbuild.yaml_text import parse_yaml

_MAX_BYTES = 4 << 20
_FORMS = (
    "a Triton model repository, an engine directory, a TensorRT-LLM checkpoint, a model.yaml with LLM arguments, or a "
    "text with the arguments of fill_template or trtllm-build"
)


def read_source(source: str) -> Legacy:
    """What the deployment at `source` says; ``-`` is standard input.

    Raises:
        RecipeError: it is none of the forms, or says two things at once.
        ArtifactError: a file of it is damaged.
    """
    if source == "-":
        return _text(sys.stdin.buffer.read(_MAX_BYTES + 1), "standard input", Path.cwd())
    path = Path(source).expanduser()
    if path.is_dir():
        return _directory(path)
    if not path.exists():
        raise _wrong(f"{path} does not exist", f"name {_FORMS}")
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    return _text(data, path.name, path.absolute().parent)


def _directory(path: Path) -> Legacy:
    if package_recipe.is_package(path):
        return package_recipe.read_package(path)
    if engine_directory.is_engine(path):
        return engine_directory.read_engine(path)
    if repository.is_repository(path):
        return repository.read_repository(path)
    if checkpoint_directory.is_rank_checkpoint(path):
        return checkpoint_directory.read_rank_checkpoint(path)
    for name in ("model.yaml", "llm_args.yaml"):
        if (path / name).is_file():
            return _text((path / name).read_bytes(), name, path)
    if is_checkpoint(path):
        raise _wrong(f"{path} is an original checkpoint, no deployment", f"use trtbuild init {path}")
    raise _wrong(f"{path} is none of what can be migrated", f"name {_FORMS}")


def _text(data: bytes, where: str, root: Path) -> Legacy:
    """A file by its content: a command line, fill_template arguments or LLM arguments."""
    if len(data) > _MAX_BYTES:
        raise _wrong(f"{where} holds more than {_MAX_BYTES} bytes", f"name {_FORMS}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _wrong(f"{where} is not UTF-8 text (byte {error.start})", f"name {_FORMS}") from None
    if "\0" in text:
        raise _wrong(f"{where} is a binary file", f"name {_FORMS}")
    if not text.strip():
        raise _wrong(f"{where} is empty", f"name {_FORMS}")
    if arguments.is_command_line(text):
        return arguments.read_command_line(text, where, root)
    try:
        document = parse_yaml(text)
    except YAMLError as error:
        document, reason = None, " ".join(str(error).split())
    else:
        reason = "it holds no mapping of LLM arguments"
    # `a:1,b:2` without spaces is text for YAML, and LLM arguments are a mapping.
    if isinstance(document, dict):
        return llm_document.read_document(document, where, root)
    if arguments.is_fill_template(text):
        return arguments.read_fill_template(text, where, root)
    raise _wrong(f"{where} is none of what can be migrated ({reason})", f"name {_FORMS}")


def _wrong(message: str, hint: str) -> RecipeError:
    return RecipeError([Problem("SOURCE", message, hint)])
