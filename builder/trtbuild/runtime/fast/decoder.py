"""The forward pass of the fast path: one loop over the layers, for a decode step and for a step with prompt tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trtbuild.runtime.fast.kernels.decode_attention import decode_attention, splits_for
from trtbuild.runtime.fast.kernels.embed import embed
from trtbuild.runtime.fast.kernels.norm import add_norm
from trtbuild.runtime.fast.kernels.prefill_attention import prefill_attention
from trtbuild.runtime.fast.kernels.rotary import rotary_write
from trtbuild.runtime.fast.linear import gated, linear
from trtbuild.runtime.fast.shapes import Pool
from trtbuild.runtime.fast.weights import Layer, Matrix, Weights

_Attend = Callable[[Layer, Pool, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class Packed:
    """The tokens of a step in a row, all int32 on the device: single tokens of `singles` sequences, then prompt runs.

    `tokens` (-1 - r: what the newest step chose in row r), `positions` and `columns` [T]; `table` [blocks, sequences],
    its first `singles` columns those of the single tokens; `tiles` [tiles, 4] of the runs, rows counted from the first
    run; `wanted`: rows whose logits are asked.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    columns: torch.Tensor
    table: torch.Tensor
    tiles: torch.Tensor
    wanted: torch.Tensor
    singles: int


class Decoder:
    """A decoder over its paged cache; tokens that the host does not know come from `chosen`."""

    def __init__(self, weights: Weights, pools: list[Pool], chosen: torch.Tensor) -> None:
        self.weights = weights
        self.pools = pools
        self._chosen = chosen
        device = weights.embedding.device
        self._multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self._head = Matrix(weights.head)

    def decode(self, tokens: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, logits: torch.Tensor) -> None:
        """Write the `logits` [B, V] (float32) after one token a sequence.

        `table` [blocks, at least B] has a column for each sequence; a position of -1 says that the row is none.
        """
        attend = self._attend_singles(positions, table)
        stream, delta = self._layers(tokens, attend)
        self._write_logits(stream, delta, logits)

    def run(self, step: Packed) -> torch.Tensor:
        """The logits [wanted, V] (float32) of a step with prompt tokens."""
        singles = step.singles
        few = self._attend_singles(step.positions[:singles], step.table)

        def attend(layer: Layer, pool: Pool, qkv: torch.Tensor, out: torch.Tensor) -> None:
            if singles:
                few(layer, pool, qkv[:singles], out[:singles])
            runs = qkv[singles:]
            rotary_write(
                runs, step.positions[singles:], step.columns[singles:], step.table, self.weights.rotation, layer.heads,
                pool,
            )  # fmt: skip
            prefill_attention(
                runs, out[singles:], step.tiles, step.table, layer.heads, pool,
                scale=layer.output.input_scale, pre=layer.output.pre,
            )  # fmt: skip

        stream, delta = self._layers(step.tokens, attend, step.wanted)
        rows = step.wanted.shape[0]
        logits = torch.empty((rows, self.weights.head.shape[0]), dtype=torch.float32, device=stream.device)
        self._write_logits(stream, delta, logits)
        return logits

    def _attend_singles(self, positions: torch.Tensor, table: torch.Tensor) -> _Attend:
        rows = positions.shape[0]

        def attend(layer: Layer, pool: Pool, qkv: torch.Tensor, out: torch.Tensor) -> None:
            splits = splits_for(rows * layer.heads.keys, self._multiprocessors)
            decode_attention(
                qkv, out, positions, table, self.weights.rotation, layer.heads, pool,
                splits=splits, scale=layer.output.input_scale, pre=layer.output.pre,
            )  # fmt: skip

        return attend

    def _layers(
        self, tokens: torch.Tensor, attend: _Attend, wanted: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream [T, hidden] before the last layer's output, and that output; of `wanted` rows alone."""
        eps = self.weights.eps
        stream = embed(tokens, self._chosen, self.weights.embedding)
        delta = None
        for layer, pool in zip(self.weights.layers, self.pools, strict=True):
            x = add_norm(stream, delta, layer.attention_norm, eps, layer.qkv.input_scale)
            qkv = linear(x, layer.qkv)
            codes = layer.output.input_scale is not None
            attended = qkv.new_empty(
                (qkv.shape[0], layer.heads.queries * layer.heads.size),
                dtype=torch.float8_e4m3fn if codes else qkv.dtype,
            )
            attend(layer, pool, qkv, attended)
            if wanted is not None and layer is self.weights.layers[-1]:
                # After the last attention no row has to do with another.
                attended, stream = _rows(attended, wanted), _rows(stream, wanted)
            x = add_norm(stream, linear(attended, layer.output), layer.mlp_norm, eps, layer.gate_up.input_scale)
            delta = linear(gated(x, layer.gate_up, layer.down), layer.down)
        assert delta is not None  # noqa: S101  a decoder has layers
        return stream, delta

    def _write_logits(self, stream: torch.Tensor, delta: torch.Tensor, logits: torch.Tensor) -> None:
        x = add_norm(stream, delta, self.weights.norm, self.weights.eps, None)
        linear(x, self._head, logits)


def _rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8)[rows].view(x.dtype)  # indexing knows no float8
