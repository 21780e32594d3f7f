"""Look-ups in the version facts of other projects, which are data: ``compat.toml`` and the tables in ``_compat/``."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("compat.toml")
DATA = _FILE.with_name("_compat")


@cache
def compat() -> Mapping[str, Any]:
    """The whole table, parsed once."""
    return tomllib.loads(_FILE.read_text(encoding="utf-8"))


@cache
def facts(name: str) -> Mapping[str, Any]:
    """One file of ``_compat/`` by its name without ending, for example ``containers``; parsed once."""
    return tomllib.loads((DATA / f"{name}.toml").read_text(encoding="utf-8"))


def causal_lm_class(model_type: str) -> str | None:
    """The Transformers class of a causal language model of this type, or None where Transformers has none."""
    known: Mapping[str, str] = compat()["transformers"]["causal_lm"]
    return known.get(model_type)


def nearest_model_types(model_type: str) -> list[str]:
    """Known model types that are spelled like this one."""
    return difflib.get_close_matches(model_type, list(compat()["transformers"]["causal_lm"]), n=3)


def refusal(model_type: str) -> str | None:
    """Why the embedded engine cannot run this model type, or None."""
    for row in compat()["refused"]:
        if model_type in row["model_types"]:
            return str(row["reason"])
    return None
