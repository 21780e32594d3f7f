"""A reader of TensorRT-LLM checkpoints, from the format's description: back to unified names and whole tensors.

Written from the description alone (per-rank files, layers numbered from 0 in each pipeline stage, the first stages with
one layer more where they do not divide; query, key and value rows of a rank one after another; gate_proj in mlp.fc and
up_proj in mlp.gate, or both as up then gate in one matrix; outputs of column layers and inputs of row layers divided;
block scales of NVFP4 experts also in tiles of 128 outputs by 4 groups). Nothing of trtbuild is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

TYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8, "I8": torch.int8,
}  # fmt: skip
Tensors = dict[str, torch.Tensor]
# Of a column layer, where they have more than one element.
_OUTPUT_AXIS = ("weight", "bias", "weights_scaling_factor", "weights_block_scaling_factor")
_TILED = "weights_block_scaling_factor_interleaved"


def read_safetensors(path: Path) -> Tensors:
    """Every tensor of one file, parsed from its bytes; data must be aligned, gapless and end with the file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        kind = TYPES[entry["dtype"]]
        assert begin == end, name
        assert begin % kind.itemsize == 0, name
        end = stop
        data = bytearray(raw[8 + length + begin : 8 + length + stop])
        tensors[name] = torch.frombuffer(data, dtype=kind).reshape(entry["shape"])
    assert 8 + length + end == len(raw)
    return tensors


