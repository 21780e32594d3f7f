"""What of speculation the LLM API of a release does not do, and drafts that do not fit the model.

Bounds of ``draft_len_schedule``: tensorrt_llm/llmapi/llm_args.py, `validate_draft_len_schedule_and_sort`, in the same
words in copies of late 2025 and of spring 2026; the newest asks that its smallest key has `max_draft_len`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trtbuild.compat import facts as table
from trtbuild.eagle3_draft import LEAST_LAYERS, few, misfits
from trtbuild.errors import Problem
from trtbuild.llm_keys import leaves
from trtbuild.llm_schema import Schema
from trtbuild.llm_speculation import (
    DRAFT_ARGUMENTS,
    LLM_FIELDS,
    SECTION,
    TAKES_DRAFT,
    argument,
    captured_layers,
    eagle3_draft,
    members,
    speculation,
    written,
)
from trtbuild.llm_speculation_conflicts import conflicts
from trtbuild.llm_validate import unknown_argument
from trtbuild.model import ModelFacts
from trtbuild.model_classes import refused_class
from trtbuild.recipe_speculative import Speculative
from trtbuild.releases import Release
from trtbuild.setting_values import Settings
from trtbuild.support import speculative_method
from trtbuild.trtllm_common import draft_refusals, unread_speculative

_AT, _DRAFT = "speculative.method", "speculative.draft"
_EXTRA = f"runtime.extra.{SECTION}"


def section_mistakes(settings: Settings, schema: Schema) -> Iterable[Problem]:
    """Keys of ``runtime.extra.speculative_config`` that the recipe's own section says; others may stand beside it."""
    method = settings.recipe.speculative.method
    given = settings.recipe.runtime.extra.get(SECTION)
    if method == "none" or not isinstance(given, Mapping):
        return
    said = {argument(name, method, schema): f"speculative.{name}" for name in LLM_FIELDS[method]}
    said |= {"decoding_type": _AT} | dict.fromkeys(DRAFT_ARGUMENTS, _DRAFT)
    for path, _ in leaves(given):
        if path in said:
            yield Problem(f"{_EXTRA}.{path}", f"the recipe says it in {said[path]}", "set it there")


def with_section(settings: Settings, schema: Schema) -> dict[str, Any]:
    """``runtime.extra`` with the recipe's section merged in, to be held against the schema as one document."""
    extra = dict(settings.recipe.runtime.extra)
    given = extra.get(SECTION)
    if settings.recipe.speculative.method != "none" and isinstance(given, Mapping):
        extra[SECTION] = written(speculation(settings, schema), None) | dict(given)
    return extra


def speculation_refusals(settings: Settings, facts: ModelFacts, release: Release, schema: Schema) -> Iterable[Problem]:
    """Methods, fields, combinations and drafts that this release does not take."""
    recipe = settings.recipe
    method = recipe.speculative.method
    yield from unread_speculative(recipe, LLM_FIELDS)
    if method == "none" and not recipe.runtime.extra.get(SECTION):
        return
    if method != "none" and not members(schema, method):
        message = (
            f"{method}: the LLM API of TensorRT-LLM {release.version} has no such method, only TensorRT engines do"
        )
        yield Problem(_AT, message, "use none")
        return
    yield from conflicts(settings, facts, "" if method == "none" else method, schema.header.name, release.version)
    if method == "none":
        return
    yield from _fields(settings, schema, method)
    yield from length_refusals(settings)
    if method in TAKES_DRAFT:
        yield from missing_draft(recipe.speculative)
    if method == "draft_target":
        yield from _draft_model(settings, facts, release)
    elif method == "eagle3":
        yield from _eagle3(settings, facts, release)
    elif method == "mtp":
        yield from _mtp(settings, facts, schema)


def _fields(settings: Settings, schema: Schema, method: str) -> Iterable[Problem]:
    known = members(schema, method)
    key = speculative_method(method).decoding_type[schema.header.name]
    for name in LLM_FIELDS[method]:
        called = argument(name, method, schema)
        if called in known or not settings.given(f"speculative.{name}"):
            continue
        message, hint = unknown_argument(schema, f"{SECTION}.{name}", name, known)
        yield Problem(f"speculative.{name}", f"{message} ({key})", hint)


