"""Where the original checkpoint lies, as far as an older deployment says it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from trtbuild.migrate.fates import PLACE, fate_of
from trtbuild.migrate.legacy import Legacy, Setting

FILL_IN = "/FILL-IN/original-checkpoint"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class Places:
    """The checkpoint that the recipe names, where that comes from, and another tokenizer where there is one.

    `origin` is a setting of the source, or None where ``--model`` or nobody said it.
    """

    model: str
    origin: Setting | None = None
    tokenizer: str | None = None
    tokenizer_origin: Setting | None = None

    @property
    def is_open(self) -> bool:
        """Whether the user must still fill in the checkpoint."""
        return self.model == FILL_IN

    def explain(self) -> str:
        """What becomes of a place that the recipe does not take."""
        if self.is_open:
            return "it is no unquantized checkpoint on this machine: fill in model.path"
        return f"model.path is {self.model}; model.tokenizer can name another tokenizer"


def find_places(legacy: Legacy, model: str | None) -> Places:
    """The checkpoint: `model`, else the first place that holds one, else one to fill in.

    Args:
        legacy: whose places are looked at.
        model: what the command line names.
    """
    candidates = [setting for setting in legacy.settings if _is_place(setting)]
    if model is not None:
        return _with_tokenizer(Places(_named(model)), candidates, legacy.root)
    for setting in candidates:
        text = str(setting.value)
        path = _local(text, legacy.root)
        if is_checkpoint(path):
            return _with_tokenizer(Places(str(path), setting), candidates, legacy.root)
        if setting.section in ("llm", "recipe") and _HUB_ID.fullmatch(text) and not path.exists():
            return _with_tokenizer(Places(text, setting), candidates, legacy.root)
    return Places(FILL_IN)


def _named(model: str) -> str:
    """A directory as an absolute path; what is none stays as it is: a hub id, or a mistake that is reported later."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else model


def is_checkpoint(path: Path) -> bool:
    """Whether a directory holds an original checkpoint: of Transformers, and not quantized."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    plain = isinstance(config, dict) and "model_type" in config and not config.get("quantization_config")
    return plain and not (path / "hf_quant_config.json").exists() and any(path.glob("*.safetensors"))


def _is_place(setting: Setting) -> bool:
    fate = fate_of(setting)
    return fate is not None and fate.via == PLACE


def _local(text: str, root: Path) -> Path:
    return (root / Path(text).expanduser()).resolve()


def _with_tokenizer(places: Places, candidates: list[Setting], root: Path) -> Places:
    """Add a directory that holds a tokenizer alone, as a deployment of engines has one."""
    for setting in candidates:
        path = _local(str(setting.value), root)
        has_files = any((path / name).is_file() for name in _TOKENIZER_FILES)
        if has_files and not is_checkpoint(path) and path != Path(places.model):
            return Places(places.model, places.origin, str(path), setting)
    return places
