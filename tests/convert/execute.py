"""A TensorRT-LLM checkpoint executed in float32 PyTorch, rank by rank, from its files and its config alone.

Every tensor-parallel rank computes with its own shards; partial results of row layers are summed, as the all-reduce
does, and ranks of the next pipeline stage go on with the sum. No step of TensorRT-LLM's loader is imitated that only
changes the layout or the precision (interleaving, group scales in the model's type).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deconvert import Reader, Tensors, untiled
from torch.nn.functional import gelu, silu

Parts = list[torch.Tensor]
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def round_e4m3(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Through E4M3 codes of `scale`, saturating."""
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def round_int8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Through 8-bit integers of `scale`."""
    return (x / scale).round().clamp(-128, 127) * scale


def fuse_gate_and_up(reader: Reader) -> None:
    """What TensorRT-LLM does to FP8 gate and up when it builds an engine: both on the larger scale, in float32."""
    for rank in reader.ranks:
        for name in [name for name in rank if name.endswith("mlp.gate.weights_scaling_factor")]:
            prefix = name.removesuffix("gate.weights_scaling_factor")
            scales = [rank[f"{prefix}{part}.weights_scaling_factor"] for part in ("fc", "gate")]
            for part, scale in zip(("fc", "gate"), scales, strict=True):
                values = rank[f"{prefix}{part}.weight"].float() * scale / max(scales)
                rank[f"{prefix}{part}.weight"] = values.to(torch.float8_e4m3fn)
                rank[f"{prefix}{part}.weights_scaling_factor"] = max(scales)


@dataclass
class Run:
    """One checkpoint; with `activations` the inputs of linear layers are quantized as the format says."""

    reader: Reader
    activations: bool = True

    @classmethod
    def open(cls, directory: Path, *, activations: bool = True) -> Run:
        return cls(Reader(directory), activations)

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """[tokens, vocabulary] in float32."""
        config, tp = self.reader.config, self.reader.tp
        hidden = self.embed(torch.tensor(token_ids))
        for layer in range(config["num_hidden_layers"]):
            stage, local = self.reader.place(layer)
            ranks = self.reader.ranks[stage * tp : (stage + 1) * tp]
            hidden = self.layer(hidden, ranks, f"transformer.layers.{local}.", layer)
        last = self.reader.ranks[(self.reader.pp - 1) * tp :]
        hidden = self.norm(hidden, last[0], "transformer.ln_f.weight")
        logits = torch.cat([self.linear(hidden, rank, "lm_head") for rank in last], -1)[:, : config["vocab_size"]]
        cap = config.get("final_logit_softcapping")
        return cap * torch.tanh(logits / cap) if cap else logits

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Each rank looks up the tokens of its rows; the others give zeros."""
        config, tp = self.reader.config, self.reader.tp
        total = torch.zeros(len(tokens), config["hidden_size"])
        for index, rank in enumerate(self.reader.ranks[:tp]):
            table = rank["transformer.vocab_embedding.weight"].float()
            local = tokens - index * table.shape[0]
            mine = (local >= 0) & (local < table.shape[0])
            total[mine] += table[local[mine]]
        if config["architecture"].startswith("Gemma"):
            total *= config["hidden_size"] ** 0.5
        return total

    def norm(self, x: torch.Tensor, rank: Tensors, name: str) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.reader.config["norm_epsilon"])
        return x * scale * rank[name].float()

    def layer(self, hidden: torch.Tensor, ranks: list[Tensors], name: str, index: int) -> torch.Tensor:
        four = f"{name}pre_feedforward_layernorm.weight" in ranks[0]
        normed = self.norm(hidden, ranks[0], f"{name}input_layernorm.weight")
        attended = self.reduce(
            [self.attention(normed, rank, name, index) for rank in ranks], ranks, f"{name}attention.dense"
        )
        if four:
            attended = self.norm(attended, ranks[0], f"{name}post_layernorm.weight")
        hidden = hidden + attended
        before = "pre_feedforward_layernorm" if four else "post_layernorm"
        normed = self.norm(hidden, ranks[0], f"{name}{before}.weight")
        if f"{name}mlp.router.weight" in ranks[0]:
            out = self.experts(normed, ranks, name)
        else:
            out = self.reduce([self.mlp(normed, rank, f"{name}mlp") for rank in ranks], ranks, f"{name}mlp.proj")
        if four:
            out = self.norm(out, ranks[0], f"{name}post_feedforward_layernorm.weight")
        return hidden + out

    def reduce(self, inputs: Parts, ranks: list[Tensors], name: str) -> torch.Tensor:
        """A row layer: the sum over ranks, and the bias once."""
        total = sum(self.linear(x, rank, name, bias=False) for x, rank in zip(inputs, ranks, strict=True))
        assert isinstance(total, torch.Tensor)
        return total + ranks[0][f"{name}.bias"].float() if f"{name}.bias" in ranks[0] else total

    def act(self) -> Callable[[torch.Tensor], torch.Tensor]:
        name = self.reader.config["hidden_act"]
        return {"silu": silu, "swiglu": silu, "gelu_pytorch_tanh": lambda x: gelu(x, approximate="tanh")}[name]

    def mlp(self, x: torch.Tensor, rank: Tensors, name: str) -> torch.Tensor:
        first = self.linear(x, rank, f"{name}.fc")
        if f"{name}.gate.weight" in rank:
            return self.act()(first) * self.linear(x, rank, f"{name}.gate")
        up, gate = first.chunk(2, -1)
        return up * silu(gate)

    def experts(self, x: torch.Tensor, ranks: list[Tensors], name: str) -> torch.Tensor:
        moe = self.reader.config["moe"]
        scores = torch.softmax(x @ ranks[0][f"{name}mlp.router.weight"].T, -1)
        weights, chosen = scores.topk(moe["top_k"], -1)
        if moe["normalization_mode"] == 1:
            weights = weights / weights.sum(-1, keepdim=True)
        total = torch.zeros_like(x)
        for expert in range(moe["num_experts"]):
            share = (weights * (chosen == expert)).sum(-1, keepdim=True)
            for rank in ranks:
                up, gate = self.linear(x, rank, f"{name}mlp.fc", expert=expert).chunk(2, -1)
                total += share * self.linear(up * silu(gate), rank, f"{name}mlp.proj", expert=expert)
        if f"{name}mlp.shared_expert.fc.weight" in ranks[0]:
            shared = f"{name}mlp.shared_expert"
            out = self.reduce([self.mlp(x, rank, shared) for rank in ranks], ranks, f"{shared}.proj")
            total += torch.sigmoid(x @ ranks[0][f"{name}mlp.shared_expert_gate.weight"].float().T) * out
        return total

    def attention(self, x: torch.Tensor, rank: Tensors, name: str, index: int) -> torch.Tensor:
        """The rank's heads, before the output projection."""
        config, size = self.reader.config, self.reader.config["head_size"]
        tokens = len(x)
        heads = config["num_attention_heads"] // self.reader.tp
        kv_heads = max(config["num_key_value_heads"] // self.reader.tp, 1)
        packed = self.linear(x, rank, f"{name}attention.qkv").view(tokens, heads + 2 * kv_heads, size)
        query, key, value = packed.split([heads, kv_heads, kv_heads], 1)
        if config["qk_layernorm"]:
            query = self.norm(query, rank, f"{name}attention.q_layernorm.weight")
            key = self.norm(key, rank, f"{name}attention.k_layernorm.weight")
        window = self.window(index)
        query, key = self.rotate(query, window), self.rotate(key, window)
        if config["quantization"]["kv_cache_quant_algo"]:
            through = round_e4m3 if config["quantization"]["kv_cache_quant_algo"] == "FP8" else round_int8
            scale = rank[f"{name}attention.kv_cache_scaling_factor"]
            key, value = through(key, scale), through(value, scale)
        key, value = (part.repeat_interleave(heads // kv_heads, 1) for part in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(config.get("query_pre_attn_scalar", size))
        cap = config.get("attn_logit_softcapping")
        scores = cap * torch.tanh(scores / cap) if cap else scores
        distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
        allowed = (distance >= 0) & (distance < (window or tokens))
        scores = scores.masked_fill(~allowed, -torch.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).reshape(tokens, heads * size)

    def window(self, index: int) -> int | None:
        """The sliding window of a layer; the checkpoint has it for Gemma 3 alone, others give it at run time."""
        pattern = self.reader.config.get("sliding_window_pattern")
        return self.reader.config["sliding_window"] if pattern and (index + 1) % pattern else None

    def rotate(self, x: torch.Tensor, window: int | None) -> torch.Tensor:
        config = self.reader.config
        size = int(config["head_size"] * config.get("rotary_pct", 1.0))
        base = config["rope_local_base_freq"] if window else config["rotary_base"]
        frequencies = base ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
        scaling = config["rotary_scaling"]
        stretch = 1.0
        if scaling and scaling["type"] == "llama3":
            frequencies = _llama3(frequencies, scaling)
        elif scaling and scaling["type"] == "yarn":
            frequencies, stretch = _yarn(frequencies, base, size, scaling)
        elif scaling:
            assert scaling["type"] == "linear"
            frequencies = frequencies / scaling["factor"]
        angles = torch.arange(len(x))[:, None] * frequencies
        cos, sin = (torch.cat([part, part], -1)[:, None] * stretch for part in (angles.cos(), angles.sin()))
        turned, rest = x[..., :size], x[..., size:]
        first, second = turned.chunk(2, -1)
        return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)

    def linear(
        self, x: torch.Tensor, rank: Tensors, name: str, *, bias: bool = True, expert: int | None = None
    ) -> torch.Tensor:
        held = {key.rpartition(".")[2]: value for key, value in rank.items() if key.rpartition(".")[0] == name}
        if expert is not None:
            shared = ("activation_scaling_factor", "activation_global_scaling_factor")
            held = {key: value if key in shared else value[expert] for key, value in held.items()}
        weight = held["weight"]
        if weight.dtype.itemsize > 1:
            out = x @ weight.float().T
        else:
            if "prequant_scaling_factor" in held:
                x = x * held["prequant_scaling_factor"].float()
            algo = self.reader.algo(name)
            assert algo is not None, name
            if self.activations and "activation_scaling_factor" in held:
                through = round_int8 if algo == "W8A8_SQ_PER_CHANNEL" else round_e4m3
                x = through(x, held["activation_scaling_factor"])
            out = x @ _dequantized(held, algo).T
        return out + held["bias"].float() if bias and "bias" in held else out


def _dequantized(held: Tensors, algo: str) -> torch.Tensor:
    codes = held["weight"]
    if algo == "NVFP4" and "alpha" in held:  # an expert, with the product of the second scale and the input's
        held = held | {
            "weights_scaling_factor": untiled(held["weights_block_scaling_factor_interleaved"]),
            "weights_scaling_factor_2": held["alpha"] / held["activation_global_scaling_factor"],
        }
    scale = held["weights_scaling_factor"].float()
    if algo == "FP8":
        return codes.float() * scale
    if algo == "W8A8_SQ_PER_CHANNEL":
        return codes.float() * scale[:, None]
    raw = codes.view(torch.uint8)
    low, high = (raw & 15).int(), (raw >> 4).int()
    if algo == "NVFP4":  # neighbours along the inputs
        values = torch.stack([low, high], -1).reshape(raw.shape[0], -1)
        plain = _E2M1[(values & 7).long()] * torch.where(values > 7, -1.0, 1.0)
        return plain * scale.repeat_interleave(16, 1) * held["weights_scaling_factor_2"]
    rows = torch.stack([low, high], 1).reshape(-1, raw.shape[1])  # neighbours along the outputs
    plain = torch.where(rows > 7, rows - 16, rows).float()
    return plain * scale.repeat_interleave(plain.shape[1] // scale.shape[1], 1)


def _llama3(frequencies: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Long waves are stretched by the factor, short ones stay, those between are blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / scaling["factor"] + blend * frequencies


def _yarn(frequencies: torch.Tensor, base: float, size: int, scaling: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Waves that turn often in the trained context stay, slow ones are stretched; and what cosines are multiplied by.

    The defaults are TensorRT-LLM's, not Transformers'.
    """
    factor, trained = scaling["factor"], scaling.get("original_max_position_embeddings", 4096)

    def turning(times: float) -> float:
        return size * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(turning(scaling.get("beta_fast", 32.0))), 0)
    high = min(math.ceil(turning(scaling.get("beta_slow", 1.0))), size - 1)
    ramp = ((torch.arange(size // 2) - low) / (high - low or 0.001)).clamp(0, 1)

    def stretch(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    blended = frequencies / factor * ramp + frequencies * (1 - ramp)
    return blended, stretch(scaling.get("mscale", 1.0)) / stretch(scaling.get("mscale_all_dim", 0.0))
