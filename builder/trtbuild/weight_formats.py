"""The weight formats: what each one needs, and how large it is.

Names are ours; the tensors are those of ModelOpt's unified Hugging Face checkpoint
(NVIDIA/Model-Optimizer: modelopt/torch/export/quant_utils.py @0.47.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """One format.

    Args:
        bits: Of a weight in the file, less scales.
        group: Weights along the input that share a scale; 0 for none, or where the recipe says it.
        sides: Numbers that must divide a matrix's outputs and inputs.
        activations: Calibration text is needed: for the ranges of activations, or to search scales.
        searched: AWQ looks for smoothing scales in a second pass over the text.
        weight_range: ModelOpt keeps a range for the weights, not only scales of blocks.
        input_range: ModelOpt keeps a range for the inputs.
        scratch: Bytes for each element of a matrix that ModelOpt takes for a while, beside the float32 weights; fitted
            to what `benchmarks/compress_stream.py` measures.
    """

    bits: int
    group: int = 0
    sides: tuple[int, int] = (1, 1)
    activations: bool = False
    searched: bool = False
    weight_range: bool = True
    input_range: bool = False
    scratch: int = 10

    @property
    def scale_bits(self) -> float:
        """Bits of a weight's share of the group scales: four bytes a group of INT4, a byte of the others."""
        return (32 if self.searched else 8) / self.group if self.group else 0.0


# Engines take whole blocks of 128 x 128 (vllm-project/vllm: vllm/model_executor/layers/quantization/modelopt.py), while
# ModelOpt would pad them. INT4 packs two outputs in a byte, FP4 two inputs.
WEIGHT_FORMATS: Mapping[str, WeightFormat] = {
    "fp8": WeightFormat(8, activations=True, input_range=True),
    "fp8_per_channel_per_token": WeightFormat(8),
    "fp8_block": WeightFormat(8, sides=(128, 128)),
    "int8_sq": WeightFormat(8, activations=True, input_range=True),
    "int8_weight_only": WeightFormat(8),
    "int4_awq": WeightFormat(4, sides=(2, 1), activations=True, searched=True, scratch=18),
    "w4a8_awq": WeightFormat(
        4, sides=(2, 1), activations=True, searched=True, weight_range=False, input_range=True, scratch=24
    ),
    "nvfp4": WeightFormat(4, group=16, sides=(1, 16), activations=True, input_range=True, scratch=14),
    "w4a16_nvfp4": WeightFormat(4, group=16, sides=(1, 16), scratch=14),
    "mxfp4": WeightFormat(4, group=32, sides=(1, 32), weight_range=False, scratch=100),
    "mxfp8": WeightFormat(8, group=32, sides=(1, 32), weight_range=False),
}


def needs_text(weight_format: str, kv_cache: str) -> bool:
    """Whether quantization needs calibration text."""
    return kv_cache != "none" or (weight_format != "none" and WEIGHT_FORMATS[weight_format].activations)


def file_bits(weight_format: str, group_size: int | None) -> float:
    """Bits that a weight takes in the file, its share of the scales of its group included."""
    if weight_format == "none":
        return 16.0
    found = WEIGHT_FORMATS[weight_format]
    return found.bits + (32 / group_size if found.searched and group_size else found.scale_bits)


def is_searched(weight_format: str) -> bool:
    """Whether the text goes through twice, the second time with a KV cache that is rounded."""
    return weight_format != "none" and WEIGHT_FORMATS[weight_format].searched
