"""NVFP4 experts, in the form in which TensorRT-LLM's layer holds them.

For other layers the file has what ModelOpt wrote, and TensorRT-LLM's loader interleaves the block scales and multiplies
the second scales; stacked experts it cannot, for it takes two sizes from a shape (models/modeling_utils.py,
preprocess_perlayer_weights @34a267279384). It passes over the names that the layer itself uses, and these are what
upstream's own conversion of quantized models writes (layers/moe.py, MOEWeightWrapper.postprocess @c388fec7fe09;
models/model_weights_loader.py @04a2cacbfd3b). So do we.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from trtbuild.convert.formats import FORMATS, Quantized
from trtbuild.convert.linear import Linear, Part, is_quantized, largest_input_scale, matrix
from trtbuild.convert.plan import Block, Output, numbers
from trtbuild.convert.source import Source
from trtbuild.convert.values import Array

_NVFP4 = FORMATS["NVFP4"]
_GROUP = 16
# A tile of block scales is 128 outputs by 4 groups: cpp/tensorrt_llm/thop/fp4Op.cpp, BlockScaleInterleave @9df6d722b020
# (experts one after another); cpp/tensorrt_llm/kernels/quantization.cuh, get_sf_out_offset_128x4.
TILE_ROWS, TILE_COLUMNS = 128, 4
_LANES = 32


def is_fp4_experts(linear: Linear, source: Source, quantized: Quantized) -> bool:
    """Whether `linear` is what this module is for."""
    return linear.stacked and quantized.at(next(linear.parts).prefix).format == _NVFP4 and is_quantized(linear, source)


def tile_problem(linear: Linear) -> str | None:
    """Why the block scales of one expert are no whole number of tiles, which the layer's parameters must be."""
    groups = (linear.columns[1] - linear.columns[0]) // _GROUP
    if linear.total_rows % TILE_ROWS == 0 and groups % TILE_COLUMNS == 0:
        return None
    return (
        f"an expert of a rank has {linear.total_rows} outputs and {groups * _GROUP} inputs in {linear.name}; "
        f"NVFP4 experts of TensorRT-LLM have multiples of {TILE_ROWS} and {TILE_COLUMNS * _GROUP}"
    )


def fp4_outputs(linear: Linear, source: Source) -> list[Output]:
    """Every tensor of stacked experts in NVFP4."""
    name, largest = linear.name, largest_input_scale(linear, source)
    # Gate and up have the same second scale: the checks made sure.
    second = [source.scalar(f"{parts[0].prefix}.weight_scale_2") for parts in linear.experts]
    alpha = np.asarray(second, dtype=np.float32) * np.float32(largest)
    scales = matrix(linear, source, "weight_scale", "weights_block_scaling_factor", _NVFP4.scale, (1, _GROUP))
    return [
        matrix(linear, source, "weight", "weight", _NVFP4.weight[1], (1, _NVFP4.column_packing)),
        scales,
        _interleaved(linear, source, scales),
        numbers(f"{name}.activation_global_scaling_factor", [largest], (1,)),
        numbers(f"{name}.alpha", [float(value) for value in alpha], (len(second),)),
    ]


def _interleaved(linear: Linear, source: Source, plain: Output) -> Output:
    columns = (linear.columns[0] // _GROUP, linear.columns[1] // _GROUP)
    size = linear.total_rows * (columns[1] - columns[0])
    blocks = [
        Block(at=index * size, make=_reader(source, parts, columns)) for index, parts in enumerate(linear.experts)
    ]
    return Output(name=f"{plain.name}_interleaved", dtype=plain.dtype, shape=plain.shape, blocks=blocks)


def _reader(source: Source, parts: Sequence[Part], columns: tuple[int, int]) -> Callable[[], Array]:
    """What reads the block scales of one expert and puts them in place."""

    def make() -> Array:
        read = [source.rectangle(f"{part.prefix}.weight_scale", rows, columns) for part in parts for rows in part.rows]
        return interleave(np.concatenate(read))

    return make


def interleave(scales: Array) -> Array:
    """Block scales [outputs, groups] tile by tile; in one, outputs 0, 32, 64 and 96 lie side by side, then 1, ..."""
    rows, groups = scales.shape
    tiles = scales.reshape(rows // TILE_ROWS, TILE_ROWS // _LANES, _LANES, groups // TILE_COLUMNS, TILE_COLUMNS)
    return np.ascontiguousarray(tiles.transpose(0, 3, 2, 1, 4)).reshape(rows, groups)
