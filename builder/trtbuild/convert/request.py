"""What a conversion is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.errors import Problem, RecipeError

DTYPES = ("auto", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One conversion; `dtype` is the type of everything that is not quantized.

    `medusa` is a directory of Medusa heads that come with the model, for trees of drafts of `max_draft_len` tokens.
    """

    source: Path
    output: Path
    tp_size: int
    pp_size: int
    dtype: str
    medusa: Path | None = None
    max_draft_len: int = 0

    @property
    def world_size(self) -> int:
        """The number of ranks, and of files."""
        return self.tp_size * self.pp_size


def parse_request(raw: Mapping[str, Any]) -> Request:
    """Return `raw` as a `Request`; parallel sizes default to 1, the type to "auto".

    Raises:
        RecipeError: A missing directory, a size below 1, or a type that is none of `DTYPES`.
    """
    problems = [
        Problem(f"convert.{name}", "is missing", "name a directory")
        for name in ("source", "output")
        if not isinstance(raw.get(name), str) or not raw[name]
    ]
    sizes = {name: raw.get(name, 1) for name in ("tp_size", "pp_size")}
    problems += [
        Problem(f"convert.{name}", f"{size!r} is not a number of GPUs", "use 1 or more")
        for name, size in sizes.items()
        if not isinstance(size, int) or isinstance(size, bool) or size < 1
    ]
    dtype = raw.get("dtype") or "auto"
    if dtype not in DTYPES:
        problems.append(Problem("convert.dtype", f"{dtype!r} is not one of {', '.join(DTYPES)}"))
    if problems:
        raise RecipeError(problems)
    heads = raw.get("medusa")
    return Request(
        source=Path(raw["source"]),
        output=Path(raw["output"]),
        dtype=dtype,
        medusa=None if heads is None else Path(heads),
        max_draft_len=raw.get("max_draft_len", 0),
        **sizes,
    )
