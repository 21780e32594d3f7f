"""Strict rendering of the shipped templates, and where the shipped files are.

Templates hold no logic beyond ``if`` and ``for``. A name that the context lacks is an error, never an empty string.
Strings reach a file through a filter that writes a literal of that file's language, so that a quote in a model name
cannot break it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from trtbuild.yaml_text import yaml_string

_PB_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def data_dir(kind: str) -> Path:
    """The directory of shipped files of one kind (``templates``, ``model_repo``, ``docker``).

    They lie at the top of a checkout, and under ``trtbuild/_data`` in an installed wheel.
    """
    package = Path(__file__).resolve().parent
    installed = package / "_data" / kind
    return installed if installed.is_dir() else package.parent.parent / kind


def render(template_name: str, context: Mapping[str, Any]) -> str:
    """The text of one template, for example ``render("llm/config.pbtxt.j2", {...})``.

    Raises:
        jinja2.UndefinedError: a name in the template is not in the context (our bug, not the user's).
    """
    return _environment().get_template(template_name).render(dict(context))


def pb_string(value: object) -> str:
    """A string literal of the protobuf text format."""
    return '"' + "".join(_PB_ESCAPES.get(char) or _pb_control(char) for char in str(value)) + '"'


def _pb_control(char: str) -> str:
    return char if char.isprintable() or ord(char) > 0x7F else f"\\{ord(char):03o}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(data_dir("templates")),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 -- we write configuration files, not HTML; the filters below quote
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["pb"] = pb_string
    environment.filters["yq"] = yaml_string
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    return environment
