"""YAML text as plain values, within limits: nothing that a recipe says can hang or exhaust the reader."""

from __future__ import annotations

from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent

_MAX_DEPTH, _MAX_NODES = 50, 20_000


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
