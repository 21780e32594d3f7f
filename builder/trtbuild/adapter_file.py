"""The ``adapter_config.json`` of a LoRA adapter, as PEFT saves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ADAPTER_CONFIG = "adapter_config.json"


def read_adapter_config(directory: Path, *numbers: str) -> dict[str, Any]:
    """The config, which has every one of `numbers` as a number.

    Raises:
        ValueError: with a sentence that says what is wrong with it.
    """
    path = directory / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{directory} has no {ADAPTER_CONFIG}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path} is no JSON") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object")  # noqa: TRY004 - one sentence for one bad file
    for name in numbers:
        value = config.get(name)
        if name not in config:
            raise ValueError(f"{path} has no {name}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{path} has {name}: {value!r}, which is no number")  # noqa: TRY004
    return config
