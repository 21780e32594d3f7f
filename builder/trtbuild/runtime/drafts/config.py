"""What `engine.json` says of speculative decoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from trtbuild.errors import ArtifactError

METHODS = ("ngram", "draft_target", "medusa", "eagle3")
TAKES_DRAFT = ("draft_target", "medusa", "eagle3")
_REBUILD = "build the package again"


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """One method and its numbers; names are those of TensorRT-LLM's LLM API.

    `draft_len_schedule` holds (batch, length) pairs: from that many running requests on, drafts have that length.
    `max_concurrency`: nothing is drafted while more requests run. `choices` are paths through a tree of ranks, for
    Medusa. `draft_kv_cache_share` is the draft's part of the memory of both caches where that is what a GPU has free;
    else both hold `kv_cache.max_tokens`.
    """

    method: str
    max_draft_len: int = 4
    draft: str | None = None
    draft_kv_cache_share: float = 0.0
    draft_len_schedule: tuple[tuple[int, int], ...] | None = None
    max_concurrency: int | None = None
    choices: tuple[tuple[int, ...], ...] | None = None
    max_matching_ngram_size: int = 2
    is_keep_all: bool = True
    is_use_oldest: bool = True
    is_public_pool: bool = True

    def __post_init__(self) -> None:
        """Refuse values that no engine can run with.

        Raises:
            ArtifactError: naming the field, its value and what is allowed.
        """
        if self.method not in METHODS:
            raise ArtifactError(f"speculative.method: {self.method!r} is not allowed; allowed are {', '.join(METHODS)}")
        for name in ("max_draft_len", "max_matching_ngram_size", "max_concurrency"):
            value = getattr(self, name)
            if not (_is_count(value, 1) or (value is None and name == "max_concurrency")):
                raise ArtifactError(f"speculative.{name}: {value!r} is not allowed; it is a whole number of at least 1")
        for name in ("is_keep_all", "is_use_oldest", "is_public_pool"):
            if not isinstance(getattr(self, name), bool):
                raise ArtifactError(f"speculative.{name}: {getattr(self, name)!r} is neither true nor false")
        share = self.draft_kv_cache_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise ArtifactError(f"speculative.draft_kv_cache_share: {share!r} is not from 0 to below 1")
        if not isinstance(self.draft, str | None):
            raise ArtifactError(f"speculative.draft: {self.draft!r} is no name of a directory", _REBUILD)
        if (self.draft is None) != (self.method not in TAKES_DRAFT):
            wants = "needs a draft" if self.draft is None else "takes no draft"
            raise ArtifactError(f"speculative.draft: {self.draft!r}, and {self.method} {wants}", _REBUILD)
        if self.choices is not None:
            self._check_tree(self.choices)
        self._check_schedule()

    def _check_schedule(self) -> None:
        for batch, length in self.draft_len_schedule or ():
            if not (_is_count(batch, 1) and _is_count(length, 0) and length <= self.max_draft_len):
                raise ArtifactError(
                    f"speculative.draft_len_schedule: {batch!r}: {length!r} is not allowed; a number of requests has a "
                    f"length from 0 to max_draft_len {self.max_draft_len}"
                )

    def _check_tree(self, choices: tuple[tuple[int, ...], ...]) -> None:
        """Every path goes on from another one, and each of its numbers is a rank."""
        ranks = all(_is_count(rank, 0) for path in choices for rank in path)
        if self.method != "medusa" or not choices or not all(choices) or not ranks:
            raise ArtifactError(f"speculative.choices: {choices!r} is no list of paths of ranks for medusa")
        known = set(choices)
        lost = [path for path in choices if len(path) > 1 and path[:-1] not in known]
        if lost or len(known) < len(choices):
            raise ArtifactError(
                f"speculative.choices: {choices!r} is no tree",
                "name every path that a longer one goes on from, once",
            )

    @classmethod
    def of(cls, said: Any) -> SpeculativeConfig:
        """The section of engine.json.

        Raises:
            ArtifactError: it is no object, or a key or value is not allowed.
        """
        known = [each.name for each in fields(cls)]
        if not isinstance(said, Mapping) or "method" not in said:
            raise ArtifactError(f"speculative is {said!r}, not an object with a method", _REBUILD)
        unknown = sorted(set(said) - set(known))
        if unknown:
            raise ArtifactError(
                f"unknown key speculative.{unknown[0]}; allowed are {', '.join(known)}",
                "build the package again with this version of trtbuild",
            )
        nested = {"draft_len_schedule": _nested(said, "draft_len_schedule", 2), "choices": _nested(said, "choices")}
        return cls(**{**said, **nested})

    def length_at(self, requests: int) -> int:
        """How many tokens are drafted while this many requests run."""
        if self.max_concurrency is not None and requests > self.max_concurrency:
            return 0
        reached = [pair for pair in sorted(self.draft_len_schedule or ()) if pair[0] <= requests]
        return reached[-1][1] if reached else self.max_draft_len


def _nested(said: Mapping[str, Any], name: str, size: int | None = None) -> tuple[tuple[Any, ...], ...] | None:
    """A list of lists, each of `size` elements where that is given, as tuples."""
    value = said.get(name)
    if value is None:
        return None
    listed = isinstance(value, list | tuple) and all(isinstance(one, list | tuple) for one in value)
    if not listed or (size is not None and any(len(one) != size for one in value)):
        what = "lists" if size is None else f"lists of {size}"
        raise ArtifactError(f"speculative.{name}: {value!r} is no list of {what}", _REBUILD)
    return tuple(map(tuple, value))


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
