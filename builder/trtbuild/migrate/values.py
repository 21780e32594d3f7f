"""How a value of an older deployment becomes a value of a recipe.

Every function takes the text of a config.pbtxt or command line, or a JSON value; it returns the recipe's value, None
where there is nothing to say, and raises `ValueError` with the reason where the recipe cannot say it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, get_args

from trtbuild.compat import facts
from trtbuild.recipe_fields import CapacityPolicy, Format, KvCacheFormat

_TRUE, _FALSE = ("true", "1", "enable", "yes"), ("false", "0", "disable", "no")
_LARGEST_FRACTION = 0.95
_DECODING = ("medusa", "redrafter", "lookahead", "eagle")
# Also by number: SpeculativeDecodingMode of tensorrt_llm/models/modeling_utils.py @01ea6d79.
_SPECULATION = {
    **dict.fromkeys(("draft_tokens_external", "2"), "draft_target"),
    **dict.fromkeys(("medusa", "4"), "medusa"),
    **dict.fromkeys(("lookahead_decoding", "8"), "lookahead"),
    **dict.fromkeys(("explicit_draft_tokens", "16"), "redrafter"),
    **dict.fromkeys(("eagle", "32"), "eagle"),
}


def text(value: Any) -> str:
    """A value as the older files spell it, for comparisons and tables."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(map(text, value))
    if isinstance(value, Mapping):
        return json.dumps(dict(value))
    return str(value)


def boolean(value: Any) -> bool:
    """A truth value, as Triton's parameters and ``trtllm-build`` spell it."""
    if text(value).lower() in _TRUE:
        return True
    if text(value).lower() in _FALSE:
        return False
    raise ValueError(f"{text(value)} is neither true nor false")


def inverted(value: Any) -> bool:
    """A switch whose new name says the opposite."""
    return not boolean(value)


def whole(value: Any) -> int:
    """A whole number from 0."""
    if not text(value).isdecimal():
        raise ValueError(f"{text(value)} is no whole number")
    return int(text(value))


def positive(value: Any) -> int:
    """A whole number above 0."""
    number = whole(value)
    if number < 1:
        raise ValueError(f"{number} is not above 0")
    return number


def several(value: Any) -> int | None:
    """A number of ranks; 1 and automatic need no saying."""
    return None if text(value) in ("1", "-1") else positive(value)


def number(value: Any) -> float:
    """A number."""
    try:
        return float(text(value))
    except ValueError:
        raise ValueError(f"{text(value)} is no number") from None


def fraction(value: Any) -> float:
    """A share of the free GPU memory; recipes leave some of it free."""
    share = number(value)
    if share <= 0 or share > 1:
        raise ValueError(f"{text(value)} is no share between 0 and 1")
    return share if share < 1 else _LARGEST_FRACTION


def integers(value: Any) -> tuple[int, ...]:
    """Whole numbers above 0, with commas."""
    return tuple(positive(part.strip()) for part in text(value).split(","))


def groups(value: Any) -> tuple[tuple[int, ...], ...]:
    """GPU numbers for each instance of a model: commas in a group, semicolons between groups."""
    if isinstance(value, (list, tuple)):
        return tuple(tuple(map(whole, group)) for group in value)
    return tuple(tuple(whole(part.strip()) for part in group.split(",")) for group in text(value).split(";"))


def word(value: Any) -> str:
    """Text as it is."""
    return text(value)


def words(value: Any) -> tuple[str, ...]:
    """Names, as a list or with spaces or commas."""
    parts = value if isinstance(value, (list, tuple)) else text(value).replace(",", " ").split()
    return tuple(map(text, parts))


def places(value: Any) -> tuple[str, ...]:
    """Directories, as a list or one."""
    return tuple(map(text, value)) if isinstance(value, (list, tuple)) else (text(value),)


def policy(value: Any) -> str:
    """What decides which requests run."""
    name = text(value).upper()
    if name not in get_args(CapacityPolicy):
        raise ValueError(f"the policy {text(value)}: a recipe has {' and '.join(get_args(CapacityPolicy))}")
    return name


def layout(value: Any) -> str | None:
    """The interface of clients; `llm` is the default."""
    return text(value) if text(value) == "ensemble" else None


def sparsity(value: Any) -> str | None:
    """TensorRT takes 2:4 weights as sparse."""
    return "2:4" if boolean(value) else None


def weight_format(value: Any) -> str | None:
    """The format of the weights."""
    formats = facts("legacy_names")["formats"]
    name = text(value).upper()
    if name in formats:
        return str(formats[name])
    for mark, lost in formats["lost"].items():
        if mark in name:
            raise ValueError(f"{lost}; the weights stay in bf16, unless compress.format names another format")
    known = ", ".join(name for name in get_args(Format) if name != "none")
    raise ValueError(f"the format {name} is not known; compress.format takes {known}")


def kv_format(value: Any) -> str | None:
    """The format of the KV cache; automatic is the recipe's default."""
    name = text(value).lower()
    if name in ("auto", "none"):
        return None
    if name in get_args(KvCacheFormat):
        return name
    known = ", ".join(name for name in get_args(KvCacheFormat) if name != "none")
    raise ValueError(f"a KV cache in {text(value)}: compress.kv_cache takes {known}")


def excluded(value: Any) -> tuple[str, ...] | None:
    """Layers that are not quantized, besides the head and routers, which never are."""
    names = [name for name in words(value) if not name.rstrip("*").endswith(("lm_head", "router", "gate", "embedding"))]
    if any(name.lstrip("*.").startswith("transformer.") for name in names):
        raise ValueError(f"{', '.join(names)} are names of TensorRT-LLM; compress.exclude takes those of Transformers")
    return tuple(names) or None


def paths(value: Any) -> tuple[tuple[int, ...], ...]:
    """Paths through a tree of drafts, as Triton's parameters spell them: ``{0, 0}, {0, 1}``."""
    groups = re.findall(r"\{([^{}]*)\}", text(value))
    return tuple(tuple(whole(part.strip()) for part in group.split(",")) for group in groups)


def drafting(value: Any) -> str | None:
    """A BLS model that names a draft model."""
    return "draft_target" if text(value) else None


def decoding(value: Any) -> str:
    """The method that a decoding mode of the C++ backend belongs to."""
    if text(value) not in _DECODING:
        raise ValueError(f"{text(value)}: the served model answers with one beam and each request's own sampling")
    return text(value)


def speculation(value: Any) -> str | None:
    """The method of ``--speculative_decoding_mode``, or of its number in an engine's config.json."""
    name = text(value).rsplit(".", 1)[-1].lower()
    if name in ("none", "1", ""):
        return None
    if name not in _SPECULATION:
        raise ValueError(f"{text(value)} is no speculative mode of trtllm-build")
    return _SPECULATION[name]


def adapters(value: Any) -> tuple[str, ...] | None:
    """Adapters by name and place, as trtbuild writes them."""
    found = json.loads(value) if isinstance(value, str) else value
    return tuple(found.values()) or None


TRANSFORMS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        **{
            one.__name__: one
            for one in (boolean, inverted, whole, positive, several, number, fraction, integers, word, words)
        },
        **{one.__name__: one for one in (paths, drafting, decoding, speculation)},
        **{one.__name__: one for one in (groups, places, policy, layout, sparsity, kv_format, excluded, adapters)},
        "format": weight_format,
        "group": positive,
    }
)
