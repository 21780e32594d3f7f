"""A model's parameters, read from what Triton hands over at load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils


class Settings:
    """The `parameters` of one model's config.pbtxt, and where the model lies."""

    def __init__(self, args: Mapping[str, str]) -> None:
        config: dict[str, Any] = json.loads(args["model_config"])
        self.name = args["model_name"]
        self.decoupled = bool(config.get("model_transaction_policy", {}).get("decoupled", False))
        self._values = {name: value["string_value"] for name, value in config["parameters"].items()}
        self.outputs = frozenset(output["name"] for output in config.get("output", ()))
        self._directory = Path(args["model_repository"])

    def text(self, name: str) -> str:
        """A parameter's text; an absent one raises, and the sentence ends up in the server's log."""
        try:
            return str(self._values[name])
        except KeyError:
            raise self.fault(name, "is missing from config.pbtxt") from None

    def optional_directory(self, name: str) -> Path | None:
        """A directory, or None where the parameter is absent or empty."""
        return self.directory(name) if self._values.get(name) else None

    def names(self, name: str) -> dict[str, str]:
        """Pairs such as ``seed=random_seed,min_tokens=min_length``; none where the parameter is absent."""
        return dict(pair.split("=", 1) for pair in self.words(name))

    def words(self, name: str) -> tuple[str, ...]:
        """A list with commas; none where the parameter is absent."""
        return tuple(word for word in str(self._values.get(name, "")).split(",") if word)

    def count(self, name: str) -> int:
        """A whole number above 0."""
        text = self.text(name)
        if not (text.isdecimal() and int(text)):
            raise self.fault(name, f"is {text!r}; write a whole number above 0")
        return int(text)

    def flag(self, name: str) -> bool:
        """True or false."""
        text = self.text(name)
        if text not in ("true", "false"):
            raise self.fault(name, f"is {text!r}; write true or false")
        return text == "true"

    def directory(self, name: str) -> Path:
        """A directory, given absolutely or from the model's own directory."""
        path = (self._directory / self.text(name)).resolve()
        if not path.is_dir():
            message = f"leads to {path}, where there is no directory; keep engine/ and model_repository/ together"
            raise self.fault(name, message)
        return path

    def fault(self, name: str, message: str) -> Exception:
        """The exception to raise for a parameter that cannot be used."""
        error: Exception = pb_utils.TritonModelException(f"{self.name}: parameter {name} {message}")
        return error
