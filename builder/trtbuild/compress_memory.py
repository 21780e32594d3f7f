"""What the compress step needs of the host's memory, from the sizes of one decoder layer.

The numbers were fitted to the peaks that `benchmarks/compress_stream.py` measures on a CPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from trtbuild.layer_size import LayerSize
from trtbuild.weight_formats import WEIGHT_FORMATS, is_smoothed, is_solved, needs_text

_IMPORTED = 700_000_000  # Python with torch, transformers and ModelOpt, and a tokenizer
_COPYING = 450_000_000  # with torch alone
_STRAIGHT = 600_000_000  # with torch and transformers, and a few rows for each thread
# Formats whose weights are coded from file to file (`trtbuild.compress.codings`).
STRAIGHT_FORMATS = ("fp8_per_channel_per_token", "fp8_block", "int8_weight_only", "mxfp8")
_FLOAT = 4
_SOURCE = 2
_PLAIN_SCRATCH = 12  # a matrix that is pruned, and its mask
_FITTED = 20  # beside `_PLAIN_SCRATCH`: the original, residuals and directions of a least-squares fit
_UNITS = {"": 1, "K": 1, "M": 2, "G": 3, "T": 4}
_KEPT_UNASKED = 2 << 30
SELF_GROUP = 16  # documents of calibration text that the model writes at the same time


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """One compression; `samples` and `length` are of the calibration text, 0 where none is needed.

    `experts`: the model has experts, whose common ranges take a layer in memory.
    """

    layer: LayerSize
    hidden_size: int
    format: str
    kv_cache: str
    sparsity_method: str | None
    samples: int
    length: int
    more_formats: tuple[str, ...] = ()  # that some layers have instead of `format`
    experts: bool = False

    @property
    def formats(self) -> tuple[str, ...]:
        """The weight formats, bf16 left out."""
        return tuple(name for name in (self.format, *self.more_formats) if name != "none")

    @property
    def single(self) -> str:
        """The weight format where there is one alone, whichever field names it; else none."""
        return self.formats[0] if len(set(self.formats)) == 1 else "none"

    @property
    def compressed(self) -> bool:
        """Whether a layer is loaded at all."""
        return bool(self.formats) or self.kv_cache != "none" or self.sparsity_method is not None

    @property
    def straight(self) -> bool:
        """Whether weights are coded from file to file, and no layer is ever loaded."""
        plain = self.kv_cache == "none" and self.sparsity_method is None and not self.experts
        return plain and self.format in STRAIGHT_FORMATS and self.single == self.format

    @property
    def streams(self) -> int:
        """How many kinds of hidden states go from layer to layer."""
        quantized = any(needs_text(name, self.kv_cache) for name in self.formats or ("none",))
        twice = is_smoothed(self.single) and self.kv_cache != "none"
        return int(self.sparsity_method == "sparsegpt" or quantized) + twice

    @property
    def state_bytes(self) -> int:
        """The hidden states before and behind one layer."""
        return 2 * self.streams * self.samples * self.length * self.hidden_size * _FLOAT

    @property
    def smallest(self) -> int:
        """The peak with the hidden states on disk."""
        if not self.compressed:
            return _COPYING
        if self.straight:
            return _STRAIGHT
        layer = self.layer
        scratch = max((WEIGHT_FORMATS[name].scratch for name in self.formats), default=_PLAIN_SCRATCH)
        coded = 1 if self.formats else 2
        # The layer, its coded or bf16 form and that of the one before, which is yet to be written, and what is computed
        # with the largest matrix at once.
        weights = (_FLOAT + 2 * coded) * layer.parameters + scratch * layer.matrix
        solved = self.sparsity_method == "sparsegpt" or is_solved(self.single)
        hessians = self._solving if solved else 0
        widest = max(layer.matrix // max(self.hidden_size, 1), self.hidden_size)
        running = _FLOAT * self.length * (8 * self.hidden_size + 4 * widest)
        return _IMPORTED + weights + hessians + running

    @property
    def ahead_bytes(self) -> int:
        """The next layer, in the source's own type."""
        return _SOURCE * self.layer.parameters if self.compressed and not self.straight else 0

    @property
    def _solving(self) -> int:
        """The Hessians of all inputs, two matrices while one is inverted, and the weights that are fitted to it."""
        fitted = _FITTED * self.layer.matrix if self.sparsity_method == "sparsegpt" else 0
        return _FLOAT * (self.layer.squared_inputs + 2 * self.layer.inputs**2) + fitted

    def kept_bytes(self, limit: int | None) -> int:
        """The hidden states that stay in memory under a limit on everything: all or none."""
        room = _KEPT_UNASKED if limit is None else limit - self.smallest
        return self.state_bytes if self.state_bytes <= room else 0

    def reads_ahead(self, limit: int | None) -> bool:
        """Whether there is room to read the next layer while one is computed; kept states come first."""
        return limit is None or self.smallest + self.kept_bytes(limit) + self.ahead_bytes <= limit

    def peak(self, limit: int | None) -> int:
        """The peak to expect."""
        return self.smallest + self.kept_bytes(limit) + (self.ahead_bytes if self.reads_ahead(limit) else 0)


def sampling_bytes(parameters: int, kv_elements_per_token: int, length: int) -> int:
    """The peak while the embedded engine writes calibration text in float32: the whole model, and its KV cache."""
    return _IMPORTED + _FLOAT * (parameters + kv_elements_per_token * SELF_GROUP * (length + 64))


def parse_bytes(text: str) -> int | None:
    """The number of bytes that a text such as ``8GiB``, ``500 MB`` or ``1073741824`` means; None for another text."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.ASCII)
    if found is None or (found[3] and not found[2]):
        return None
    return int(float(found[1]) * (1024 if found[3] else 1000) ** (_UNITS[found[2]] if found[2] else 0))


def show_bytes(size: int) -> str:
    """A size that `parse_bytes` reads as at least this much."""
    return f"{-(-size // (1 << 20))}MiB"
