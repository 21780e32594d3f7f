"""TensorRT-LLM checkpoints: ``config.json`` and one ``rank{i}.safetensors`` a rank, what ``trtllm-build`` reads.

The config is upstream's PretrainedConfig (NVIDIA/TensorRT-LLM, models/modeling_utils.py @01ea6d79). The tensors are
divided over ranks, fused and often quantized: no checkpoint of Transformers can be made of them, so that a recipe needs
the original one, which the config describes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtbuild.errors import ArtifactError, Problem, RecipeError
from trtbuild.migrate.engine_directory import CONFIG, read_config
from trtbuild.migrate.legacy import Legacy, Setting, leaves, split_unset
from trtbuild.model import ModelFacts

_RANKS = "rank*.safetensors"
# Its name, and that of the same number in the facts of a checkpoint of Transformers.
_SIZES = (
    ("num_hidden_layers", "num_layers", "layers"),
    ("hidden_size", "hidden_size", "hidden size"),
    ("num_attention_heads", "num_attention_heads", "attention heads"),
    ("num_key_value_heads", "num_key_value_heads", "key and value heads"),
    ("vocab_size", "vocab_size", "vocabulary"),
)


def is_rank_checkpoint(path: Path) -> bool:
    """Whether a directory holds rank files, also with a damaged configuration, and no checkpoint of Transformers."""
    config = path / CONFIG
    if not config.is_file():
        return False
    text = config.read_text(errors="replace")
    return '"model_type"' not in text and (any(path.glob(_RANKS)) or ('"architecture"' in text and '"mapping"' in text))


def read_rank_checkpoint(path: Path) -> Legacy:
    """What a TensorRT-LLM checkpoint says of the deployment it was made for.

    Raises:
        ArtifactError: its configuration is damaged, or describes no model.
    """
    config = read_config(path / CONFIG)
    architecture = config.get("architecture")
    if not isinstance(architecture, str):
        message = f"{path / CONFIG}: architecture is missing, so it is no configuration of a TensorRT-LLM checkpoint"
        raise ArtifactError(message, "name the directory that trtllm-build takes as --checkpoint_dir")
    where = f"{path.name}/{CONFIG}"
    settings, unset = split_unset("checkpoint", leaves(config), where)
    ranks = sorted(file.name for file in path.glob(_RANKS))
    if ranks:
        settings.append(Setting("checkpoint", "tensors", f"{len(ranks)} rank files", path.name))
    return Legacy(
        "a TensorRT-LLM checkpoint",
        path,
        tuple(settings),
        tuple(unset),
        original={"architecture": architecture, **_numbers(config)},
    )


def described(original: dict[str, Any]) -> str:
    """The checkpoint of Transformers that a recipe needs, in words."""
    sizes = ", ".join(f"{words} {original[name]}" for name, _, words in _SIZES if name in original)
    return f"a {original['architecture']}" + (f" with {sizes}" if sizes else "")


def check_original(original: dict[str, Any], facts: ModelFacts) -> None:
    """Refuse another model than the one that the rank files were made of.

    Raises:
        RecipeError: a size differs. Classes do not count: converters of several releases call one model differently.
    """
    other = [
        f"{words} {getattr(facts, ours)} instead of {original[theirs]}"
        for theirs, ours, words in _SIZES
        if theirs in original and getattr(facts, ours) != original[theirs]
    ]
    if other:
        message = f"has {', '.join(other)}, so the rank files were made of another model"
        raise RecipeError([Problem("--model", message, f"name {described(original)}")])


def _numbers(config: dict[str, Any]) -> dict[str, int]:
    found = {name: config.get(name) for name, _, _ in _SIZES}
    return {name: value for name, value in found.items() if isinstance(value, int) and not isinstance(value, bool)}
