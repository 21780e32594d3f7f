"""What one recipe gets from engines and LLM API of its TensorRT-LLM release, and from the newest LLM API."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trtbuild import trtllm_engine_settings, trtllm_settings
from trtbuild.compat import facts as table
from trtbuild.format_support import Part, refused
from trtbuild.llm_keys import LLM_ARGUMENT, leaves
from trtbuild.llm_speculation import LLM_FIELDS, argument, members
from trtbuild.llm_validate import validate
from trtbuild.model import ModelFacts
from trtbuild.model_classes import class_list, refused_class
from trtbuild.plan import Cell, Comparison, Row
from trtbuild.recipe import Recipe
from trtbuild.releases import Flow, Release, newest, newest_of_all
from trtbuild.setting_values import Settings
from trtbuild.support import (
    QUANT_ALGO,
    group_sizes,
    refused_architecture,
    sm_version,
    speculative_method,
)
from trtbuild.trtllm_common import SPECULATIVE_FIELDS
from trtbuild.trtllm_settings import release_schema


@dataclass(frozen=True, slots=True)
class _Column:
    release: Release
    flow: Flow

    @property
    def title(self) -> str:
        return f"{self.release.version} {'engine' if self.flow == 'engine' else 'LLM API'}"


def compare(settings: Settings, facts: ModelFacts) -> Comparison:
    """The comparison for a recipe whose settings are resolved."""
    recipe = settings.recipe
    for_engine = recipe.runtime.kind == trtllm_engine_settings.KIND
    release = (trtllm_engine_settings if for_engine else trtllm_settings).planned_release(recipe)
    # Where the release has a flow no more or not yet, the newest in a container that has it: there is a choice to show.
    has_api = "llm-api" in release.line.flows and release.version != newest_of_all().version
    columns = [
        _Column(release if "engine" in release.line.flows else newest("engine"), "engine"),
        _Column(release if has_api else newest("llm-api"), "llm-api"),
        _Column(newest_of_all(), "llm-api"),
    ]
    asks: list[tuple[str, Callable[[_Column], Cell]]] = [
        ("runtime", lambda column: _runtime(column, release)),
        (f"model {facts.architecture}", lambda column: _model(facts.architecture, column)),
    ]
    asks += [(f"format {name}", _format(settings, name)) for name in recipe.compress.formats or ("none",)]
    if recipe.compress.kv_cache != "none":
        cache = recipe.compress.kv_cache
        asks.append((f"KV cache {cache}", lambda column: _on_gpu(recipe, column, "kv_cache", cache)))
    if recipe.compress.sparsity != "none":
        asks.append((f"sparsity {recipe.compress.sparsity}", _sparsity))
    if recipe.speculative.method != "none":
        name = recipe.speculative.method
        asks.append((f"speculation {name}", lambda column: _speculation(name, column)))
        given = [field for field in LLM_FIELDS[name] if field != "draft" and settings.given(f"speculative.{field}")]
        asks += [(f"speculative.{field}", _drafting(name, field)) for field in given]
    if recipe.model.adapters:
        asks.append(("LoRA adapters", lambda _: Cell("available")))
    asks += [(path, _setting(path)) for path in LLM_ARGUMENT if settings.given(path)]
    extra = [] if for_engine else leaves(dict(recipe.runtime.extra))
    asks += [(f"runtime.extra.{path}", _extra(path, value)) for path, value in extra]
    flags = recipe.runtime.extra if for_engine else ()
    asks += [(f"runtime.extra.{flag}", _flag) for flag in flags]
    return Comparison(
        columns=tuple(column.title for column in columns),
        rows=tuple(Row(what, tuple(look(column) for column in columns)) for what, look in asks),
    )


def _runtime(column: _Column, planned: Release) -> Cell:
    container = column.release.container
    where = f"container {container.tag}" if container else "no Triton container"
    if column.flow in planned.line.flows:
        return Cell("available", where)
    return Cell("available", f"{where}; {planned.version} has no {'engines' if column.flow == 'engine' else 'LLM API'}")


def _refusable(reason: str | None) -> Cell:
    return Cell("available") if reason is None else Cell("not available", reason)


def _model(architecture: str, column: _Column) -> Cell:
    if column.flow == "engine":
        return _refusable(refused_architecture(architecture))
    reason = refused_class(column.release, architecture)
    note = class_list(column.release).note(column.release.version)
    return Cell("available", note) if reason is None else Cell("not available", reason)


def _format(settings: Settings, name: str) -> Callable[[_Column], Cell]:
    group, allowed = settings["compress.group_size"], group_sizes(QUANT_ALGO[name] or "")

    def look(column: _Column) -> Cell:
        if allowed and group is not None and group not in allowed:
            return Cell("not available", f"groups of {' or '.join(map(str, allowed))} only, not {group}")
        return _on_gpu(settings.recipe, column, "weights", name)

    return look


def _on_gpu(recipe: Recipe, column: _Column, part: Part, name: str) -> Cell:
    sm = sm_version(recipe.target.gpu) if recipe.target.gpu else None
    reason = refused(part, name, column.flow, column.release.line, sm)
    if reason is None and sm is None:
        return Cell("available", "no GPU named")
    return _refusable(reason)


def _sparsity(column: _Column) -> Cell:
    return Cell("available", "--weight_sparsity" if column.flow == "engine" else "without more speed")


def _speculation(name: str, column: _Column) -> Cell:
    method = speculative_method(name)
    if column.flow == "engine":
        return Cell("available", method.engine) if method.engine else Cell("not available", "not in trtllm-build")
    known = method.decoding_type.get(column.release.line.schema or "")
    return Cell("available", f"decoding_type {known}") if known else Cell("not available", "TensorRT engines only")


def _drafting(method: str, field: str) -> Callable[[_Column], Cell]:
    """A field of the recipe's section, by the name that a version's class for the method gives it."""

    def look(column: _Column) -> Cell:
        if column.flow == "engine":
            taken = speculative_method(method).engine is not None and field in SPECULATIVE_FIELDS[method]
            return Cell("available") if taken else Cell("not available", "no counterpart")
        schema = release_schema(column.release)
        called, known = argument(field, method, schema), members(schema, method)
        if called not in known or known[called].status == "deprecated":
            return Cell("not available", f"no argument {called}" if called not in known else f"deprecated: {called}")
        return Cell("available") if called == field else Cell("renamed", called)

    return look


def _setting(path: str) -> Callable[[_Column], Cell]:
    argument = LLM_ARGUMENT[path]

    def look(column: _Column) -> Cell:
        if column.flow == "engine":
            return _engine_name(path)
        if release_schema(column.release).has(argument):
            return Cell("available") if path.endswith(argument) else Cell("available", argument)
        return Cell("not available", f"no argument {argument}")

    return look


def _engine_name(path: str) -> Cell:
    names = table("engine_names")
    if path == "model.trust_remote_code":
        return Cell("available")
    found = next((names[part][path] for part in ("build", "checkpoint", "triton") if path in names[part]), None)
    if found is None:
        return Cell("not available", "no counterpart")
    return Cell("available" if found.lstrip("-") == path.rpartition(".")[2] else "renamed", found)


def _flag(column: _Column) -> Cell:
    return Cell("available") if column.flow == "engine" else Cell("not available", "a flag of trtllm-build")


def _extra(path: str, value: object) -> Callable[[_Column], Cell]:
    def look(column: _Column) -> Cell:
        if column.flow == "engine":
            return Cell("not available", "an argument of the LLM API")
        schema = release_schema(column.release)
        problems = validate(_nested(path, value), schema, partial=True)
        # A part of a choice between classes is not judged alone.
        if not problems or schema.has(path):
            return Cell("available")
        first = problems[0]
        called = "there it is called "
        if first.hint.startswith(called):
            return Cell("renamed", first.hint.removeprefix(called))
        return Cell("not available", first.message.rpartition("; ")[2])

    return look


def _nested(path: str, value: object) -> dict[str, object]:
    first, _, rest = path.partition(".")
    return {first: _nested(rest, value) if rest else value}
