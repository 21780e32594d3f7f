"""``trtllm-build``: its arguments, with a reason for each.

Pure: plain values in, rows out. The flags of each release line are data (`build_flags`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trtbuild.build_flags import FlagTable, elsewhere, flag_table
from trtbuild.errors import CompatibilityError
from trtbuild.plan import Choice

BUILT = "built"  # in the engine directory: where the build script puts what trtllm-build makes
DRAFT = "draft"  # in the engine directory: the engine directory of a draft model

# Lowest compute capability, times ten: docs/source/legacy/reference/support-matrix.md @17552a44.
_LOWEST = {"FP8": 89, "W4A8_AWQ": 89, "NVFP4": 100, "W4A16_AWQ": 80, "W8A8_SQ_PER_CHANNEL": 80}
_SPARSE_FROM = 80
_FP8_ATTENTION = ("FP8", "W4A8_AWQ", "NVFP4")
# plugin.py @c20322ff, reduce_fusion and user_buffer; models/llama and models/gemma use the fused all-reduce.
_REDUCE_FUSION = ("LlamaForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM")
_USER_BUFFER = ("LlamaForCausalLM",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the engine is built for; lengths and counts in tokens. By default prompts may fill `max_seq_len`."""

    max_batch_size: int
    max_seq_len: int
    max_num_tokens: int
    max_input_len: int | None = None
    max_beam_width: int = 1
    tokens_per_block: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """A mode of ``--speculative_decoding_mode``, the longest draft, and what EAGLE's layers add; lengths in tokens."""

    mode: str
    max_draft_len: int
    more_len: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Adapters: their directories (the first one configures), modules in TensorRT-LLM's names, highest rank."""

    directories: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    max_rank: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """Everything that decides an engine.

    `gpu` is the compute capability times ten (90 for an H100); `extra` are flags that the user chose, with their
    values, instead of or beside ours.
    """

    version: str
    architecture: str
    format: str | None
    kv_cache: str | None
    gpu: int
    tp_size: int
    pp_size: int
    limits: Limits
    experts: bool = False
    speculation: Speculation | None = None
    lora: Lora | None = None
    sparse: bool = False
    multiple_profiles: bool = False
    gather_generation_logits: bool = False
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp_size * self.pp_size


def spec_from_json(data: Mapping[str, Any]) -> EngineSpec:
    """The spec that `dataclasses.asdict` and JSON made of one.

    Raises:
        TypeError, KeyError: `data` is no such thing.
    """
    lora, speculation = data["lora"], data["speculation"]
    plain = {name: value for name, value in data.items() if name not in ("limits", "lora", "speculation", "extra")}
    return EngineSpec(
        **plain,
        limits=Limits(**data["limits"]),
        lora=_lora(lora) if lora else None,
        speculation=Speculation(**speculation) if speculation else None,
        extra={flag: tuple(values) for flag, values in data["extra"].items()},
    )


def _lora(data: Mapping[str, Any]) -> Lora:
    return Lora(directories=tuple(data["directories"]), modules=tuple(data["modules"]), max_rank=data["max_rank"])


def choose(spec: EngineSpec) -> tuple[Choice, ...]:
    """Every argument but the directories, in the order of the command line.

    Raises:
        CompatibilityError: the spec asks for what does not exist, each fault named; or a version without known flags.
    """
    table = flag_table(spec.version)
    wrong = _faults(spec)
    if wrong:
        raise CompatibilityError("; ".join(wrong), "change the recipe's runtime, target or compress section")
    ours = [*_limit_rows(spec), *_cache_rows(spec), *_plugin_rows(spec), *_feature_rows(spec), *_build_rows(spec)]
    rows = [row for row in ours if row.flag not in spec.extra]
    rows += [Choice(flag, tuple(values), "runtime.extra") for flag, values in spec.extra.items()]
    for row in rows:
        _check_row(row, table)
    return tuple(rows)


def arguments(choices: Sequence[Choice], checkpoint: str, output: str) -> tuple[str, ...]:
    """The argument list after ``trtllm-build``."""
    made = ["--checkpoint_dir", checkpoint, "--output_dir", output]
    for choice in choices:
        made += [f"--{choice.flag}", *choice.values]
    return tuple(made)


