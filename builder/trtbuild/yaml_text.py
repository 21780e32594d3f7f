"""YAML text as plain values, within limits, and plain values as YAML text.

Nothing that a recipe says can hang or exhaust the reader; readers of YAML 1.1 and 1.2 take what is written alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent

_MAX_DEPTH, _MAX_NODES = 50, 20_000
# Words that are no text to a reader of YAML 1.1 or 1.2 unless they are quoted, in lower case.
_NO_TEXT = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none"}


def parse_yaml(text: str) -> Any:
    """One YAML 1.2 document as plain values: ``2:4`` and ``no`` are text, duplicate keys are refused.

    Raises:
        YAMLError: it is no YAML, uses anchors or aliases, is nested too deeply, or holds a value that cannot be.
    """
    _check_events(text)
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        # The library's constructors of dates and tagged scalars let Python's own errors through.
        raise YAMLError(f"holds a value that cannot be read ({error})") from None


def _check_events(text: str) -> None:
    """Refuse what would grow or recurse while values are made: events come one by one, without recursion."""
    depth = nodes = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        if isinstance(event, AliasEvent) or (isinstance(event, NodeEvent) and event.anchor is not None):
            message = "& and * begin anchors and aliases, which recipes do not have: quote the text or write the value"
            raise MarkedYAMLError(problem=message, problem_mark=event.start_mark)
        if isinstance(event, CollectionStartEvent):
            depth += 1
        elif isinstance(event, CollectionEndEvent):
            depth -= 1
        nodes += isinstance(event, NodeEvent)
        if depth > _MAX_DEPTH:
            raise MarkedYAMLError(problem=f"is nested more than {_MAX_DEPTH} deep", problem_mark=event.start_mark)
        if nodes > _MAX_NODES:
            raise MarkedYAMLError(problem=f"holds more than {_MAX_NODES} values", problem_mark=event.start_mark)


def yaml_key(key: object) -> str:
    """A key of a mapping: as it is where it is a word or a whole number, else quoted."""
    text = str(key)
    return text if _is_word(text) or type(key) is int else json.dumps(text)


def yaml_scalar(value: Any, *, plain: bool = False) -> str:
    """A value on one line: JSON, but for numbers like 1e-05, which YAML 1.1 takes for text without a point.

    Args:
        value: of the types that JSON has; sequences and mappings become flow collections.
        plain: leave words unquoted, for people to read.
    """
    if isinstance(value, float):
        text = repr(value)
        mantissa, e, exponent = text.partition("e")
        return f"{mantissa}{'' if '.' in mantissa else '.0'}e{exponent}" if e else text
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(yaml_scalar(item, plain=plain) for item in value)}]"
    if isinstance(value, Mapping):
        pairs = (f"{yaml_key(key)}: {yaml_scalar(item, plain=plain)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    if plain and isinstance(value, str) and _is_word(value):
        return value
    return yaml_string(value) if isinstance(value, str) else json.dumps(value)


def _is_word(text: str) -> bool:
    return text.isidentifier() and text.isascii() and text.lower() not in _NO_TEXT


def yaml_string(value: object) -> str:
    """A double-quoted string that is valid YAML and valid JSON.

    Only what YAML cannot hold as it is becomes an escape: an emoji as JSON's pair of surrogate escapes would come back
    from a YAML reader as two broken characters.
    """
    quoted = json.dumps(str(value), ensure_ascii=False)
    return "".join(char if char.isprintable() or ord(char) > 0xFFFF else f"\\u{ord(char):04x}" for char in quoted)
