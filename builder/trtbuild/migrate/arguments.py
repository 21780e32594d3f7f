"""Text forms: the arguments of fill_template, and a command line of ``trtllm-build``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from trtbuild.errors import Problem, RecipeError
from trtbuild.migrate.fates import table
from trtbuild.migrate.legacy import Legacy, Setting, Unset

_COMMAND = "trtllm-build"
_PAIR = re.compile(r"[A-Za-z_]\w*:\S")
_CONFIG = re.compile(r"\S*config\.pbtxt$")
_MODELS = ("preprocessing", "postprocessing", "ensemble", "tensorrt_llm_bls", "tensorrt_llm")


def is_command_line(text: str) -> bool:
    """Whether the text calls ``trtllm-build``, or consists of its flags."""
    return any(Path(word).name == _COMMAND for word in text.split()) or text.lstrip().startswith("--")


def read_command_line(text: str, where: str, root: Path) -> Legacy:
    """The flags of one command; continued lines, comments and variables in front of the command are allowed.

    Raises:
        RecipeError: a quote is not closed, or there are two commands.
    """
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise _wrong(f"{where}: the command line cannot be read ({error})", "close the quote") from None
    calls = [index for index, word in enumerate(words) if Path(word).name == _COMMAND]
    if len(calls) > 1:
        raise _wrong(f"{where}: {_COMMAND} is called {len(calls)} times", "give one command")
    flags = words[calls[0] + 1 :] if calls else words
    settings: dict[str, Setting] = {}
    name = ""
    values: list[str] = []

    def put() -> None:
        if not name:
            return
        value = " ".join(values) if values else "true"
        if name in settings and settings[name].value != value:
            raise _wrong(f"{where}: --{name} is given twice", "keep one of them")
        settings[name] = Setting("build", name, value, where)

    for word in flags:
        if word.startswith("--"):
            put()
            head, equals, value = word[2:].partition("=")
            name, values = head.replace("-", "_"), [value] if equals else []
        elif name:
            values.append(word)
        else:
            raise _wrong(f"{where}: {word!r} stands before the first flag", f"give the flags of {_COMMAND} alone")
    put()
    return Legacy(f"a {_COMMAND} command line", root, tuple(settings.values()))


def is_fill_template(text: str) -> bool:
    """Whether some word of the text is a list of ``key:value``."""
    return any(_PAIR.match(word) for line in text.splitlines() for word in _words(line))


def read_fill_template(text: str, where: str, root: Path) -> Legacy:
    r"""The substitutions of one or several calls of fill_template.

    ``\,`` and ``\:`` stand for the characters (NVIDIA/TensorRT-LLM, triton_backend/tools/fill_template.py @2a9abd95).
    """
    settings: list[Setting] = []
    unset: list[Unset] = []
    names = table()["triton"]["placeholders"]
    for line in text.replace("\\\n", " ").splitlines():
        words = _words(line)
        place = f"{where}, {_model(words)}" if _model(words) else where
        for word in words:
            for key, value in _pairs(word) if _PAIR.match(word) else ():
                name = names.get(key, key)
                if not value or "${" in value:
                    unset.append(Unset(name, value, place))
                    continue
                if any((one.name, one.where) == (name, place) and one.value != value for one in settings):
                    raise _wrong(f"{place}: {key} is given twice, with different values", "keep one of them")
                settings.append(Setting("triton", name, value, place))
    order = {True: 0, False: 1}
    settings.sort(key=lambda one: order[not one.where.endswith(_MODELS[:-1])])
    return Legacy("the arguments of fill_template", root, tuple(settings), tuple(unset), clients="ensemble")


def _model(words: list[str]) -> str:
    """The model whose config.pbtxt a call fills."""
    files = [Path(word) for word in words if _CONFIG.match(word)]
    return files[0].parent.name if files and files[0].parent.name in _MODELS else ""


def _words(line: str) -> list[str]:
    """The words of one line; in bare arguments a backslash belongs to fill_template, in quotes as well."""
    try:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    except ValueError:  # pragma: no cover - shlex reads lazily
        return []
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "#", ""
    try:
        return list(lexer)
    except ValueError:
        return line.split()


def _pairs(word: str) -> Iterator[tuple[str, str]]:
    for part in _split(word, ","):
        key, colon, value = part.partition(":")
        if colon:
            yield key, value.replace("\\:", ":").replace("\\,", ",").replace("\\\\", "\\")


def _split(text: str, delimiter: str) -> list[str]:
    """Parts between delimiters that no backslash precedes; backslashes stay."""
    return re.split(rf"(?<!\\){re.escape(delimiter)}", text)


def _wrong(message: str, hint: str) -> RecipeError:
    return RecipeError([Problem("SOURCE", message, hint)])
