"""Fill in the section `compress` of a recipe."""

from __future__ import annotations

from trtbuild.model import ModelFacts
from trtbuild.recipe_fields import SELF
from trtbuild.setting_values import Settings

_CALIBRATION_LENGTH = 512
_NOTHING_COMPRESSED = (
    "is set while nothing is compressed",
    "remove it, or set compress.format, compress.kv_cache or compress.sparsity",
)
GROUP_SIZES = (128, 64, 32, 16)


def take_compress(settings: Settings, facts: ModelFacts) -> None:
    """What happens to the weights and the KV cache, and the text that decides it."""
    compress_format = settings.take("compress.format")
    _group_size(settings, facts, compress_format)
    settings.take("compress.kv_cache")
    sparsity = settings.take("compress.sparsity")
    if sparsity == "none" and settings.recipe.compress.sparsity_method is not None:
        settings.problem(
            "compress.sparsity_method", "is set while compress.sparsity is none", "set sparsity: 2:4 or remove it"
        )
    settings.take("compress.sparsity_method", "sparsegpt" if sparsity != "none" else None)
    _calibration(settings, facts)
    settings.take("compress.max_memory")
    exclude = settings.take("compress.exclude")
    if exclude and not is_compressed(settings):
        settings.problem("compress.exclude", *_NOTHING_COMPRESSED)


def is_compressed(settings: Settings) -> bool:
    """Whether anything happens to the weights or the KV cache."""
    return any(settings[f"compress.{name}"] != "none" for name in ("format", "kv_cache", "sparsity"))


def _calibration(settings: Settings, facts: ModelFacts) -> None:
    context = facts.context_length
    short = context < _CALIBRATION_LENGTH
    origin = f"default: {_CALIBRATION_LENGTH}, at most the model's {context}" if short else "default"
    for name in ("data", "column", "split", "count"):
        settings.take(f"compress.calibration.{name}")
    length = settings.take("compress.calibration.length", min(_CALIBRATION_LENGTH, context), origin)
    for name in ("packing", "seed"):
        settings.take(f"compress.calibration.{name}")
    _data_fields(settings)
    if not is_compressed(settings):
        for name in ("data", "column", "split", "count", "length", "packing", "seed"):
            if settings.given(f"compress.calibration.{name}"):
                settings.problem(f"compress.calibration.{name}", *_NOTHING_COMPRESSED)
    elif length > context:
        message = f"{length} is more than the model's context of {context} tokens"
        settings.problem("compress.calibration.length", message, f"use at most {context}")


def _data_fields(settings: Settings) -> None:
    """Column and split are of the user's own data."""
    data = settings["compress.calibration.data"]
    if data is not None and data != SELF:
        return
    for name in ("column", "split"):
        if settings[f"compress.calibration.{name}"] is not None:
            what = "is set while compress.calibration.data names no data"
            settings.problem(f"compress.calibration.{name}", what, "name the data, or remove it")


def fitting_group_sizes(facts: ModelFacts) -> list[int]:
    """The group sizes that divide the input size of every linear layer, largest first."""
    return [size for size in GROUP_SIZES if not any(inputs % size for inputs in facts.linear_input_sizes)]


def _group_size(settings: Settings, facts: ModelFacts, compress_format: str) -> None:
    path, given = "compress.group_size", settings.recipe.compress.group_size
    if compress_format != "int4_awq":
        if given is not None:
            settings.problem(
                path, f"{given} is set while compress.format is {compress_format}", "remove it or use int4_awq"
            )
        settings.take(path)
        return
    fitting = fitting_group_sizes(facts)
    if given is None and not fitting:
        sizes = ", ".join(str(size) for size in facts.linear_input_sizes)
        settings.problem(
            path, f"no group of {GROUP_SIZES} divides every input size ({sizes})", "use another format, such as fp8"
        )
    if given is not None:
        layers = zip(facts.linear_input_sizes, facts.linear_input_examples, strict=True)
        misfits = [f"{inputs} of {name.removesuffix('.weight')}" for inputs, name in layers if inputs % given]
        if misfits:
            nearest = min(fitting, key=lambda size: (abs(size - given), -size), default=None)
            hint = f"use {nearest}" if nearest else "use another format, such as fp8"
            settings.problem(path, f"{given} does not divide the input size {misfits[0]}", hint)
    origin = "default" if fitting[:1] == [128] else "model: the largest that divides every input size"
    settings.take(path, fitting[0] if fitting else None, origin)
