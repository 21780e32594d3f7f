"""Text forms: the arguments of fill_template, and a command line of ``trtllm-build``."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from trtbuild.errors import Problem, RecipeError
from trtbuild.migrate.fates import table
from trtbuild.migrate.legacy import Legacy, Setting, Unset

_COMMAND = "trtllm-build"
_FLAGS = re.compile(r"--[A-Za-z]")
_END = frozenset({"&&", "||", "|", ";", "&", ">", ">>", "2>&1"})
_PAIR = re.compile(r"[A-Za-z_]\w*:\S")
_CONFIG = re.compile(r"\S*config\.pbtxt$")
_MODELS = ("preprocessing", "postprocessing", "ensemble", "tensorrt_llm_bls", "tensorrt_llm")


def is_command_line(text: str) -> bool:
    """Whether some line calls ``trtllm-build``, or the text consists of its flags."""
    return bool(_FLAGS.match(text.lstrip())) or any(_calls(line) for line in _joined(text))


def read_command_line(text: str, where: str, root: Path) -> Legacy:
    """The flags of one command, in a script or alone; calls of fill_template in the same script count too.

    Raises:
        RecipeError: a quote is not closed, a flag is given twice, or there are two commands.
    """
    lines = _joined(text)
    calls = [line for line in lines if _calls(line)]
    if len(calls) > 1:
        raise _wrong(f"{where}: {_COMMAND} is called {len(calls)} times", "give one command")
    command = calls[0] if calls else " ".join(lines)
    try:
        words = shlex.split(command, comments=True)
    except ValueError as error:
        raise _wrong(f"{where}: the command line cannot be read ({error})", "close the quote") from None
    begin = next((index + 1 for index, word in enumerate(words) if _is_command(word)), 0)
    flags = list(itertools.takewhile(lambda word: word not in _END, words[begin:]))
    settings, unset = _settled(_pairs_of_flags(flags, where), where)
    legacy = Legacy(f"a {_COMMAND} command line", root, tuple(settings), tuple(unset))
    others = "\n".join(line for line in lines if "fill_template" in line)
    if not calls or not is_fill_template(others):
        return legacy
    filled = read_fill_template(others, where, root)
    return replace(
        filled,
        form=f"{legacy.form} with {filled.form}",
        settings=(*filled.settings, *legacy.settings),
        unset=(*filled.unset, *legacy.unset),
    )


def _settled(pairs: dict[str, str], where: str) -> tuple[list[Setting], list[Unset]]:
    """Flags with values, and those whose value only a shell knows."""
    settings = [Setting("build", name, value, where) for name, value in pairs.items() if "$" not in value]
    return settings, [Unset(name, value, where) for name, value in pairs.items() if "$" in value]


def _pairs_of_flags(words: Sequence[str], where: str) -> dict[str, str]:
    """Flags and values; a flag alone is a switch."""
    pairs: dict[str, str] = {}
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            head, equals, value = word[2:].partition("=")
            groups.append((head.replace("-", "_"), [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            raise _wrong(f"{where}: {word!r} stands before the first flag", f"give the flags of {_COMMAND} alone")
    for name, values in groups:
        value = " ".join(values) if values else "true"
        if pairs.setdefault(name, value) != value:
            raise _wrong(f"{where}: --{name} is given twice", "keep one of them")
    return pairs


def _joined(text: str) -> list[str]:
    """Lines without comments, with continued ones as one."""
    return [line for line in text.replace("\\\n", " ").splitlines() if not line.lstrip().startswith("#")]


def _calls(line: str) -> bool:
    return any(_is_command(word) for word in line.split())


def _is_command(word: str) -> bool:
    return Path(word).name == _COMMAND


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
    for line in _joined(text):
        words = _words(line)
        place = f"{where}, {_model(words)}" if _model(words) else where
        for word in words:
            for key, value in _pairs(word) if _PAIR.match(word) else ():
                name = names.get(key, key)
                if not value or "$" in value:
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
