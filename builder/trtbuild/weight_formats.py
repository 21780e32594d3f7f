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
        group: Weights along the input that share a scale; 0 for none, or where the recipe says it (INT4).
        sides: Numbers that must divide a matrix's outputs and inputs.
        activations: Calibration text is needed: for the ranges of activations, or to search scales.
        searched: AWQ looks for smoothing scales in a second pass over the text.
        solved: GPTQ rounds the weights by the Hessians of their inputs; else as `searched`, less the smoothing.
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
    solved: bool = False
    weight_range: bool = True
    input_range: bool = False
    scratch: int = 10

    @property
    def takes_group(self) -> bool:
        """Whether the recipe says the size of groups: INT4's scales are of four bytes, others' of one."""
        return self.searched and not self.group

    def file_bits(self, group: int | None) -> float:
        """Bits of a weight in the file with its share of the scales of groups; `group` is the recipe's."""
        if self.takes_group:
            return self.bits + (32 / group if group else 0.0)
        return self.bits + (8 / self.group if self.group else 0.0)


# Engines take whole blocks of 128 x 128 (vllm-project/vllm: vllm/model_executor/layers/quantization/modelopt.py), while
# ModelOpt would pad them. INT4 packs two outputs in a byte, FP4 two inputs.
WEIGHT_FORMATS: Mapping[str, WeightFormat] = {
    "fp8": WeightFormat(8, activations=True, input_range=True),
    "fp8_per_channel_per_token": WeightFormat(8),
    "fp8_block": WeightFormat(8, sides=(128, 128)),
    "int8_sq": WeightFormat(8, activations=True, input_range=True),
    "int8_weight_only": WeightFormat(8),
    "int4_awq": WeightFormat(4, sides=(2, 1), activations=True, searched=True, scratch=18),
    "int4_gptq": WeightFormat(4, sides=(2, 1), activations=True, searched=True, solved=True, scratch=18),
    "w4a8_awq": WeightFormat(
        4, sides=(2, 1), activations=True, searched=True, weight_range=False, input_range=True, scratch=24
    ),
    "nvfp4": WeightFormat(4, group=16, sides=(1, 16), activations=True, input_range=True, scratch=14),
    "nvfp4_awq": WeightFormat(
        4, group=16, sides=(1, 16), activations=True, searched=True, input_range=True, scratch=24
    ),
    "w4a16_nvfp4": WeightFormat(4, group=16, sides=(1, 16), scratch=14),
    "mxfp4": WeightFormat(4, group=32, sides=(1, 32), weight_range=False, scratch=100),
    "mxfp8": WeightFormat(8, group=32, sides=(1, 32), weight_range=False),
}

# Bits of a number in the KV cache: a byte, or NVFP4's four and a byte for each block of 16.
KV_CACHE_BITS: Mapping[str, float] = {"fp8": 8, "int8": 8, "nvfp4": 4.5}


def needs_text(weight_format: str, kv_cache: str) -> bool:
    """Whether quantization needs calibration text."""
    return kv_cache != "none" or (weight_format != "none" and WEIGHT_FORMATS[weight_format].activations)


def takes_group(weight_format: str) -> bool:
    """Whether the recipe says how many weights share a scale."""
    return weight_format != "none" and WEIGHT_FORMATS[weight_format].takes_group


def file_bits(weight_format: str, group_size: int | None) -> float:
    """Bits that a weight takes in the file, its share of the scales of its group included."""
    return 16.0 if weight_format == "none" else WEIGHT_FORMATS[weight_format].file_bits(group_size)


def is_smoothed(weight_format: str) -> bool:
    """Whether inputs of a layer may be scaled, which its stored form or the layer before must make good."""
    return is_searched(weight_format) and not is_solved(weight_format)


def is_packed_int4(weight_format: str) -> bool:
    """Whether the weights are four-bit integers with scales of groups and nothing else but smoothing."""
    return weight_format in ("int4_awq", "int4_gptq")


def is_searched(weight_format: str) -> bool:
    """Whether the text goes through twice, the second time with a KV cache that is rounded."""
    return weight_format != "none" and WEIGHT_FORMATS[weight_format].searched


def is_solved(weight_format: str) -> bool:
    """Whether GPTQ rounds the weights; every decoder layer is calibrated on what its rounded predecessors give."""
    return weight_format != "none" and WEIGHT_FORMATS[weight_format].solved
