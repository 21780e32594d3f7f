"""The model's sizes and how they are divided: which heads, rows and layers a rank gets."""

from __future__ import annotations

from dataclasses import dataclass

from trtbuild.convert.architectures import Architecture
from trtbuild.convert.formats import Format, Quantized
from trtbuild.convert.plan import Span
from trtbuild.convert.request import Request
from trtbuild.convert.source import Source
from trtbuild.errors import CompatibilityError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Logical sizes of the model, and the parallel sizes."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    mlp: int
    experts: int
    shared_mlp: int
    tp: int
    pp: int

    @property
    def padded_vocab(self) -> int:
        """The vocabulary, padded to a multiple of the tensor-parallel size (_utils.pad_vocab_size)."""
        return -(-self.vocab // self.tp) * self.tp

    def stage(self, pp_rank: int) -> range:
        """The decoder layers of a pipeline stage; the first stages take one more each where a remainder is left.

        Source: NVIDIA/TensorRT-LLM, tensorrt_llm/mapping.py @05ebebb2c1d3, pp_layers.
        """
        each, more = divmod(self.layers, self.pp)
        begin = pp_rank * each + min(pp_rank, more)
        return range(begin, begin + each + (pp_rank < more))

    def query_rows(self, tp_rank: int) -> Span:
        """Rows of the query projection."""
        return share(self.heads * self.head_dim, self.tp, tp_rank)

    def kv_rows(self, tp_rank: int) -> Span:
        """Rows of the key and of the value projection; with more ranks than heads, ranks share a head."""
        if self.tp <= self.kv_heads:
            return share(self.kv_heads * self.head_dim, self.tp, tp_rank)
        head = tp_rank * self.kv_heads // self.tp
        return head * self.head_dim, (head + 1) * self.head_dim

    def vocab_rows(self, tp_rank: int) -> Span:
        """Rows of the embedding and of the head that exist; the rest of a rank's share is padding."""
        begin, end = share(self.padded_vocab, self.tp, tp_rank)
        return min(begin, self.vocab), min(end, self.vocab)


def share(size: int, ranks: int, rank: int) -> Span:
    """The equal part of `size` that belongs to `rank`."""
    each = size // ranks
    return rank * each, (rank + 1) * each


def read_shape(source: Source, row: Architecture, request: Request) -> Shape:
    """The sizes that the config gives."""
    facts, config = source.facts, source.config
    mlp = config.get("moe_intermediate_size") if row.experts and row.family == "qwen" else facts.intermediate_size
    return Shape(
        layers=facts.num_layers,
        hidden=facts.hidden_size,
        heads=facts.num_attention_heads,
        kv_heads=facts.num_key_value_heads,
        head_dim=facts.head_dim,
        vocab=facts.vocab_size,
        mlp=int(mlp or 0),
        experts=(facts.num_experts or 0) if row.experts else 0,
        shared_mlp=int(config.get("shared_expert_intermediate_size") or 0),
        tp=request.tp_size,
        pp=request.pp_size,
    )


def check_division(shape: Shape, quantized: Quantized, row: Architecture) -> None:
    """Refuse a division that leaves a remainder anywhere.

    Raises:
        CompatibilityError: names every size that does not divide.
    """
    wrong = [*_pipeline_problems(shape, row), *_tensor_problems(shape)]
    if not wrong and quantized.coding.format is not None:
        wrong = _format_problems(shape, quantized.coding.format, quantized.coding.group)
    if wrong:
        raise CompatibilityError(
            f"{row.name} with tp_size {shape.tp} and pp_size {shape.pp}: " + "; ".join(wrong),
            "choose parallel sizes that divide them",
        )


def _pipeline_problems(shape: Shape, row: Architecture) -> list[str]:
    if shape.pp > 1 and not row.pipeline:
        return ["TensorRT-LLM cannot split this model over pipeline stages, pp_size must be 1"]
    if shape.pp > shape.layers:
        return [f"there are only {shape.layers} layers for {shape.pp} pipeline stages"]
    return []


def _tensor_problems(shape: Shape) -> list[str]:
    wrong = []
    if shape.heads % shape.tp:
        wrong.append(f"{shape.heads} attention heads do not divide by {shape.tp}")
    if max(shape.kv_heads, shape.tp) % min(shape.kv_heads, shape.tp):
        wrong.append(f"{shape.kv_heads} key and value heads can neither be divided by nor spread over {shape.tp} ranks")
    for what, size in (("intermediate size", shape.mlp), ("shared expert's size", shape.shared_mlp)):
        if size % shape.tp:
            wrong.append(f"the {what} {size} does not divide by {shape.tp}")
    return wrong


def _format_problems(shape: Shape, chosen: Format, group: int) -> list[str]:
    unit = max(group, chosen.column_packing)
    attention = shape.heads * shape.head_dim
    inputs = {
        "hidden size": shape.hidden,
        "attention's size": attention // shape.tp,
        "intermediate size": shape.mlp // shape.tp,
        "shared expert's size": shape.shared_mlp // shape.tp,
    }
    wrong = [
        f"the {what} of a rank, {size}, does not divide into groups of {unit} ({chosen.algo})"
        for what, size in inputs.items()
        if size % unit
    ]
    rows = {"head size": shape.head_dim, "intermediate size": shape.mlp // shape.tp, "hidden size": shape.hidden}
    wrong += [
        f"the {what} of a rank, {size}, does not divide by the {chosen.row_packing} rows packed in a byte"
        for what, size in rows.items()
        if size % chosen.row_packing
    ]
    return wrong
