"""trtbuild: from a Hugging Face checkpoint to a proven Triton deployment."""

from __future__ import annotations

__version__ = "0.1.0"
