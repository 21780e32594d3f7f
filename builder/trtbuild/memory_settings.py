"""The memory that a recipe's compression will take, and its bound on that."""

from __future__ import annotations

from collections.abc import Iterator

from trtbuild.compress_memory import Demand, parse_bytes, sampling_bytes, show_bytes
from trtbuild.compress_settings import is_compressed
from trtbuild.errors import Problem
from trtbuild.mixed_settings import choice_bytes
from trtbuild.model import ModelFacts
from trtbuild.recipe_fields import SELF
from trtbuild.setting_values import Settings


def peak_bytes(settings: Settings, facts: ModelFacts) -> int:
    """The peak to expect of the compress step."""
    layers = _demand(settings, facts).peak(_memory_limit(settings))
    return max(layers, _sampling_bytes(settings, facts), choice_bytes(settings, facts))


def _demand(settings: Settings, facts: ModelFacts) -> Demand:
    """What the compress step needs of the host's memory."""
    sparse = settings["compress.sparsity"] != "none"
    return Demand(
        layer=facts.largest_layer,
        hidden_size=facts.hidden_size,
        format="none" if settings["compress.format"] == "auto" else settings["compress.format"],
        more_formats=settings.recipe.compress.formats,
        kv_cache=settings["compress.kv_cache"],
        sparsity_method=settings["compress.sparsity_method"] if sparse else None,
        samples=settings["compress.calibration.count"],
        length=settings["compress.calibration.length"],
        experts=facts.num_experts is not None,
    )


def memory_mistakes(settings: Settings, facts: ModelFacts) -> Iterator[Problem]:
    """What is wrong with `compress.max_memory`, and with what it does not hold."""
    path, given, limit = "compress.max_memory", settings["compress.max_memory"], _memory_limit(settings)
    if given is not None and limit is None:
        yield Problem(path, f"{given!r} is no size", "write it like 8GiB or 500MB")
    elif limit is not None and limit < _demand(settings, facts).smallest:
        smallest = show_bytes(_demand(settings, facts).smallest)
        yield Problem(path, f"{given}: one decoder layer of this model takes {smallest}", f"use at least {smallest}")
    elif limit is not None and limit < _sampling_bytes(settings, facts):
        needed = show_bytes(_sampling_bytes(settings, facts))
        what = f"self needs the whole model in memory, about {needed}, above compress.max_memory ({given})"
        yield Problem("compress.calibration.data", what, f"raise that to {needed}, or give text")


def _sampling_bytes(settings: Settings, facts: ModelFacts) -> int:
    """What it takes to let the model write the calibration text; 0 where it does not."""
    if not is_compressed(settings) or settings["compress.calibration.data"] != SELF:
        return 0
    return sampling_bytes(facts.parameters, facts.kv_elements_per_token, settings["compress.calibration.length"])


def _memory_limit(settings: Settings) -> int | None:
    given = settings["compress.max_memory"]
    return None if given is None else parse_bytes(given)