def missing_draft(section: Speculative) -> Iterable[Problem]:
    """A method that takes a draft, without a draft and without one to train."""
    if section.draft is not None or section.train is not None:
        return
    what, hint = "a draft that was trained for the model", "name its directory, or train it (speculative.train)"
    if section.method == "draft_target":
        what, hint = "a draft model", "name its directory"
    yield Problem(_DRAFT, f"is missing, and {section.method} needs {what}", hint)


def length_refusals(settings: Settings) -> Iterable[Problem]:
    """Drafts that are longer than a request can be, and schedules that contradict themselves."""
    longest, at = settings["speculative.max_draft_len"], "speculative.max_draft_len"
    room = settings["runtime.max_seq_len"]
    if longest >= room:
        message = f"{longest}: a request has at most {room} tokens (runtime.max_seq_len), its prompt's first among them"
        yield Problem(at, message, f"use less than {room}")
    schedule, at = settings.recipe.speculative.draft_len_schedule, "speculative.draft_len_schedule"
    if schedule is None:
        return
    if schedule.get(1) != longest:
        said = "no draft length for 1 request" if 1 not in schedule else f"{schedule[1]} for 1 request"
        yield Problem(at, f"has {said}, and max_draft_len is {longest}", f"write 1: {longest}")
    for batch, length in sorted(schedule.items()):
        if length > longest:
            yield Problem(f"{at}.{batch}", f"{length} is more than max_draft_len {longest}", f"use at most {longest}")


def _draft_model(settings: Settings, facts: ModelFacts, release: Release) -> Iterable[Problem]:
    draft = settings.draft.facts if settings.draft else None
    if draft is None:
        return
    yield from draft_refusals(settings, facts, draft, refused_class(release, draft.architecture))
    if draft.vocab_size > facts.vocab_size:
        message = f"has a vocabulary of {draft.vocab_size}, and the model knows {facts.vocab_size} tokens"
        yield Problem(
            _DRAFT, message, "use a draft model of the same family: its token ids go to the model as they are"
        )


def _eagle3(settings: Settings, facts: ModelFacts, release: Release) -> Iterable[Problem]:
    if facts.architecture in table("speculative")["eagle3"]["no"]:
        yield Problem(_AT, f"eagle3: TensorRT-LLM lists none for {facts.architecture}", "use another method")
    at, layers = "speculative.eagle3_layers_to_capture", captured_layers(settings, facts)
    named = settings.has(at) and settings[at] is not None
    if facts.num_layers < LEAST_LAYERS and not named:
        message = f"is not set, and a model of {facts.num_layers} layers has none of those that TensorRT-LLM captures"
        yield Problem(at, message, "name the layers that the draft was trained on")
    beyond = [layer for layer in layers if named and not 0 <= layer < facts.num_layers]
    if beyond:
        message = f"{beyond[0]}: the model has {facts.num_layers} layers"
        yield Problem(at, message, f"name layers from 0 to {facts.num_layers - 1}")
    if named and len(set(layers)) < len(layers):
        yield Problem(at, f"{list(layers)} names a layer twice", "name each layer once")
    draft = eagle3_draft(settings)
    if draft is None:
        return
    if draft.captured is not None and tuple(sorted(set(layers))) != draft.captured:
        yield _other_layers(draft.captured, layers, release, named=named)
    longest = settings["runtime.max_seq_len"]
    if draft.context_length < longest:
        message = f"knows {draft.context_length} positions, and runtime.max_seq_len is {longest}"
        yield Problem(_DRAFT, message, f"use runtime.max_seq_len: {draft.context_length}, or another draft")
    for message in few(misfits(draft, facts, len(set(layers)))):
        yield Problem(_DRAFT, message, "use a draft that was trained for this model")


