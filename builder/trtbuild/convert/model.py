"""The whole model: every layer of every rank as `Linear`s, norms and tables, and from these the plans of the files.

Names of the output: NVIDIA/TensorRT-LLM, tensorrt_llm/models/llama/convert.py @04a2cacbfd3b and gemma/convert.py
@65b31db1b401. ``mlp.fc`` is the unified ``gate_proj`` and ``mlp.gate`` the ``up_proj``; where both are one matrix
(experts, Phi-3) up comes first. Layers are numbered from 0 in every pipeline stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trtbuild.convert.architectures import Architecture, Experts
from trtbuild.convert.experts import fp4_outputs, is_fp4_experts
from trtbuild.convert.formats import Coding, Quantized
from trtbuild.convert.linear import Linear, Part, is_quantized, outputs_of
from trtbuild.convert.plan import Output, Piece, RankPlan, numbers
from trtbuild.convert.shape import Shape, share
from trtbuild.convert.source import Source
from trtbuild.convert.values import FILE_DTYPES, caster

EMBEDDING, HEAD, LAST_NORM = "model.embed_tokens.weight", "lm_head", "model.norm.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A checkpoint and all that decides its conversion; `dtype` is the type of what is not quantized."""

    source: Source
    row: Architecture
    shape: Shape
    quantized: Quantized
    dtype: str

    @property
    def file_dtype(self) -> str:
        """`dtype` in safetensors spelling."""
        return FILE_DTYPES[self.dtype]

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding and has no tensor of its own."""
        return f"{HEAD}.weight" not in self.source.tensors and self.source.facts.tie_word_embeddings

    def bias(self, name: str) -> bool:
        """Whether the config gives a kind of layer ("attention", "mlp") biases."""
        return bool(self.source.config.get(f"{name}_bias", False))


def layer_prefix(layer: int) -> str:
    """Where the unified checkpoint keeps decoder layer `layer`."""
    return f"model.layers.{layer}."


def layer_linears(model: Model, layer: int, local: int, tp_rank: int) -> list[Linear]:
    """The linear layers of one decoder layer and rank, in TensorRT-LLM's names; `local` counts within the stage."""
    shape, prefix, name = model.shape, layer_prefix(layer), f"transformer.layers.{local}."
    attention = shape.heads * shape.head_dim
    dense = Linear(
        name=f"{name}attention.dense",
        experts=((_whole(f"{prefix}self_attn.o_proj", shape.hidden, attention),),),
        stacked=False,
        columns=share(attention, shape.tp, tp_rank),
        total_rows=shape.hidden,
        bias=model.bias("attention"),
    )
    return [_qkv(model, prefix, name, tp_rank), dense, *_mlp(model, prefix, name, tp_rank)]


def _whole(prefix: str, outputs: int, inputs: int) -> Part:
    return Part(prefix, ((0, outputs),), outputs, inputs)


def _qkv(model: Model, prefix: str, name: str, tp_rank: int) -> Linear:
    shape = model.shape
    query, kv = shape.query_rows(tp_rank), shape.kv_rows(tp_rank)
    heads, kv_heads = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    parts: tuple[Part, ...]
    if model.row.fused:
        rows = (query, _moved(kv, heads), _moved(kv, heads + kv_heads))
        parts = (Part(f"{prefix}self_attn.qkv_proj", rows, heads + 2 * kv_heads, shape.hidden),)
    else:
        sizes = {"q": (query, heads), "k": (kv, kv_heads), "v": (kv, kv_heads)}
        parts = tuple(
            Part(f"{prefix}self_attn.{letter}_proj", (rows,), outputs, shape.hidden)
            for letter, (rows, outputs) in sizes.items()
        )
    return Linear(
        name=f"{name}attention.qkv",
        experts=(parts,),
        stacked=False,
        columns=(0, shape.hidden),
        total_rows=sum(end - begin for part in parts for begin, end in part.rows),
        bias=model.row.qkv_bias or model.bias("attention"),
    )


def _moved(span: tuple[int, int], by: int) -> tuple[int, int]:
    return span[0] + by, span[1] + by


