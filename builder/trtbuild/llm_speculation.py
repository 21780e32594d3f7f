"""Speculation in the LLM API: the recipe's section as values, and as ``speculative_config`` in a version's own words.

Fields carry the LLM API's names. Which of them a method reads is here; which of them a version has, and under which
`decoding_type`, are the argument schema and ``_compat/speculative.toml``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtbuild.draft import DRAFT_ROLE
from trtbuild.eagle3_draft import CAPTURED_BY_DEFAULT, Eagle3
from trtbuild.llm_schema import Field, Schema
from trtbuild.model import ModelFacts
from trtbuild.setting_values import Settings
from trtbuild.support import speculative_method

SECTION, DRAFT_PLACE = "speculative_config", "draft"
# The draft's place: the newer name first, which the older releases do not have.
DRAFT_ARGUMENTS = ("speculative_model", "speculative_model_dir")
_LENGTH, _MODULES, _SCHEDULE = "max_draft_len", "num_nextn_predict_layers", "draft_len_schedule"
_CAPTURED, _SAMPLING = "eagle3_layers_to_capture", "allow_advanced_sampling"
_ALL = (_LENGTH, "max_concurrency", _SCHEDULE)
# What each method reads of the recipe's section.
LLM_FIELDS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "ngram": (*_ALL, "max_matching_ngram_size", "is_keep_all", "is_use_oldest", "is_public_pool"),
    "draft_target": ("draft", *_ALL, _SAMPLING),
    "eagle3": ("draft", *_ALL, "eagle3_one_model", _CAPTURED, _SAMPLING),
    "mtp": (*_ALL, _MODULES, _SAMPLING),
    "medusa": ("draft", "choices"),
    "eagle": ("draft", "choices"),
    "redrafter": ("draft",),
    "lookahead": ("max_window_size", "max_ngram_size", "max_verification_set_size"),
}
_USUAL_LENGTH = {"ngram": 4, "draft_target": 5, "eagle3": 3, "mtp": 1}
TAKES_DRAFT = ("draft_target", "eagle3")


def members(schema: Schema, method: str) -> Mapping[str, Field]:
    """The arguments of a method's class in a version; empty where it has no such method."""
    key = speculative_method(method).decoding_type.get(schema.header.name) if method != "none" else None
    return {} if key is None else schema.classes[schema.unions["SpeculativeConfig"].members[key]]


def argument(name: str, method: str, schema: Schema) -> str:
    """What a version calls a field of the recipe: MTP's draft length was its number of modules."""
    fields = members(schema, method)
    if name == "draft":
        return next((known for known in DRAFT_ARGUMENTS if known in fields), DRAFT_ARGUMENTS[0])
    if method == "mtp" and name == _LENGTH and _has(fields, _MODULES):
        return _MODULES
    return name


def _has(fields: Mapping[str, Field], name: str) -> bool:
    """Whether a version has an argument that it does not discourage."""
    return name in fields and fields[name].status != "deprecated"


def take_speculation(settings: Settings, schema: Schema, version: str) -> None:
    """The values of the section, besides the method itself, with the vendor's defaults where the recipe is silent."""
    method = settings.recipe.speculative.method
    fields = members(schema, method)
    if not fields:
        return
    for name in LLM_FIELDS[method]:
        path = f"speculative.{name}"
        if name == "draft":
            settings.take(path)
        elif name == _LENGTH:
            _length(settings, method)
        elif name == _CAPTURED and name in fields and not settings.given(path) and _trained_on(settings):
            own = settings.recipe.speculative.train is not None
            origin = (
                "speculative.train: near both ends and the middle" if own else "draft: eagle_config of its config.json"
            )
            settings.put(path, _trained_on(settings), origin)
        elif name == _SAMPLING:
            _sampling(settings, fields, version)
        elif name != _MODULES or settings.given(path):
            entry = fields.get(name)
            origin = f"default of TensorRT-LLM {version}" if entry else f"TensorRT-LLM {version} has none"
            settings.take(path, None if entry is None else entry.default, origin)


