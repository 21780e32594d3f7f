"""What calibration text covers: how much of it there is, in which scripts, and how many tokens every expert saw.

Imports no torch.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from statistics import median
from typing import Any

# An expert with less than this share of an even one, or with fewer tokens, is named.
_EVEN_SHARE = 0.1
_LEAST_TOKENS = 8
_RARE = 0.001
_OTHER = "other"
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Coverage:
    """Numbers about the samples of one calibration.

    `shortest`, `median` and `longest` are lengths of samples in tokens, `documents` counts the documents of which they
    hold a part, `scripts` has the share of each script among the letters, the largest first.
    """

    tokens: int
    samples: int
    documents: int
    shortest: int
    median: int
    longest: int
    scripts: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """For the evidence."""
        return asdict(self)

    def sentence(self) -> str:
        """For the build's output."""
        lengths = f"{self.longest}" if self.shortest == self.longest else f"{self.shortest} to {self.longest}"
        seen = [(script, share) for script, share in self.scripts.items() if share >= _RARE][:_SHOWN]
        shares = ", ".join(f"{script} {share:.1%}" for script, share in seen)
        return (
            f"{self.tokens:,} tokens of text in {self.samples} samples of {lengths}, from {self.documents} documents; "
            f"scripts: {shares or 'no letters'}"
        )


def coverage_of(samples: Sequence[Sequence[int]], documents: int, texts: Sequence[str]) -> Coverage:
    """The coverage of `samples`, whose `texts` they are."""
    lengths = sorted(map(len, samples))
    return Coverage(
        tokens=sum(lengths),
        samples=len(samples),
        documents=documents,
        shortest=lengths[0],
        median=int(median(lengths)),
        longest=lengths[-1],
        scripts=script_shares("".join(texts)),
    )


def script_shares(text: str) -> dict[str, float]:
    """The share of each script among the letters of `text`, the largest first; rare ones together as "other".

    A script is the first word of a letter's Unicode name, after forms for compatibility have been undone.
    """
    found: Counter[str] = Counter()
    for letter, count in Counter(unicodedata.normalize("NFKC", text)).items():
        script = _script(letter)
        if script is not None:
            found[script] += count
    letters = found.total()
    shares: Counter[str] = Counter()
    for script, count in found.items():
        shares[script if count >= _RARE * letters else _OTHER] += count
    ranked = sorted(shares.items(), key=lambda item: (item[0] == _OTHER, -item[1], item[0]))
    return {script: round(count / letters, 4) for script, count in ranked}


@lru_cache(maxsize=1 << 16)
def _script(letter: str) -> str | None:
    if not unicodedata.category(letter).startswith("L"):
        return None
    name = unicodedata.name(letter, "")
    return name.partition(" ")[0].capitalize() if name and not name.startswith("CJK") else "CJK" if name else None


def starved_experts(tokens: Mapping[str, Sequence[int]]) -> list[tuple[str, int, int]]:
    """The experts that saw too few tokens, the worst first: (experts module, number of the expert, its tokens).

    Too few is less than a tenth of what an even distribution over the module's experts gives, or less than 8.

    Args:
        tokens: By the name of the experts module, what each of its experts saw.
    """
    found = []
    for name, counts in tokens.items():
        least = max(_EVEN_SHARE * sum(counts) / max(len(counts), 1), _LEAST_TOKENS)
        found += [(name, index, count) for index, count in enumerate(counts) if count < least]
    return sorted(found, key=lambda item: item[2])


def expert_notes(tokens: Mapping[str, Sequence[int]]) -> list[str]:
    """A warning that names the experts which saw too few tokens, and what to do; none where there are none."""
    starved = starved_experts(tokens)
    if not starved:
        return []
    names = ", ".join(f"{name}.{index} ({count:,} tokens)" for name, index, count in starved[:_SHOWN])
    more = f" and {len(starved) - _SHOWN} more" if len(starved) > _SHOWN else ""
    even = [sum(counts) // max(len(counts), 1) for counts in tokens.values()]
    note = (
        f"{len(starved)} of {sum(map(len, tokens.values()))} experts saw too few calibration tokens "
        f"(an even share is {min(even):,}): {names}{more}; raise compress.calibration.count, give text that is closer "
        "to what the model will answer, or exclude these experts"
    )
    return [note]
