"""For which model a draft was trained: the record beside its weights, and what speaks against another model.

``target.json`` lies in a draft's directory. A draft that trtbuild has not trained has none; its sizes are checked all
the same, by the rules of its method.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtbuild.errors import ArtifactError
from trtbuild.manifest import FileEntry, digest_json, read_json
from trtbuild.model import ModelFacts
from trtbuild.tokenizer_file import TOKENIZER_FILE, vocabulary

RECORD = "target.json"
_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedFor:
    """The model that a draft was trained for.

    `weights` is `weights_digest` of the model's files, `tokenizer` that of its vocabulary (None where no tokenizer.json
    says it), `captured` the layers that the draft reads, `format` how the weights were stored that answered.
    """

    method: str
    weights: str
    tokenizer: str | None
    hidden_size: int
    vocab_size: int
    num_layers: int
    captured: tuple[int, ...] | None
    format: str


def weights_digest(files: Iterable[FileEntry]) -> str:
    """One digest of a checkpoint's weights; what their files are called does not enter."""
    return digest_json(sorted([entry.size, entry.sha256] for entry in files if entry.path.endswith(".safetensors")))


def tokenizer_digest(directory: Path) -> str | None:
    """A digest of which number each token has; None where no tokenizer.json says it."""
    try:
        return digest_json(vocabulary(json.loads((directory / TOKENIZER_FILE).read_text(encoding="utf-8"))))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def record_json(trained: TrainedFor) -> dict[str, Any]:
    """The contents of ``target.json``."""
    return {"schema_version": _SCHEMA_VERSION, **asdict(trained)}


def read_record(directory: Path) -> TrainedFor | None:
    """The record of a draft's directory; None where there is none.

    Raises:
        ArtifactError: it is damaged, or of another version.
    """
    path = directory / RECORD
    if not path.is_file():
        return None
    document = read_json(path)
    try:
        return _parsed(document)
    except (KeyError, TypeError, ValueError):
        raise ArtifactError(f"{path}: says not for which model the draft was trained", "train it again") from None


def _parsed(document: Mapping[str, Any]) -> TrainedFor:
    fields = dict(document)
    if fields.pop("schema_version") != _SCHEMA_VERSION:
        raise ValueError("another version")
    captured = fields.pop("captured")
    if not isinstance(fields["weights"], str):
        raise TypeError("no digest")
    return TrainedFor(**fields, captured=None if captured is None else tuple(captured))


def size_misfits(trained: TrainedFor, method: str, facts: ModelFacts, tokenizer: str | None) -> list[str]:
    """What a plan can see: another method, size or tokenizer than the draft was trained for."""
    pairs = (
        ("the method", trained.method, method),
        ("a hidden_size of", trained.hidden_size, facts.hidden_size),
        ("a vocab_size of", trained.vocab_size, facts.vocab_size),
        ("a number of layers of", trained.num_layers, facts.num_layers),
    )
    found = [
        f"was trained for {what} {theirs}, and it is {ours} here" for what, theirs, ours in pairs if theirs != ours
    ]
    if None not in (tokenizer, trained.tokenizer) and tokenizer != trained.tokenizer:
        found.append("was trained for a model with another tokenizer: its token ids mean other words")
    return found


def other_weights(trained: TrainedFor, weights: str) -> str | None:
    """What only the digests of all bytes can tell: another model of the same sizes."""
    if trained.weights == weights:
        return None
    return (
        f"was trained for another model of the same sizes (weights {trained.weights[:16]}, the model's are "
        f"{weights[:16]}): its drafts would be rejected"
    )
