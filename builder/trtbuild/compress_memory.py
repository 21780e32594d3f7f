"""What the compress step needs of the host's memory, from the sizes of one decoder layer.

The numbers were fitted to the peaks that `benchmarks/compress_stream.py` measures on a CPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from trtbuild.layer_size import LayerSize
from trtbuild.weight_formats import WEIGHT_FORMATS, is_searched, needs_text

_IMPORTED = 700_000_000  # Python with torch, transformers and ModelOpt, and a tokenizer
_COPYING = 450_000_000  # with torch alone
_FLOAT = 4
_PLAIN_SCRATCH = 12  # a matrix that is pruned, and its mask
_UNITS = {"": 1, "K": 1, "M": 2, "G": 3, "T": 4}
_KEPT_UNASKED = 2 << 30
SELF_GROUP = 16  # documents of calibration text that the model writes at the same time


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """One compression; `samples` and `length` are of the calibration text, 0 where none is needed."""

    layer: LayerSize
    hidden_size: int
    format: str
    kv_cache: str
    sparsity_method: str | None
    samples: int
    length: int

    @property
    def compressed(self) -> bool:
        """Whether a layer is loaded at all."""
        return self.format != "none" or self.kv_cache != "none" or self.sparsity_method is not None

    @property
    def streams(self) -> int:
        """How many kinds of hidden states go from layer to layer."""
        quantized = needs_text(self.format, self.kv_cache)
        return (
            int(self.sparsity_method == "sparsegpt")
            + quantized
            + (is_searched(self.format) and self.kv_cache != "none")
        )

    @property
    def state_bytes(self) -> int:
        """The hidden states before and behind one layer."""
        return 2 * self.streams * self.samples * self.length * self.hidden_size * _FLOAT

    @property
    def smallest(self) -> int:
        """The peak with the hidden states on disk."""
        if not self.compressed:
            return _COPYING
        layer = self.layer
        coded, scratch = (1, WEIGHT_FORMATS[self.format].scratch) if self.format != "none" else (2, _PLAIN_SCRATCH)
        # The layer, its coded or bf16 form, and what is computed with the largest matrix at once.
        weights = (_FLOAT + coded) * layer.parameters + scratch * layer.matrix
        hessians = 2 * _FLOAT * layer.squared_inputs if self.sparsity_method == "sparsegpt" else 0
        widest = max(layer.matrix // max(self.hidden_size, 1), self.hidden_size)
        running = _FLOAT * self.length * (8 * self.hidden_size + 4 * widest)
        return _IMPORTED + weights + hessians + running

    def kept_bytes(self, limit: int | None) -> int:
        """The hidden states that stay in memory under a limit on everything: all or none."""
        room = _KEPT_UNASKED if limit is None else limit - self.smallest
        return self.state_bytes if self.state_bytes <= room else 0

    def peak(self, limit: int | None) -> int:
        """The peak to expect."""
        return self.smallest + self.kept_bytes(limit)


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