def _faults(spec: EngineSpec) -> list[str]:
    wrong = []
    lowest = _LOWEST.get(str(spec.format), 0)
    if spec.gpu < lowest:
        wrong.append(f"{spec.format} needs compute capability {lowest / 10}, the target has {spec.gpu / 10}")
    if spec.kv_cache == "FP8" and spec.gpu < _LOWEST["FP8"]:
        wrong.append(f"an FP8 KV cache needs compute capability 8.9, the target has {spec.gpu / 10}")
    if spec.speculation is not None and spec.pp_size > 1:
        wrong.append("speculation does not work with pipeline stages: pp_size must be 1")
    if spec.speculation is not None and spec.speculation.max_draft_len < 1:
        wrong.append("speculation needs a max_draft_len of 1 or more")
    if spec.sparse and spec.gpu < _SPARSE_FROM:
        wrong.append(f"2:4 sparsity needs compute capability 8.0, the target has {spec.gpu / 10}")
    return wrong


def built_limits(spec: EngineSpec) -> dict[str, int]:
    """The limits as they will stand in the engine's config, after what trtllm-build does to them.

    builder.py grows two of them for drafts; check_max_num_tokens of tensorrt_llm/_common.py @0fccc5b97dd7 keeps the
    tokens of a step between one block and what all requests hold together.
    """
    limits, draft = spec.limits, spec.speculation.max_draft_len if spec.speculation else 0
    tokens = max(min(limits.max_num_tokens, limits.max_batch_size * limits.max_seq_len), limits.tokens_per_block)
    longest = {} if limits.max_input_len is None else {"max_input_len": limits.max_input_len}
    return longest | {
        "max_batch_size": limits.max_batch_size,
        "max_seq_len": limits.max_seq_len + draft + (spec.speculation.more_len if spec.speculation else 0),
        "max_num_tokens": max(tokens, limits.max_batch_size * (draft + 1) if draft else 0),
        "max_beam_width": limits.max_beam_width,
        "tokens_per_block": limits.tokens_per_block,
    }


def _limit_rows(spec: EngineSpec) -> list[Choice]:
    limits = spec.limits
    tokens = built_limits(spec)["max_num_tokens"]
    if tokens == limits.max_num_tokens:
        why = "runtime.max_num_tokens"
    elif tokens < limits.max_num_tokens:
        why = "lowered to max_batch_size x max_seq_len: all requests together hold no more"
    else:
        why = "raised to hold every request's draft, and a block, in one step"
    return [
        Choice("max_batch_size", (str(limits.max_batch_size),), "runtime.max_batch_size"),
        Choice(
            "max_seq_len", (str(limits.max_seq_len),), "runtime.max_seq_len; a draft's length is added by the builder"
        ),
        Choice("max_input_len", *_longest_input(limits)),
        Choice("max_num_tokens", (str(tokens),), why),
        Choice("max_beam_width", (str(limits.max_beam_width),), "the package's models answer with one beam"),
    ]


def _longest_input(limits: Limits) -> tuple[tuple[str], str]:
    if limits.max_input_len is not None:
        return (str(limits.max_input_len),), "serving.max_input_tokens"
    return (str(limits.max_seq_len),), "the default of 1024 would refuse longer prompts"


def _cache_rows(spec: EngineSpec) -> list[Choice]:
    fp8 = spec.format in _FP8_ATTENTION and spec.kv_cache == "FP8"
    if fp8:
        why = f"{spec.format} with an FP8 KV cache: attention over the prompt in FP8"
    else:
        why = "takes effect only with FP8, W4A8_AWQ or NVFP4 weights and an FP8 KV cache"
    return [
        Choice("kv_cache_type", ("paged",), "in-flight batching and block reuse need blocks"),
        Choice("tokens_per_block", (str(spec.limits.tokens_per_block),), "runtime.kv_cache.tokens_per_block"),
        Choice("use_paged_context_fmha", *_paged_context(spec)),
        Choice("use_fp8_context_fmha", ("enable" if fp8 else "disable",), why),
    ]


