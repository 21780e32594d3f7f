"""From settings to the fields of a recipe: every setting becomes one row that says what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import ValidationError

from trtbuild.migrate.extras import Extras, put
from trtbuild.migrate.fates import PLACE, Fate, fate_for
from trtbuild.migrate.legacy import Legacy, Setting
from trtbuild.migrate.places import Places
from trtbuild.migrate.target import Target
from trtbuild.migrate.values import TRANSFORMS, text
from trtbuild.recipe import Recipe
from trtbuild.setting_values import recipe_value

Kind = Literal["kept", "renamed", "computed", "dropped", "not recognized"]
# Limits that hold in several places of an old deployment: the smallest is what it really had.
_LIMITS = (
    *("runtime.max_batch_size", "runtime.max_seq_len", "runtime.max_num_tokens"),
    *("serving.max_input_tokens", "serving.max_output_tokens"),
)
_ENGINE = "trtllm-engine"
# What the table says for other runtimes, and what holds for engines.
_ENGINES = ("only TensorRT engines have it", "this version of trtbuild makes no engine with it")
_NOT_LOST = "nothing is lost: "


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one setting; `old` is empty for a field that `fit` added."""

    where: str
    old: str
    old_value: str
    field: str
    value: str
    kind: Kind
    note: str = ""

    @property
    def is_loss(self) -> bool:
        """Whether the new deployment does not do what the old one did, or nobody knows."""
        return self.kind == "not recognized" or (self.kind == "dropped" and not self.note.startswith(_NOT_LOST))


@dataclass(slots=True)
class Draft:
    """The recipe's values so far, by dotted path, and the rows."""

    target: Target
    places: Places
    values: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    extras: Extras = field(default_factory=Extras)

    def add(self, path: str, value: Any, note: str) -> None:
        """Set a field for a reason of our own: the settings that gave it are computed, else a row is added."""
        self.values[path] = value
        given = [index for index, row in enumerate(self.rows) if row.field == path]
        for index in given:
            self.rows[index] = replace(self.rows[index], value=text(value), kind="computed", note=note)
        if not given:
            self.rows.append(Row("", "", "", path, text(value), "computed", note))

    def settle(self, old: str, value: object, why: str) -> None:
        """A setting that was dropped with this value is no loss after all: another field says it."""
        self.rows = [
            replace(row, note=_NOT_LOST + why) if (row.old, row.old_value) == (old, text(value)) else row
            for row in self.rows
        ]

    def leave_out(self, path: str, why: str, *, is_loss: bool = True) -> None:
        """Take a field back: the settings that gave it are dropped."""
        note = f"{path}: {why}" if is_loss else f"{_NOT_LOST}{path}: {why}"
        self.values.pop(path, None)
        self.extras.values.pop(path.removeprefix("runtime.extra."), None)
        self.rows = [
            replace(row, field="", value="", kind="dropped", note=note) if row.field == path else row
            for row in self.rows
        ]


def translate(legacy: Legacy, target: Target, places: Places) -> Draft:
    """Rows for every setting, and the values that they give."""
    draft = Draft(target, places)
    owners = _owners(legacy.settings, target)
    for setting in legacy.settings:
        draft.rows.append(_row(setting, draft, owners))
    draft.rows = draft.extras.settle(draft.rows, target)
    if target.kind == _ENGINE:
        draft.rows = [replace(row, note=row.note.replace(*_ENGINES)) for row in draft.rows]
    return draft


def _row(setting: Setting, draft: Draft, owners: Mapping[str, tuple[Any, Setting]]) -> Row:
    fate = fate_for(setting, draft.target.kind)
    if fate is None:
        return _drop(setting, "no table of trtbuild has this name", kind="not recognized")
    if fate.via == PLACE:
        return _place(setting, fate, draft)
    chosen = draft.target.flag_value(fate.flag, setting.value) if fate.flag is not None else None
    if chosen is not None:
        return draft.extras.offer(setting, fate.flag or "", chosen, _as_row)
    note = _foregone(fate, text(setting.value), draft.target)
    return _drop(setting, note) if note else _valued(setting, fate, draft, owners)


def _foregone(fate: Fate, old: str, target: Target) -> str | None:
    """Why nothing comes of a setting with this value, whatever the new runtime."""
    if fate.moot is not None:
        return _NOT_LOST + fate.moot
    if old.lower() in (value.lower() for value in (*fate.harmless, *(fate.engine if target.kind == _ENGINE else ()))):
        return f"{_NOT_LOST}{old} is the default"
    return fate.values.get(old)


