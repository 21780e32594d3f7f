"""Fill in the section `compress` of a recipe."""

from __future__ import annotations

from trtbuild.mixed_settings import group_format, take_mixed
from trtbuild.model import ModelFacts
from trtbuild.recipe_fields import SELF
from trtbuild.setting_values import Settings
from trtbuild.weight_formats import WEIGHT_FORMATS, takes_group

_CALIBRATION_LENGTH = 512
_NOTHING_COMPRESSED = (
    "is set while nothing is compressed",
    "remove it, or set compress.format, compress.kv_cache or compress.sparsity",
)
GROUP_SIZES = (128, 64, 32, 16)
# What 2:4 buys; of the LLM API `trtllm_refusals` says it. Every runtime stores zeros like other weights.
_WORTH_OF_SPARSITY = {
    "embedded": "2:4 brings the embedded engine no speed: it multiplies the weights as dense ones and stores the zeros",
    "trtllm-engine": (
        "2:4: TensorRT takes sparse kernels only for layers where its own timing finds them faster; the weights take "
        "as much memory as dense ones"
    ),
}


def take_compress(settings: Settings, facts: ModelFacts) -> None:
    """What happens to the weights and the KV cache, and the text that decides it."""
    settings.take("compress.format")
    take_mixed(settings)
    _group_size(settings, facts, group_format(settings))
    for name in settings.recipe.compress.formats:
        _fixed_groups(settings, facts, name)
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


def sparsity_warnings(settings: Settings) -> list[str]:
    """What 2:4 costs and buys."""
    if settings["compress.sparsity"] == "none":
        return []
    kind = settings.recipe.runtime.kind
    cost = "2:4 without fine-tuning costs quality, most in small models: see the perplexity ratio measured"
    return [cost, *([_WORTH_OF_SPARSITY[kind]] if kind in _WORTH_OF_SPARSITY else [])]


def is_compressed(settings: Settings) -> bool:
    """Whether anything happens to the weights or the KV cache."""
    some = any(settings[f"compress.{name}"] != "none" for name in ("kv_cache", "sparsity"))
    return some or bool(settings.recipe.compress.formats)


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
    if not takes_group(compress_format):
        if given is not None:
            fixed = WEIGHT_FORMATS[compress_format].group if compress_format != "none" else 0
            why = f", whose groups have {fixed} weights" if fixed else ""
            message = f"{given} is set while compress.format is {compress_format}{why}"
            settings.problem(path, message, "remove it or use int4_awq")
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


def _fixed_groups(settings: Settings, facts: ModelFacts, compress_format: str) -> None:
    """Formats whose blocks have one size; with patterns that exclude layers, the compress step knows which are left."""
    if settings.recipe.compress.exclude or settings.recipe.compress.overrides:
        return
    rows, columns = WEIGHT_FORMATS[compress_format].sides
    inputs = [size for size in facts.linear_input_sizes if size % columns]
    keys = facts.num_key_value_heads * facts.head_dim
    if inputs or keys % rows:
        what = f"the input size {inputs[0]}" if inputs else f"the {keys} outputs of keys and values"
        size = columns if inputs else rows
        message = f"{compress_format}: its blocks of {size} do not divide {what} of a linear layer"
        settings.problem("compress.format", message, "use another format, such as fp8, or exclude these layers")
