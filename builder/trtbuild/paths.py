"""Where trtbuild keeps what it may lose: one cache directory of the user."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The user's cache directory for trtbuild: ``$XDG_CACHE_HOME/trtbuild``, else ``~/.cache/trtbuild``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification says that a relative value is to be ignored.
    root = Path(base) if base.startswith("/") else Path.home() / ".cache"
    return root / "trtbuild"
