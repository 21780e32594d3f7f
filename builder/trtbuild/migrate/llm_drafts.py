"""An older ``speculative_config`` as the recipe's own section, where the recipe has the method and the field."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from trtbuild.compat import facts
from trtbuild.llm_speculation import DRAFT_ARGUMENTS, DRAFT_PLACE, LLM_FIELDS, SECTION, TAKES_DRAFT, argument, members
from trtbuild.migrate.translate import Draft, Kind
from trtbuild.recipe_speculative import Speculative

_EXTRA = f"runtime.extra.{SECTION}."
_SCHEDULE = "draft_len_schedule"


def fit_section(draft: Draft) -> None:
    """Move what the recipe has fields for out of ``runtime.extra``; other keys of a known method stay beside it."""
    extras, schema = draft.extras.values, draft.target.schema
    method = _method(str(extras.get(f"{SECTION}.decoding_type")), schema.header.name if schema else "")
    if schema is None or method is None or not members(schema, method):
        return
    fields = _fields(draft, method)
    for path in [path for path in extras if path.startswith(f"{SECTION}.")]:
        name, _, key = path.removeprefix(f"{SECTION}.").partition(".")
        field = fields.get(name)
        if field is None or _unfit(method, field, extras[path], key):
            continue
        value = extras.pop(path)
        if value == DRAFT_PLACE and field == "draft":  # of a package of ours: beside its engine, under another name
            _point(draft, path, "speculative.draft", value)
            continue
        if key:
            draft.values.setdefault(f"speculative.{field}", {})[int(key)] = value
        else:
            draft.values[f"speculative.{field}"] = method if field == "method" else value
        _point(draft, path, f"speculative.{field}", draft.values[f"speculative.{field}"])


def _method(decoding: str, schema: str) -> str | None:
    """The recipe's name of a method by the LLM API's; PyTorch takes `Eagle` for EAGLE-3 in every version."""
    for row in facts("speculative")["method"]:
        if decoding == row.get("decoding_type", {}).get(schema) or (decoding, row["name"]) == ("Eagle", "eagle3"):
            return str(row["name"])
    return None


def _fields(draft: Draft, method: str) -> dict[str, str]:
    schema = draft.target.schema
    if schema is None:
        return {}
    known = {"decoding_type": "method"} | {
        argument(name, method, schema): name for name in LLM_FIELDS[method] if name != "num_nextn_predict_layers"
    }
    return known | (dict.fromkeys(DRAFT_ARGUMENTS, "draft") if method in TAKES_DRAFT else {})


def _unfit(method: str, field: str, value: Any, key: str) -> bool:
    """Whether the recipe does not take the value, so that ``runtime.extra`` keeps it and the plan has its say."""
    given: Any = method if field == "method" else value
    if key:
        given = {int(key): value} if key.isdecimal() else {key: value}
    try:
        Speculative.model_validate({field: tuple(given) if isinstance(given, list) else given})
    except ValidationError:
        return True
    return False


def _point(draft: Draft, path: str, field: str, value: Any) -> None:
    """The row of an argument, which now says a field of the recipe."""
    name = field.removeprefix("speculative.")
    for index, row in enumerate(draft.rows):
        if row.field != f"runtime.extra.{path}":
            continue
        same = str(value) == row.old_value or name == _SCHEDULE
        kind: Kind = "computed" if not same else "kept" if row.old.rsplit(".", 1)[-1] == name else "renamed"
        draft.rows[index] = replace(row, field=field, value=str(value), kind=kind)
