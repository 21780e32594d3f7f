"""The draft of a build, wherever it comes from: the step that trains one, or a directory of the user's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtbuild.draft import MEDUSA_ROLE
from trtbuild.store import Artifact, Staging

STEP = "draft"
_Inputs = Mapping[str, Artifact]
_Files = Mapping[str, Path]


def draft_directory(inputs: _Inputs, files: _Files, role: str) -> Path | None:
    """Where the draft lies: the trained one, else the user's in this role, else None."""
    return inputs[STEP].content if STEP in inputs else files.get(role)


def draft_digest(inputs: _Inputs, file_digests: Mapping[str, str], role: str) -> str:
    """What names the bytes of that draft."""
    return inputs[STEP].digest if STEP in inputs else file_digests[role]


def training_request(parameters: Mapping[str, Any], prompts: Path, inputs: _Inputs, staging: Staging) -> dict[str, Any]:
    """What the child is asked that trains, but for the model's own digest."""
    return {
        **parameters,
        "checkpoint": str(inputs["compress"].content),
        "prompts": str(prompts),
        "output": str(staging.content),
        "work": str(staging.unfinished),
        "key": staging.path.name,
    }


def conversion_request(parameters: Mapping[str, Any], inputs: _Inputs, files: _Files) -> dict[str, Any]:
    """What the conversion is asked besides, where Medusa heads come with the model."""
    planned = parameters.get("medusa")
    if planned is None:
        return {}
    return {"medusa": str(draft_directory(inputs, files, MEDUSA_ROLE)), "max_draft_len": planned["max_draft_len"]}
