"""The table ``_compat/legacy_names.toml``: what becomes of a setting by its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any

from trtbuild.build_flags import known_plugins
from trtbuild.compat import facts
from trtbuild.llm_keys import LLM_ARGUMENT, RESERVED
from trtbuild.migrate.legacy import Setting

# A setting whose value is the place of a checkpoint or tokenizer; `places` decides it.
PLACE = "tokenizer"
_FIELD_OF = {argument: path for path, argument in LLM_ARGUMENT.items()}
_GRAPHS = "cuda_graph_config"


@dataclasses.dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one name; see the head of the table."""

    field: str | None = None
    extra: str | None = None
    via: str = ""
    moot: str | None = None
    drop: str | None = None
    harmless: tuple[str, ...] = ()
    values: Mapping[str, str] = dataclasses.field(default_factory=dict)
    engine: tuple[str, ...] = ()
    flag: str | None = None
    engines: Mapping[str, Any] | None = None
    llm_api: Mapping[str, Any] | None = None


@cache
def table() -> Mapping[str, Any]:
    """The whole table."""
    return facts("legacy_names")


def fate_of(setting: Setting) -> Fate | None:
    """What becomes of a setting, or None for a name that nobody knows."""
    names = {
        "own": lambda: _own(setting.name),
        "triton": lambda: _row("triton", setting.name),
        "build": lambda: _build(setting.name),
        "checkpoint": lambda: _row("checkpoint", setting.name) or _rest(setting.name),
        "llm": lambda: _row("llm", setting.name) or _argument(setting.name),
        "recipe": lambda: _field(setting.name),
    }
    return names[setting.section]()


def fate_for(setting: Setting, kind: str) -> Fate | None:
    """What becomes of a setting where the new runtime is of this kind."""
    fate = fate_of(setting)
    own = None if fate is None else {"trtllm-engine": fate.engines, "trtllm": fate.llm_api}.get(kind)
    if fate is None or own is None:
        return fate
    return dataclasses.replace(fate, **{"field": None, "extra": None, "via": "", "values": {}} | dict(own))


def _row(section: str, name: str) -> Fate | None:
    row = table()[section]["names"].get(name)
    if row is None:
        return None
    given: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in row.items()}
    return Fate(**given)


def _own(name: str) -> Fate | None:
    """What trtbuild's own files hold: a name of theirs, or one that they share with TensorRT-LLM's."""
    if name.startswith("limits."):
        return Fate(moot="follows from the engine's other settings")
    if name.startswith("spec.extra."):
        return _build(name.removeprefix("spec.extra."))
    return _row("own", name) or _row("triton", name)


def _build(name: str) -> Fate | None:
    """A flag of ``trtllm-build``, or a field of BuildConfig, which nests some of them."""
    flag = name.removeprefix("lora_config.").removeprefix("plugin_config.").partition(".")[0]
    if name.startswith("auto_parallel_config."):
        return Fate(moot="automatic parallelization is off unless --auto_parallel asks for it")
    found = _row("build", flag)
    if found is None and (name.startswith("plugin_config.") or flag in known_plugins()):
        return Fate(moot=table()["build"]["plugin"], flag=flag)
    return found


def _rest(name: str) -> Fate | None:
    """A checkpoint's config.json keeps whatever describes the model; its sections are known."""
    if name.startswith(("mapping.", "quantization.")):
        return None
    return Fate(moot=table()["checkpoint"]["rest"])


def _argument(name: str) -> Fate | None:
    """An LLM argument: a field of the recipe, something that the package decides, or ``runtime.extra``."""
    for reserved, why in RESERVED.items():
        if name == reserved or name.startswith(f"{reserved}."):
            return Fate(moot=why)
    if name == _GRAPHS:
        return Fate(field="runtime.cuda_graph_config.enabled", via="boolean")
    path = _FIELD_OF.get(name)
    return Fate(extra=name) if path is None else Fate(field=path)


def _field(name: str) -> Fate | None:
    """A field of a recipe."""
    if name in ("schema_version", "runtime.kind", "runtime.version", "runtime.allow_unknown_version"):
        return Fate(moot="the new recipe has its own")
    if name == "model.path":
        return Fate(field=name, via=PLACE)
    if name.startswith("runtime.extra."):
        return Fate(extra=name.removeprefix("runtime.extra."))
    return Fate(field=name)
