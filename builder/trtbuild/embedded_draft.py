"""What the files of ``speculative.draft`` say, for the embedded engine, which reads ModelOpt's Medusa heads too.

ModelOpt's `export_hf_checkpoint` of a model with heads (nvidia-modelopt 0.47, modelopt/torch/speculative/plugins/
hf_medusa.py) is the whole model with ``medusa_heads.{head}...`` beside its own tensors, and the key `medusa` in
config.json. The tensors below that prefix have the names of heads alone (`medusa_draft`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trtbuild.checkpoint_files import CheckpointFiles, open_directory
from trtbuild.draft import AT, Draft, read_draft
from trtbuild.errors import ArtifactError
from trtbuild.medusa_draft import MedusaHeads, is_medusa, read_medusa, tensor_shapes
from trtbuild.model import read_tensors

_PREFIX = "medusa_heads."
_HINT = "give Medusa heads alone, or a model with heads as ModelOpt exports it"


def read_embedded_draft(directory: Path, method: str) -> Draft:
    """What lies in `directory`.

    Raises:
        RecipeError: there is nothing of the kind that the method takes, with what to do.
        ArtifactError: a file is missing or damaged.
    """
    if method != "medusa":
        return read_draft(directory, method)
    files = open_directory(directory, at=AT)
    config = _config(files)
    return Draft(medusa=read_medusa(files) if is_medusa(config) else _exported(files, config))


def _config(files: CheckpointFiles) -> dict[str, Any]:
    if "config.json" not in files.names_and_sizes():
        raise ArtifactError(f"{files.where}: config.json is missing", _HINT)
    try:
        config = json.loads(files.read("config.json"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{files.where}: config.json is not JSON ({error})", "download it again") from None
    return config if isinstance(config, dict) else {}


def _exported(files: CheckpointFiles, config: dict[str, Any]) -> MedusaHeads:
    """The heads of a model that ModelOpt exported with them."""
    said = config.get("medusa")
    counts: list[int] = []
    if isinstance(said, dict):
        named = (said.get(f"num_medusa_{name}") for name in ("heads", "layers"))
        counts = [count for count in named if type(count) is int and count > 0]
    if len(counts) != 2:
        raise ArtifactError(f"{files.where}: config.json does not say how many Medusa heads there are", _HINT)
    tensors = {tensor.name.removeprefix(_PREFIX): tensor for tensor in read_tensors(files) if _PREFIX in tensor.name}
    last = tensors.get(f"0.{counts[1]}.weight")
    if last is None or len(last.shape) != 2:
        raise ArtifactError(f"{files.where}: lacks the matrix of the vocabulary of the first head", _HINT)
    vocabulary, hidden = last.shape
    heads = MedusaHeads(num_heads=counts[0], num_layers=counts[1], hidden_size=hidden, vocab_size=vocabulary)
    for name, shape in tensor_shapes(heads).items():
        if name not in tensors or tensors[name].shape != shape:
            raise ArtifactError(f"{files.where}: {_PREFIX}{name} is missing or not of shape {list(shape)}", _HINT)
    return heads
