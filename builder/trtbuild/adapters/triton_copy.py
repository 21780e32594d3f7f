"""Copy a Triton Python model with every module it imports: a repository is self-contained.

In the source tree the modules of `model_repo` import each other by their full names; in a repository all modules of a
model lie in its version directory, and the imports are written accordingly.
"""

from __future__ import annotations

import re
from pathlib import Path

from trtbuild.render import data_dir

_IMPORT = re.compile(r"^from model_repo\.((?:\w+\.)*)(\w+) import ", re.MULTILINE)
_SIBLING = re.compile(r"^from \.(\w+) import ", re.MULTILINE)


def copy_model(directory: str, version: Path) -> None:
    """Write ``model.py`` of ``model_repo/<directory>`` and the modules that it needs into `version`.

    Raises:
        ValueError: two modules of one name are needed (our bug, not the user's).
    """
    root = data_dir("model_repo")
    waiting = [root / directory / "model.py"]
    placed: dict[str, Path] = {}
    while waiting:
        source = waiting.pop()
        known = placed.setdefault(source.name, source)
        if known != source:
            raise ValueError(f"{version}: both {known} and {source} are needed")
        if (version / source.name).exists():
            continue
        text = source.read_text(encoding="utf-8")
        waiting += [root / folder.replace(".", "/") / f"{name}.py" for folder, name in _IMPORT.findall(text)]
        waiting += [source.parent / f"{name}.py" for name in _SIBLING.findall(text)]
        (version / source.name).write_text(_IMPORT.sub(r"from .\2 import ", text), encoding="utf-8", newline="\n")