def _mlp(model: Model, prefix: str, name: str, tp_rank: int) -> Iterator[Linear]:
    shape, experts = model.shape, model.row.experts
    if experts is not None:
        yield from _expert_layers(shape, experts, prefix, f"{name}mlp", tp_rank)
        if experts.shared is not None:
            shared = [(f"{prefix}{experts.shared}.",)]
            yield from _gated(
                shape, shared, f"{name}mlp.shared_expert", shape.shared_mlp, tp_rank, experts, stacked=False
            )
        return
    rows, bias = share(shape.mlp, shape.tp, tp_rank), model.bias("mlp")
    if model.row.fused:
        both = (_moved(rows, shape.mlp), rows)
        part = Part(f"{prefix}mlp.gate_up_proj", both, 2 * shape.mlp, shape.hidden)
        yield _column(f"{name}mlp.fc", ((part,),), shape.hidden, bias=bias)
    else:
        for made, stored in (("fc", "gate_proj"), ("gate", "up_proj")):
            part = Part(f"{prefix}mlp.{stored}", (rows,), shape.mlp, shape.hidden)
            yield _column(f"{name}mlp.{made}", ((part,),), shape.hidden, bias=bias)
    yield Linear(
        name=f"{name}mlp.proj",
        experts=((_whole(f"{prefix}mlp.down_proj", shape.hidden, shape.mlp),),),
        stacked=False,
        columns=rows,
        total_rows=shape.hidden,
        bias=bias,
    )


def _expert_layers(shape: Shape, experts: Experts, prefix: str, name: str, tp_rank: int) -> Iterator[Linear]:
    prefixes = [(f"{prefix}{experts.prefix}.{index}.",) for index in range(shape.experts)]
    yield from _gated(shape, prefixes, name, shape.mlp, tp_rank, experts, stacked=True)


def _gated(
    shape: Shape, prefixes: list[tuple[str]], name: str, size: int, tp_rank: int, names: Experts, *, stacked: bool
) -> Iterator[Linear]:
    """Up and gate as one matrix, and the way down, of one or several experts."""
    rows = share(size, shape.tp, tp_rank)
    into = tuple(
        tuple(Part(f"{prefix}{stored}", (rows,), size, shape.hidden) for stored in (names.up, names.gate))
        for (prefix,) in prefixes
    )
    yield _column(f"{name}.fc", into, shape.hidden, stacked=stacked)
    yield Linear(
        name=f"{name}.proj",
        experts=tuple((_whole(f"{prefix}{names.down}", shape.hidden, size),) for (prefix,) in prefixes),
        stacked=stacked,
        columns=rows,
        total_rows=shape.hidden,
    )


def _column(
    name: str, experts: tuple[tuple[Part, ...], ...], inputs: int, *, stacked: bool = False, bias: bool = False
) -> Linear:
    """A layer whose outputs are divided."""
    rows = sum(end - begin for part in experts[0] for begin, end in part.rows)
    return Linear(name=name, experts=experts, stacked=stacked, columns=(0, inputs), total_rows=rows, bias=bias)


def head_linear(model: Model, tp_rank: int) -> Linear:
    """The head, padded to the whole share of a rank."""
    shape = model.shape
    prefix = EMBEDDING.removesuffix(".weight") if model.tied else HEAD
    part = Part(prefix, (shape.vocab_rows(tp_rank),), shape.vocab, shape.hidden)
    return Linear(
        name="lm_head",
        experts=((part,),),
        stacked=False,
        columns=(0, shape.hidden),
        total_rows=shape.padded_vocab // shape.tp,
    )


def plan_rank(model: Model, rank: int) -> RankPlan:
    """The tensors of one rank; ranks count the tensor-parallel part first."""
    shape = model.shape
    pp_rank, tp_rank = divmod(rank, shape.tp)
    plan = RankPlan(rank)
    if pp_rank == 0:
        plan.outputs.append(_embedding(model, tp_rank))
    for local, layer in enumerate(shape.stage(pp_rank)):
        for linear in layer_linears(model, layer, local, tp_rank):
            plan.outputs += _outputs(model, linear)
        plan.outputs += _small(model, layer, local)
    if pp_rank == shape.pp - 1:
        plan.outputs.append(_copied(model, LAST_NORM, "transformer.ln_f.weight"))
        plan.outputs += outputs_of(head_linear(model, tp_rank), model.source, model.quantized, model.file_dtype)
    return plan