def _length(settings: Settings, method: str) -> None:
    modules = settings.recipe.speculative.num_nextn_predict_layers if method == "mtp" else None
    if modules is not None:
        settings.take(f"speculative.{_LENGTH}", modules, f"speculative.{_MODULES}")
    else:
        settings.take(f"speculative.{_LENGTH}", _USUAL_LENGTH[method])


def _sampling(settings: Settings, fields: Mapping[str, Field], version: str) -> None:
    """Without it, one engine for model and draft answers every request greedily (py_executor_creator.py, 1.2 on)."""
    path = f"speculative.{_SAMPLING}"
    if not _has(fields, _SAMPLING):
        settings.take(path, None, f"TensorRT-LLM {version} has none")
    else:
        settings.take(path, default=True, origin="trtbuild: sampled requests would be answered greedily")


def _trained_on(settings: Settings) -> tuple[int, ...] | None:
    draft = eagle3_draft(settings)
    return draft.captured if draft else None


def eagle3_draft(settings: Settings) -> Eagle3 | None:
    """What the files of an EAGLE-3 draft say."""
    return settings.draft.eagle3 if settings.draft else None


def captured_layers(settings: Settings, facts: ModelFacts) -> tuple[int, ...]:
    """The model's layers that an EAGLE-3 draft reads; the vendor's choice where nothing names them."""
    named = settings[f"speculative.{_CAPTURED}"] if settings.has(f"speculative.{_CAPTURED}") else None
    # `Eagle3SpecMetadata` and `Eagle3OneModelSpecMetadata`, tensorrt_llm/_torch/speculative/eagle3.py @001e6700.
    return tuple(named) if named is not None else (1, facts.num_layers // 2 - 1, facts.num_layers - 4)


def number_captured(config: Mapping[str, Any]) -> int:
    """How many layers a written ``speculative_config`` hands to the draft."""
    named = config.get(_CAPTURED)
    return len(set(named)) if named else CAPTURED_BY_DEFAULT


def speculation(settings: Settings, schema: Schema) -> dict[str, Any]:
    """``speculative_config`` as rows of name and value, without the draft's place; empty without a method.

    The schedule is a list of pairs, since a plan is kept as JSON, whose keys are text.
    """
    method = settings.recipe.speculative.method
    fields = members(schema, method)
    if not fields:
        return {}
    said: dict[str, Any] = {"decoding_type": speculative_method(method).decoding_type[schema.header.name]}
    for name in LLM_FIELDS[method]:
        path = f"speculative.{name}"
        if name in ("draft", _MODULES) or not settings.has(path) or settings[path] is None:
            continue
        own = name in (_LENGTH, _SAMPLING) or (name == _CAPTURED and _trained_on(settings) is not None)
        called = argument(name, method, schema)
        if called in fields and (own or settings.given(path)):
            said[called] = _plain(name, settings[path])
    return said


def _plain(name: str, value: Any) -> Any:
    if name == _SCHEDULE:
        return [[batch, length] for batch, length in sorted(value.items())]
    return list(value) if isinstance(value, tuple) else value


def written(said: Mapping[str, Any], place: str | None) -> dict[str, Any]:
    """``speculative_config`` as it is written, from what `speculation` gave; `place` is the draft's argument."""
    return {name: dict(map(tuple, value)) if name == _SCHEDULE else value for name, value in said.items()} | (
        {} if place is None else {place: DRAFT_PLACE}
    )


def speculation_parameters(settings: Settings, schema: Schema) -> dict[str, Any]:
    """What the engine step is told of it; nothing without a method."""
    method = settings.recipe.speculative.method
    said = speculation(settings, schema)
    if not said:
        return {}
    place = argument("draft", method, schema) if method in TAKES_DRAFT else None
    return {"speculation": {"method": method, "config": said, "draft_argument": place}}


def llm_draft_files(settings: Settings) -> dict[str, str]:
    """The draft's directory by its role in the engine step."""
    section = settings.recipe.speculative
    return {DRAFT_ROLE: section.draft} if section.draft and section.method in TAKES_DRAFT else {}