def _paged_context(spec: EngineSpec) -> tuple[tuple[str], str]:
    """builder.py @008b2b8d turns it off for an INT8 cache."""
    if spec.kv_cache == "INT8":
        return ("disable",), "it does not work with an INT8 KV cache, which the builder would find out"
    return ("enable",), "block reuse, chunked context and drafts need it"


def _plugin_rows(spec: EngineSpec) -> list[Choice]:
    made = [Choice("gemm_plugin", *_gemm_plugin(spec))]
    if spec.experts:
        made.append(Choice("moe_plugin", ("auto",), "the model has experts"))
    fusion = spec.tp_size > 1 and spec.architecture in _REDUCE_FUSION
    if fusion:
        made.append(Choice("reduce_fusion", ("enable",), "adds and norms join the all-reduce of several ranks"))
        if spec.format == "FP8" and spec.architecture in _USER_BUFFER:
            made.append(Choice("user_buffer", ("enable",), "FP8 Llama on several ranks: no copy before the all-reduce"))
    return made


def _gemm_plugin(spec: EngineSpec) -> tuple[tuple[str], str]:
    if spec.sparse:
        return ("disable",), "only TensorRT's own kernels use 2:4 weights; the plugin would bypass them"
    if spec.format == "FP8":
        return ("disable",), "the default: TensorRT's own FP8 kernels, fused with what surrounds them"
    if spec.format == "NVFP4":
        return ("nvfp4",), "the plugin has the FP4 kernels"
    if spec.format is None:
        return ("auto",), "cuBLASLt for the matrix products, in the model's type"
    return ("auto",), f"{spec.format} has kernels of its own; the plugin computes the unquantized head"


def _feature_rows(spec: EngineSpec) -> list[Choice]:
    made = []
    if spec.sparse:
        made.append(Choice("weight_sparsity", (), "the weights are 2:4 sparse; TensorRT uses it where it is faster"))
    if spec.multiple_profiles:
        made.append(Choice("multiple_profiles", ("enable",), "the recipe's: kernels for several batch sizes"))
    if spec.gather_generation_logits:
        made.append(Choice("gather_generation_logits", (), "the recipe's: clients may ask for logits"))
    if spec.speculation is not None:
        made.append(Choice("speculative_decoding_mode", (spec.speculation.mode,), "speculative.method"))
        made.append(Choice("max_draft_len", (str(spec.speculation.max_draft_len),), "tokens of the longest draft"))
    if spec.lora is not None:
        made.append(Choice("lora_plugin", ("auto",), "adapters at run time, in the model's type"))
        if spec.lora.directories:
            made.append(Choice("lora_dir", spec.lora.directories, "the recipe's adapters; the first one configures"))
        if spec.lora.modules:
            made.append(Choice("lora_target_modules", spec.lora.modules, "the modules that the adapters change"))
        made.append(Choice("max_lora_rank", (str(spec.lora.max_rank),), "runtime.lora_config.max_lora_rank"))
    return made


def _build_rows(spec: EngineSpec) -> list[Choice]:
    return [
        Choice("input_timing_cache", ("/build/timing.cache",), "kernels measured before are not measured again"),
        Choice(
            "output_timing_cache", ("/build/timing.new",), "for the next build on this kind of GPU, once it is whole"
        ),
        Choice("workers", (str(spec.world_size),), "ranks are built at once, one a GPU"),
        Choice("monitor_memory", (), "the log says how much memory the build took"),
    ]


def _check_row(row: Choice, table: FlagTable) -> None:
    """Refuse a flag or a value that this release line does not have."""
    flag = table.flags.get(row.flag)
    if flag is None:
        others = elsewhere(row.flag, table)
        raise CompatibilityError(f"trtllm-build {table.name} has no flag --{row.flag}{others}")
    if flag.kind == "choice" and row.values and row.values[0] not in flag.allowed:
        raise CompatibilityError(
            f"trtllm-build {table.name}: --{row.flag} {row.values[0]} is not one of {', '.join(flag.allowed)}"
        )
    unknown = [value for value in row.values if flag.kind == "list" and flag.allowed and value not in flag.allowed]
    if unknown:
        raise CompatibilityError(
            f"trtllm-build {table.name}: --{row.flag} {' '.join(unknown)} is none of {', '.join(flag.allowed)}"
        )