def _outputs(model: Model, linear: Linear) -> list[Output]:
    if is_fp4_experts(linear, model.source, model.quantized):
        return fp4_outputs(linear, model.source)
    return outputs_of(linear, model.source, model.quantized, model.file_dtype)


def _embedding(model: Model, tp_rank: int) -> Output:
    shape = model.shape
    cast = caster(model.source.tensors[EMBEDDING].dtype, model.file_dtype)
    piece = Piece(source=EMBEDDING, rows=shape.vocab_rows(tp_rank), columns=(0, shape.hidden), at=0, transform=cast)
    size = (shape.padded_vocab // shape.tp, shape.hidden)
    return Output(name="transformer.vocab_embedding.weight", dtype=model.file_dtype, shape=size, pieces=(piece,))


def small_tensors(model: Model, layer: int, local: int) -> Iterator[tuple[str, str, bool]]:
    """(stored name, output name, whether it is a norm) of what every rank gets whole."""
    prefix, name = layer_prefix(layer), f"transformer.layers.{local}."
    for stored, made in model.row.norms.items():
        yield f"{prefix}{stored}.weight", f"{name}{made}.weight", True
    if model.row.qk_norm:
        for letter in "qk":
            yield f"{prefix}self_attn.{letter}_norm.weight", f"{name}attention.{letter}_layernorm.weight", True
    experts = model.row.experts
    if experts is not None:
        yield f"{prefix}{experts.router}.weight", f"{name}mlp.router.weight", False
        if experts.shared_gate is not None:
            yield f"{prefix}{experts.shared_gate}.weight", f"{name}mlp.shared_expert_gate.weight", False


def _small(model: Model, layer: int, local: int) -> list[Output]:
    made = [_copied(model, stored, name, norm=norm) for stored, name, norm in small_tensors(model, layer, local)]
    if model.quantized.kv_cache is not None:
        scales = [model.source.scalar(name) for name in kv_scales(layer) if name in model.source.tensors]
        name = f"transformer.layers.{local}.attention.kv_cache_scaling_factor"
        made.append(numbers(name, [max(scales, default=1.0)], (1,)))
    return made


def kv_scales(layer: int) -> tuple[str, str]:
    """The names of the scales of keys and values."""
    prefix = layer_prefix(layer)
    return f"{prefix}self_attn.k_proj.k_scale", f"{prefix}self_attn.v_proj.v_scale"


def _copied(model: Model, stored: str, name: str, *, norm: bool = True) -> Output:
    """A tensor that every rank gets whole; routers stay in float32."""
    found = model.source.tensors[stored]
    dtype = "F32" if name.endswith(".router.weight") else model.file_dtype
    plus = 1.0 if norm and model.row.norm_plus_one else 0.0
    piece = Piece(
        source=stored, rows=(0, found.rows), columns=(0, found.width), at=0,
        transform=caster(found.dtype, dtype, plus=plus),
    )  # fmt: skip
    return Output(name=name, dtype=dtype, shape=found.shape, pieces=(piece,))


def unquantized(model: Model, pp_rank: int) -> set[str]:
    """Modules of a stage, in TensorRT-LLM's names, that hold no codes although the checkpoint is quantized."""
    return {_module(linear) for linear in _stage_linears(model, pp_rank) if not is_quantized(linear, model.source)}


def modules(model: Model, pp_rank: int) -> set[str]:
    """All modules of a stage that could hold codes."""
    return {_module(linear) for linear in _stage_linears(model, pp_rank)}


def codings(model: Model, pp_rank: int) -> dict[str, Coding]:
    """How every quantized module of a stage, and the head, is stored."""
    linears = [*_stage_linears(model, pp_rank), head_linear(model, 0)]
    return {
        _module(linear): model.quantized.at(next(linear.parts).prefix)
        for linear in linears
        if is_quantized(linear, model.source)
    }


def _stage_linears(model: Model, pp_rank: int) -> Iterator[Linear]:
    for local, layer in enumerate(model.shape.stage(pp_rank)):
        yield from layer_linears(model, layer, local, 0)


def _module(linear: Linear) -> str:
    return linear.name.rpartition(".")[0] if linear.stacked else linear.name
