"""The part of the Compose Specification's schema that our files use, held strictly: an unknown key is a fault.

Keys and types: compose-spec/compose-spec, schema/compose-spec.json @00655e22.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_DURATION = re.compile(r"(\d+(us|ms|s|m|h))+")
_SIZE = re.compile(r"\d+(b|kb?|mb?|gb?)")
_NAME = re.compile(r"[a-zA-Z0-9._-]+")

# A type, a pattern, a list of items, a mapping with named keys (required ones first), or a mapping by pattern.
_DEVICE = {"!capabilities": [str], "driver": str, "count": int, "device_ids": [str], "options": dict}
_RESOURCES = {"limits": dict, "reservations": {"cpus": str, "memory": str, "devices": [_DEVICE]}}
_SERVICE: dict[str, Any] = {
    "image": str,
    "build": {"context": str, "dockerfile": str, "args": dict, "target": str},
    "command": [str],
    "entrypoint": [str],
    "environment": dict,
    "user": str,
    "ports": [str],
    "read_only": bool,
    "init": bool,
    "ipc": str,
    "tmpfs": [str],
    "shm_size": _SIZE,
    "ulimits": {re.compile("[a-z]+"): int},
    "cap_drop": [str],
    "cap_add": [str],
    "security_opt": [str],
    "deploy": {"resources": _RESOURCES},
    "healthcheck": {
        "test": [str], "interval": _DURATION, "timeout": _DURATION, "retries": int, "start_period": _DURATION,
        "disable": bool,
    },
    "stop_grace_period": _DURATION,
    "restart": re.compile("no|always|on-failure|unless-stopped"),
    "volumes": [str],
}  # fmt: skip
_FILE = {"name": re.compile("[a-z0-9][a-z0-9_-]*"), "!services": {_NAME: _SERVICE}, "volumes": dict, "networks": dict}


def faults(document: Any) -> list[str]:
    """Where a compose file is none, by path."""
    return list(_faults(document, _FILE, ""))


def _faults(value: Any, schema: Any, at: str) -> list[str]:
    if isinstance(schema, re.Pattern):
        return [] if isinstance(value, str) and schema.fullmatch(value) else [f"{at}: {value!r} is no {schema.pattern}"]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{at}: {value!r} is no list"]
        again = [f"{at}: {item!r} stands twice" for item in value if value.count(item) > 1]
        return again + [
            fault for index, item in enumerate(value) for fault in _faults(item, schema[0], f"{at}[{index}]")
        ]
    if isinstance(schema, Mapping):
        return _mapping(value, schema, at)
    return [] if type(value) is schema else [f"{at}: {value!r} is no {schema.__name__}"]


def _mapping(value: Any, schema: Mapping[Any, Any], at: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{at}: {value!r} is no mapping"]
    named = {str(key).removeprefix("!"): inner for key, inner in schema.items() if isinstance(key, str)}
    free = [(key, inner) for key, inner in schema.items() if isinstance(key, re.Pattern)]
    found = [f"{at}.{key[1:]} is missing" for key in named_required(schema) if key[1:] not in value]
    for key, item in value.items():
        inner = named.get(key) or next((one for pattern, one in free if pattern.fullmatch(key)), None)
        found += [f"{at}.{key} is unknown"] if inner is None else _faults(item, inner, f"{at}.{key}")
    return found


def named_required(schema: Mapping[Any, Any]) -> list[str]:
    """The keys that must be there, with the mark."""
    return [key for key in schema if isinstance(key, str) and key.startswith("!")]