def _valued(setting: Setting, fate: Fate, draft: Draft, owners: Mapping[str, tuple[Any, Setting]]) -> Row:
    """A setting whose value the new place may take."""
    try:
        value = TRANSFORMS[fate.via](setting.value) if fate.via else _frozen(setting.value)
    except (ValueError, TypeError, AttributeError) as error:
        return _drop(setting, fate.drop or str(error))
    if fate.extra is not None:
        return _argument(setting, fate, value, draft)
    if fate.field is None:
        return _drop(setting, fate.drop or "the new runtime has no counterpart")
    if value is None and setting.value is not None:
        return _drop(setting, f"{_NOT_LOST}it is the default")
    return _field(setting, fate.field, value, draft, owners)


def _field(setting: Setting, path: str, value: Any, draft: Draft, owners: Mapping[str, tuple[Any, Setting]]) -> Row:
    reason = _refusal(path, value, draft.target)
    if reason is not None:
        default = value == _defaults(path)
        return _drop(setting, f"{_NOT_LOST}{text(value)} is the default" if default else f"{path}: {reason}")
    best, owner = owners[path]
    draft.values[path] = best
    if value != best:
        return _drop(setting, f"{_NOT_LOST}{owner.where} has {text(best)} for {owner.name}, which holds")
    return _as_row(setting, path, value)


def _refusal(path: str, value: Any, target: Target) -> str | None:
    """Why a recipe or the new runtime does not take a value."""
    document: dict[str, Any] = {"schema_version": 1, "model": {"path": "."}, "runtime": {"kind": "embedded"}}
    put(document, path, value)
    try:
        Recipe.model_validate(document)
    except ValidationError as error:
        return f"{text(value)!r} is not taken: {str(error.errors()[0]['msg']).replace('Input should be', 'it must be')}"
    return target.refuses(path, value)


def _defaults(path: str) -> Any:
    """What a recipe has for a field of which it says nothing."""
    silent = {"schema_version": 1, "model": {"path": "."}, "runtime": {"kind": "embedded"}}
    return recipe_value(Recipe.model_validate(silent), path)


def _owners(settings: tuple[Setting, ...], target: Target) -> dict[str, tuple[Any, Setting]]:
    """The setting that decides each field: the first, or for limits the smallest."""
    found: dict[str, tuple[Any, Setting]] = {}
    for setting in settings:
        fate = fate_for(setting, target.kind)
        if fate is None or fate.field is None or fate.via == PLACE or text(setting.value).lower() in fate.harmless:
            continue
        try:
            value = TRANSFORMS[fate.via](setting.value) if fate.via else _frozen(setting.value)
        except (ValueError, TypeError, AttributeError):
            continue
        if (value is None and setting.value is not None) or _refusal(fate.field, value, target) is not None:
            continue
        have = found.get(fate.field)
        if have is None or (fate.field in _LIMITS and isinstance(value, int) and value < have[0]):
            found[fate.field] = (value, setting)
    return found


def _argument(setting: Setting, fate: Fate, value: Any, draft: Draft) -> Row:
    """An LLM argument that no field says."""
    argument = fate.extra or ""
    if draft.target.kind != "trtllm":
        return _drop(setting, fate.drop or f"the runtime {draft.target.kind} has no arguments of the LLM API")
    return draft.extras.offer(setting, argument, value, _as_row, lost=fate.drop)


def _place(setting: Setting, fate: Fate, draft: Draft) -> Row:
    places = draft.places
    if setting == places.origin:
        return _as_row(setting, "model.path", places.model)
    if setting == places.tokenizer_origin:
        return _as_row(setting, "model.tokenizer", places.tokenizer)
    if fate.field == "model.path" and places.is_open:
        return _drop(setting, places.explain())
    return _drop(setting, _NOT_LOST + places.explain())


def _as_row(setting: Setting, path: str, value: Any) -> Row:
    same = text(value) == text(setting.value)
    name = path.rsplit(".", 1)[-1] == setting.name.rsplit(".", 1)[-1]
    kind: Kind = "computed" if not same else "kept" if name else "renamed"
    return Row(setting.where, setting.name, text(setting.value), path, text(value), kind)


def _drop(setting: Setting, note: str, kind: Kind = "dropped") -> Row:
    return Row(setting.where, setting.name, text(setting.value), "", "", kind, note)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
