"""The runtime that the new recipe is for, and which fields it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trtbuild.build_flags import flag_table
from trtbuild.compat import facts
from trtbuild.errors import CompatibilityError, Problem, RecipeError
from trtbuild.llm_keys import LLM_ARGUMENT
from trtbuild.llm_schema import Schema, load_schema
from trtbuild.llm_speculation import members
from trtbuild.llm_validate import validate
from trtbuild.migrate.fates import table
from trtbuild.migrate.values import text
from trtbuild.recipe_fields import RuntimeKind
from trtbuild.refusals import embedded_takes
from trtbuild.releases import Flow, Release, find_release, newest
from trtbuild.trtllm_build_extra import extra_problems
from trtbuild.trtllm_engine_refusals import NOT_WRITTEN

_ONE = "the embedded runtime runs on one device"
# Said to TensorRT-LLM in other words than the field's value.
_OTHER_WORDS = ("compress.kv_cache", "runtime.cuda_graph_config.enabled")


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of runtime and, for TensorRT-LLM, its release; `gpu` serves."""

    kind: RuntimeKind
    release: Release | None = None
    gpu: str | None = None

    @property
    def schema(self) -> Schema | None:
        """The arguments of the LLM API, where it is the target."""
        if self.kind != "trtllm" or self.release is None or self.release.line.schema is None:
            return None
        return load_schema(self.release.line.schema)

    @property
    def described(self) -> str:
        """The runtime, as a sentence calls it."""
        return self.kind if self.release is None else f"{self.kind} {self.release.version}"

    def flag_value(self, name: str, value: Any) -> str | None:
        """What a plugin of ``trtllm-build`` says in ``runtime.extra``; None where it is not free or the default."""
        if self.kind != "trtllm-engine" or self.release is None or name not in table()["targets"]["flags"]:
            return None
        flags = flag_table(self.release.version)
        said = {"true": "enable", "false": "disable", "none": "disable"}.get(text(value).lower(), text(value))
        problems = extra_problems({name: said}, flags, sparse=False, fp8_attention=True)
        return None if problems or said == str(flags.flags[name].default) else said

    def refuses(self, field: str, value: Any) -> str | None:
        """Why the new runtime does not take a field with this value, or None where it does."""
        elsewhere = self._of_others(field, value)
        if elsewhere is not None:
            return elsewhere
        if self.kind == "embedded":
            return _embedded(field, value)
        if self.kind == "trtllm-engine":
            return _engine(field, value)
        argument, schema = LLM_ARGUMENT.get(field), self.schema
        if field == "speculative.method" and schema is not None and value != "none" and not members(schema, value):
            return f"{value}: only TensorRT engines have it"
        if argument is None or schema is None or field in _OTHER_WORDS:
            return None
        problems = validate(nested(argument, value), schema, partial=True)
        return problems[0].message if problems else None

    def _of_others(self, field: str, value: Any) -> str | None:
        """Why a field that one kind of runtime alone has is of no use to this one."""
        targets = table()["targets"]
        if field in targets["llm_api"] and self.kind != "trtllm":
            return "only the trtllm runtime has it"
        if field == "runtime.build_in" and self.kind != "trtllm-engine" and value != "auto":
            return "only TensorRT engines are built"
        if field in targets["own"] and self.kind != "embedded" and value != "auto":
            return "only the embedded runtime has it"
        return None


def choose_target(kind: RuntimeKind, version: str | None, gpu: str | None, *, option: str = "--to") -> Target:
    """The target that the command line asks for; `option` is the one that names the runtime.

    Raises:
        RecipeError: `version` is not known, or the runtime has none.
        CompatibilityError: that version does not have this runtime.
    """
    if kind == "embedded":
        if version is not None:
            raise RecipeError(
                [Problem("--version", f"{version}: the embedded runtime has trtbuild's own", "remove it")]
            )
        return Target(kind, gpu=gpu)
    flow: Flow = "llm-api" if kind == "trtllm" else "engine"
    found = find_release(version, flow=flow)
    if isinstance(found, Problem):
        raise RecipeError([Problem("--version", found.message, found.hint.partition("; or set")[0])])
    if flow not in found.line.flows:
        has = "the LLM API only" if "llm-api" in found.line.flows else "TensorRT engines only"
        message = f"--version: TensorRT-LLM {found.version} has {has}"
        raise CompatibilityError(message, f"use {newest(flow).version}, or another {option}")
    return Target(kind, found, gpu)


def nested(path: str, value: Any) -> dict[str, Any]:
    """A document with one value at a dotted path."""
    first, _, rest = path.partition(".")
    return {first: nested(rest, value) if rest else value}


def _embedded(field: str, value: Any) -> str | None:
    if field in table()["targets"]["trtllm"]:
        return "only the runtimes of TensorRT-LLM have it"
    if field in table()["targets"]["embedded"]:
        many = field != "model.adapters"
        return None if many and value == 1 else _ONE if many else "the embedded runtime has no adapters yet"
    return None if embedded_takes(field) else "only the trtllm runtime has it"


def _engine(field: str, value: Any) -> str | None:
    names: Mapping[str, Any] = facts("engine_names")
    known = {path for part in ("build", "checkpoint", "triton") for path in names[part]} | {"model.trust_remote_code"}
    if field in NOT_WRITTEN and value != 1:
        return NOT_WRITTEN[field]
    return None if field not in LLM_ARGUMENT or field in known else "TensorRT engines have no counterpart of it"