@dataclass
class Reader:
    """One checkpoint; every tensor that is taken is marked, so that leftovers show."""

    directory: Path
    config: dict[str, Any] = field(init=False)
    ranks: list[Tensors] = field(init=False)
    taken: set[tuple[int, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.config = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        mapping = self.config["mapping"]
        self.tp, self.pp = mapping["tp_size"], mapping["pp_size"]
        assert mapping["world_size"] == self.tp * self.pp
        self.ranks = [read_safetensors(self.directory / f"rank{rank}.safetensors") for rank in range(self.tp * self.pp)]
        layers = self.directory / "quant_cfg.json"
        self.layers = json.loads(layers.read_text(encoding="utf-8"))["quantized_layers"] if layers.exists() else None
        assert (self.layers is not None) == (self.config["quantization"]["quant_algo"] == "MIXED_PRECISION")

    def algo(self, name: str) -> str | None:
        """The format of a module, in the checkpoint's own names."""
        if self.layers is not None:
            return self.layers[name]["quant_algo"] if name in self.layers else None
        return self.config["quantization"]["quant_algo"]

    def place(self, layer: int) -> tuple[int, int]:
        """(pipeline stage, number within it) of a layer."""
        left = layer
        for stage in range(self.pp):
            here = sum(1 for other in range(self.config["num_hidden_layers"]) if other % self.pp == stage)
            if left < here:
                return stage, left
            left -= here
        raise AssertionError(layer)

    def every(self, stage: int, name: str) -> list[torch.Tensor]:
        """The tensor `name` of all tensor-parallel ranks of a stage."""
        ranks = [stage * self.tp + index for index in range(self.tp)]
        self.taken |= {(rank, name) for rank in ranks}
        return [self.ranks[rank][name] for rank in ranks]

    def same(self, stage: int, name: str) -> torch.Tensor:
        """A tensor that all ranks hold whole."""
        first, *rest = self.every(stage, name)
        assert all(bits(other).equal(bits(first)) for other in rest), name
        return first

    def leftovers(self) -> set[tuple[int, str]]:
        """(rank, name) of tensors that nobody asked for."""
        return {(rank, name) for rank, held in enumerate(self.ranks) for name in held} - self.taken


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, for comparisons to the last bit."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def cat(tensors: list[torch.Tensor], axis: int) -> torch.Tensor:
    """Concatenate any type: torch cannot for E4M3."""
    kind = tensors[0].dtype
    if kind.itemsize == 1:
        return torch.cat([tensor.view(torch.uint8) for tensor in tensors], axis).view(kind)
    return torch.cat(tensors, axis)


def deconvert(directory: Path) -> Tensors:
    """All tensors in unified names. Scales keep TensorRT-LLM's words."""
    reader = Reader(directory)
    config, made = reader.config, Tensors()
    made["model.embed_tokens.weight"] = cat(reader.every(0, "transformer.vocab_embedding.weight"), 0)
    last = reader.pp - 1
    made["model.norm.weight"] = reader.same(last, "transformer.ln_f.weight")
    made["lm_head.weight"] = cat(reader.every(last, "lm_head.weight"), 0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert bool((made[name][config["vocab_size"] :] == 0).all())
        made[name] = made[name][: config["vocab_size"]]
    for layer in range(config["num_hidden_layers"]):
        stage, local = reader.place(layer)
        _layer(reader, stage, f"transformer.layers.{local}.", f"model.layers.{layer}.", made)
    assert reader.leftovers() == set()
    return made


def _layer(reader: Reader, stage: int, name: str, unified: str, made: Tensors) -> None:
    norms = {
        "input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm",
        "pre_feedforward_layernorm": "pre_feedforward_layernorm",
        "post_feedforward_layernorm": "post_feedforward_layernorm",
        "attention.q_layernorm": "self_attn.q_norm", "attention.k_layernorm": "self_attn.k_norm",
    }  # fmt: skip
    present = reader.ranks[stage * reader.tp]
    for theirs, ours in norms.items():
        if f"{name}{theirs}.weight" in present:
            made[f"{unified}{ours}.weight"] = reader.same(stage, f"{name}{theirs}.weight")
    if f"{name}attention.kv_cache_scaling_factor" in present:
        made[f"{unified}kv_scale"] = reader.same(stage, f"{name}attention.kv_cache_scaling_factor")
    _column(reader, stage, f"{name}attention.qkv", unified, made, _split_qkv(reader, f"{name}attention.qkv"))
    _row(reader, stage, f"{name}attention.dense", f"{unified}self_attn.o_proj", made)
    _mlp(reader, stage, name, unified, made)


def _mlp(reader: Reader, stage: int, name: str, unified: str, made: Tensors) -> None:
    kind, present = reader.config["architecture"], reader.ranks[stage * reader.tp]
    if f"{name}mlp.router.weight" not in present:
        if f"{name}mlp.gate.weight" in present:
            for theirs, ours in (("fc", "gate_proj"), ("gate", "up_proj")):
                _column(reader, stage, f"{name}mlp.{theirs}", f"{unified}mlp.", made, _whole(ours))
        else:
            _column(reader, stage, f"{name}mlp.fc", f"{unified}mlp.", made, _halves("up_proj", "gate_proj"))
        _row(reader, stage, f"{name}mlp.proj", f"{unified}mlp.down_proj", made)
        return
    block = "block_sparse_moe." if kind == "MixtralForCausalLM" else "mlp."
    made[f"{unified}{block}gate.weight"] = reader.same(stage, f"{name}mlp.router.weight")
    words = ("w3", "w1", "w2") if kind == "MixtralForCausalLM" else ("up_proj", "gate_proj", "down_proj")
    for index in range(present[f"{name}mlp.fc.weight"].shape[0]):
        expert = f"{unified}{block}experts.{index}."
        _column(reader, stage, f"{name}mlp.fc", expert, made, _halves(*words[:2]), index)
        _row(reader, stage, f"{name}mlp.proj", f"{expert}{words[2]}", made, index)
    if f"{name}mlp.shared_expert_gate.weight" in present:
        made[f"{unified}mlp.shared_expert_gate.weight"] = reader.same(stage, f"{name}mlp.shared_expert_gate.weight")
        shared = f"{unified}mlp.shared_expert."
        _column(reader, stage, f"{name}mlp.shared_expert.fc", shared, made, _halves(*words[:2]))
        _row(reader, stage, f"{name}mlp.shared_expert.proj", f"{shared}{words[2]}", made)


# What every rank has of an output-divided tensor, in unified names, to the whole of each; `packed` for codes.
Split = Callable[[list[torch.Tensor], bool], Tensors]


def _whole(name: str) -> tuple[tuple[str, ...], Split]:
    return (name,), lambda ranks, packed: {name: cat(ranks, 0)}


def _halves(first: str, second: str) -> tuple[tuple[str, ...], Split]:
    """Each rank holds its rows of both, one after the other."""

    def split(ranks: list[torch.Tensor], packed: bool) -> Tensors:
        middle = ranks[0].shape[0] // 2
        return {first: cat([r[:middle] for r in ranks], 0), second: cat([r[middle:] for r in ranks], 0)}

    return (first, second), split


def _split_qkv(reader: Reader, module: str) -> tuple[tuple[str, ...], Split]:
    """Query, key and value rows of each rank; with more ranks than key heads, neighbours hold the same head."""
    config, tp = reader.config, reader.tp
    heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_size"]
    names = tuple(f"self_attn.{letter}_proj" for letter in "qkv")
    packing = 2 if reader.algo(module) in {"W4A16_AWQ", "W4A8_AWQ"} else 1

    def split(ranks: list[torch.Tensor], packed: bool) -> Tensors:
        unit = size // (packing if packed else 1)
        query, kv = heads // tp * unit, max(kv_heads // tp, 1) * unit
        assert all(rank.shape[0] == query + 2 * kv for rank in ranks)
        found = {names[0]: cat([rank[:query] for rank in ranks], 0)}
        copies = max(tp // kv_heads, 1)
        for name, begin in zip(names[1:], (query, query + kv), strict=True):
            parts = [rank[begin : begin + kv] for rank in ranks]
            for index, part in enumerate(parts):
                assert bits(part).equal(bits(parts[index // copies * copies]))
            found[name] = cat(parts[::copies], 0)
        return found

    return names, split


def _fields(reader: Reader, stage: int, name: str, expert: int | None) -> dict[str, list[torch.Tensor]]:
    """The tensors of one layer, of every rank; of one expert, if they are stacked."""
    held = reader.ranks[stage * reader.tp]
    keys = [key.rpartition(".")[2] for key in held if key.rpartition(".")[0] == name]
    found = {key: reader.every(stage, f"{name}.{key}") for key in keys}
    if expert is not None:  # all but the input's scale have one entry for each expert
        shared = ("activation_scaling_factor", "activation_global_scaling_factor")
        found = {key: ranks if key in shared else [r[expert] for r in ranks] for key, ranks in found.items()}
    for tiled, plain in zip(found.pop(_TILED, []), found.get("weights_block_scaling_factor", []), strict=False):
        assert bits(untiled(tiled)).equal(bits(plain))
    return found


def untiled(tiled: torch.Tensor) -> torch.Tensor:
    """Block scales in rows: a tile of 512 bytes has outputs 0, 32, 64, 96, each with its 4 groups, then 1, 33, ..."""
    rows, groups = tiled.shape
    raw = tiled.contiguous().view(torch.uint8).reshape(-1)
    row, group = torch.meshgrid(torch.arange(rows), torch.arange(groups), indexing="ij")
    tile = (row // 128) * (groups // 4) + group // 4
    return raw[tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + group % 4].view(tiled.dtype)


def _equal(ranks: list[torch.Tensor]) -> torch.Tensor:
    assert all(bits(rank).equal(bits(ranks[0])) for rank in ranks)
    return ranks[0]


def _column(
    reader: Reader, stage: int, name: str, unified: str, made: Tensors,
    how: tuple[tuple[str, ...], Split], expert: int | None = None,
) -> None:  # fmt: skip
    """A layer whose outputs are divided; what has one value for a whole layer goes to each of its parts."""
    parts, split = how
    for key, ranks in _fields(reader, stage, name, expert).items():
        if key in _OUTPUT_AXIS and ranks[0].numel() > 1:
            made |= {f"{unified}{part}.{key}": whole for part, whole in split(ranks, key == "weight").items()}
        else:
            made |= {f"{unified}{part}.{key}": _equal(ranks) for part in parts}


def _row(reader: Reader, stage: int, name: str, unified: str, made: Tensors, expert: int | None = None) -> None:
    """A layer whose inputs are divided."""
    for key, ranks in _fields(reader, stage, name, expert).items():
        divided = key == "prequant_scaling_factor" or ranks[0].dim() == 2
        made[f"{unified}.{key}"] = cat(ranks, -1) if divided else _equal(ranks)