def _other_layers(trained: tuple[int, ...], layers: tuple[int, ...], release: Release, *, named: bool) -> Problem:
    """The draft would read other layers than those that it was trained on."""
    if named:
        message = f"{list(layers)}: the draft was trained on the layers {list(trained)}"
        return Problem("speculative.eagle3_layers_to_capture", message, "remove it")
    message = f"was trained on the layers {list(trained)}, and TensorRT-LLM {release.version} captures others"
    return Problem(_DRAFT, message, "use a newer runtime.version")


def _mtp(settings: Settings, facts: ModelFacts, schema: Schema) -> Iterable[Problem]:
    section, known = settings.recipe.speculative, members(schema, "mtp")
    modules, at = section.num_nextn_predict_layers, "speculative.num_nextn_predict_layers"
    if modules is not None and known["num_nextn_predict_layers"].status == "deprecated":
        message = "is no longer meant to be set in this version, which calls it max_draft_len"
        yield Problem(at, message, f"write max_draft_len: {modules}")
    if modules is not None and section.max_draft_len not in (None, modules):
        message = f"{modules}, and max_draft_len is {section.max_draft_len}: each module drafts one token"
        yield Problem(at, message, "remove it")
    drafts = table("speculative")["mtp"]["model_types"]
    if not facts.mtp_layers:
        message = "mtp: the model has no layers that predict further tokens (num_nextn_predict_layers in config.json)"
        yield Problem(_AT, message, "use ngram, or a method with a draft")
    elif facts.model_type not in drafts:
        message = f"mtp: TensorRT-LLM drafts with the layers of {', '.join(drafts)} only, not of {facts.model_type}"
        yield Problem(_AT, message, "use another method")
    elif settings["compress.format"] != "none" or settings["compress.sparsity"] != "none":
        message = "mtp: trtbuild compresses the decoder's layers and would leave out those that predict further tokens"
        yield Problem(_AT, message, "use compress.format: none, or another method")


def speculation_warnings(settings: Settings, facts: ModelFacts, release: Release, schema: Schema) -> list[str]:
    """What is allowed and may still surprise."""
    recipe = settings.recipe
    method = recipe.speculative.method
    if method == "none" and any("model" in key for key in recipe.runtime.extra.get(SECTION) or {}):
        return [f"{_EXTRA} names a draft model on the serving host: the package has none"]
    if not members(schema, method):
        return []
    warnings = _sampling(settings, release, schema)
    if method == "ngram":
        warnings.append("TensorRT-LLM switches its overlap scheduler off for ngram: see that drafts gain more")
    if recipe.model.adapters:
        warnings.append("TensorRT-LLM calls speculation with LoRA adapters untested")
    if method == "eagle3" and facts.architecture not in table("speculative")["eagle3"]["yes"]:
        warnings.append(
            f"nothing records that TensorRT-LLM {release.version} drafts for {facts.architecture} by EAGLE-3"
        )
    tokens = settings["runtime.max_batch_size"] * (settings["speculative.max_draft_len"] + 1)
    if tokens > settings["runtime.max_num_tokens"]:
        warnings.append(
            f"a full batch verifies {tokens} tokens in a step, and runtime.max_num_tokens is "
            f"{settings['runtime.max_num_tokens']}: fewer requests will run at once"
        )
    draft = settings.draft.facts if settings.draft else None
    if draft is not None and draft.vocab_size != facts.vocab_size:
        warnings.append(f"the draft's vocabulary has {draft.vocab_size} entries, the model's {facts.vocab_size}")
    return warnings


def _sampling(settings: Settings, release: Release, schema: Schema) -> list[str]:
    """Whether requests can be sampled where one engine has model and draft."""
    section = settings.recipe.speculative
    one = section.method == "mtp" or (section.method == "eagle3" and section.eagle3_one_model is not False)
    if one and "allow_advanced_sampling" not in members(schema, section.method):
        return [f"TensorRT-LLM {release.version} verifies these drafts greedily: the server refuses to sample"]
    if one and section.allow_advanced_sampling is False:
        return ["allow_advanced_sampling: false: the server refuses to sample"]
    return []
