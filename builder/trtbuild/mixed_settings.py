"""Formats by layer, their choice by measurement, and the form of the files: what `compress` says of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trtbuild.choice_memory import smallest_for_choice, too_small_for_choice
from trtbuild.compress_memory import parse_bytes
from trtbuild.errors import Problem
from trtbuild.model import ModelFacts
from trtbuild.setting_values import Settings
from trtbuild.weight_formats import file_bits, is_solved, takes_group

# What ModelOpt 0.47 computes on a GPU alone: it scores a format by running the model in it.
NEEDS_GPU = frozenset({"nvfp4", "nvfp4_awq", "w4a16_nvfp4", "mxfp4", "mxfp8"})
# What compressed-tensors has a form for here, and the groups of vLLM's kernels for INT4 (vllm-project/vllm,
# vllm/model_executor/layers/quantization/utils/marlin_utils.py, MARLIN_SUPPORTED_GROUP_SIZES).
COMPRESSED_FORMATS = ("int4_awq", "int4_gptq", "fp8")
_VLLM_GROUPS = (32, 64, 128)
_AUTO = ("target_bits", "auto_formats", "auto_method")
_DEFAULT_TARGET_BITS = 5.0
_NEW = (*_AUTO, "overrides", "checkpoint")


def take_mixed(settings: Settings) -> None:
    """Take the fields, and note what contradicts itself; a recipe that names none gets no further settings."""
    compress = settings.recipe.compress
    if not any(settings.given(f"compress.{name}") for name in _NEW) and compress.format != "auto":
        return
    if compress.format == "auto":
        settings.take("compress.target_bits", _DEFAULT_TARGET_BITS)
        settings.put("compress.auto_formats", compress.formats, "default")
        settings.take("compress.auto_method", "gradient")
    else:
        for name in _AUTO:
            if settings.given(f"compress.{name}"):
                settings.problem(
                    f"compress.{name}", f"is set while compress.format is {compress.format}", "use format: auto"
                )
    settings.put("compress.overrides", dict(compress.overrides), "default")
    settings.take("compress.checkpoint")
    for problem in (*_overrides(settings), *_checkpoint(settings)):
        settings.problems.append(problem)


def mixed_mistakes(settings: Settings, facts: ModelFacts) -> Iterator[Problem]:
    """What is wrong with a choice by measurement, seen when every setting is filled in."""
    compress = settings.recipe.compress
    if compress.format != "auto":
        return
    group, target = settings["compress.group_size"], settings["compress.target_bits"]
    least = min(file_bits(name, group) for name in compress.formats)
    if target < least:
        message = f"{target:g}: the smallest of {', '.join(compress.formats)} takes {least:g} bits with its scales"
        yield Problem("compress.target_bits", message, f"use {least:g} or more, or smaller formats in auto_formats")
    limit = parse_bytes(settings["compress.max_memory"] or "")
    if limit is not None and limit < choice_bytes(settings, facts):
        yield too_small_for_choice(limit, choice_bytes(settings, facts))
    device = settings["runtime.device"] if settings.has("runtime.device") else "auto"
    on_gpu = [name for name in compress.formats if name in NEEDS_GPU]
    if on_gpu and device == "cpu":
        message = f"{', '.join(on_gpu)}: ModelOpt scores formats by running the model in them, these on a GPU only"
        yield Problem("compress.auto_formats", message, "use fp8 and int4_awq, or a GPU")


def choice_bytes(settings: Settings, facts: ModelFacts) -> int:
    """The memory that a choice by measurement takes; 0 where nothing is chosen."""
    if settings["compress.format"] != "auto":
        return 0
    return smallest_for_choice(facts, settings["compress.calibration.length"])


def planned_bits(settings: Settings) -> float:
    """Bits of a weight in a linear layer that is compressed; at most, where layers differ."""
    if settings["compress.format"] == "auto":
        return float(settings["compress.target_bits"])
    names = settings.recipe.compress.formats or ("none",)
    return max(file_bits(name, settings["compress.group_size"]) for name in names)


def compress_parameters(settings: Settings) -> dict[str, Any]:
    """What these fields add to the compress step; nothing for a recipe that names none of them."""
    compress = settings.recipe.compress
    more: dict[str, Any] = {}
    if compress.overrides:
        more["overrides"] = [[pattern, name] for pattern, name in compress.overrides.items()]
    if compress.checkpoint != "modelopt":
        more["checkpoint"] = compress.checkpoint
    if compress.format == "auto":
        more["format"] = "none"
        more["auto"] = {
            "formats": list(compress.formats),
            "target_bits": settings["compress.target_bits"],
            "method": settings["compress.auto_method"],
        }
    return more


def warnings(settings: Settings) -> Iterator[str]:
    """What is allowed and may still surprise."""
    compress = settings.recipe.compress
    if compress.format == "auto":
        yield (
            "compress.format: auto holds the whole model in memory while it measures how sensitive each layer is; "
            "compression itself then goes layer by layer"
        )
    if compress.checkpoint == "compressed-tensors":
        yield "smoothing scales of layers that nothing before can take up are left out; the evidence names the layers"
        group = settings["compress.group_size"]
        if group is not None and group not in _VLLM_GROUPS:
            yield f"vLLM's INT4 kernels take groups of {', '.join(map(str, _VLLM_GROUPS))}, not {group}"


def _overrides(settings: Settings) -> Iterator[Problem]:
    compress = settings.recipe.compress
    if compress.format == "auto" and compress.overrides:
        yield Problem("compress.overrides", "is set while compress.format is auto, which chooses for every layer",
                      "use compress.exclude for layers that stay in bf16")  # fmt: skip
    if compress.format == "auto" and compress.sparsity != "none":
        message = f"{compress.sparsity} with format: auto: the layers' sensitivity is that of the dense model"
        yield Problem("compress.sparsity", message, "use none, or name formats in compress.overrides")
    if compress.format == "auto" and settings.recipe.runtime.kind == "trtllm-engine":
        message = "auto: an engine is planned for formats that are known, and these are found out during the build"
        yield Problem("compress.format", message, "build for embedded once and take its choice as compress.overrides")
    solved = [name for name in compress.formats if is_solved(name)]
    if solved and len(compress.formats) > 1:
        message = f"{solved[0]}: GPTQ rounds a layer by what the rounded ones before it give, so it stands alone"
        yield Problem("compress.overrides" if compress.overrides else "compress.auto_formats", message, "use int4_awq")
    duplicates = [name for name in compress.auto_formats or () if (compress.auto_formats or ()).count(name) > 1]
    if duplicates:
        yield Problem("compress.auto_formats", f"{duplicates[0]} stands twice", "name each format once")
    if compress.overrides and not compress.formats:
        yield Problem("compress.overrides", "leaves every layer in bf16", "name a format, or remove it")


def _checkpoint(settings: Settings) -> Iterator[Problem]:
    compress, at = settings.recipe.compress, "compress.checkpoint"
    if compress.checkpoint == "modelopt":
        return
    if not compress.formats:
        yield Problem(at, "compressed-tensors is set while no weights are quantized", "set compress.format")
    unknown = [name for name in compress.formats if name not in COMPRESSED_FORMATS]
    if unknown:
        known = ", ".join(COMPRESSED_FORMATS)
        yield Problem(at, f"{', '.join(unknown)}: compressed-tensors is written for {known} only", "use modelopt")
    if compress.kv_cache != "none":
        yield Problem("compress.kv_cache", f"{compress.kv_cache}: compressed-tensors is written without KV scales",
                      "use none, or checkpoint: modelopt")  # fmt: skip
    kind = settings.recipe.runtime.kind
    if kind != "embedded":
        # NVIDIA/TensorRT-LLM, tensorrt_llm/_torch/model_config.py @008e0af8, load_hf_quant_config: INT4 of
        # compressed-tensors has no branch; our conversion for engines reads ModelOpt's form.
        yield Problem(at, f"compressed-tensors: the runtime {kind} reads ModelOpt's form", "use modelopt")


def group_format(settings: Settings) -> str:
    """A format whose groups the recipe sizes, if the recipe has one; else what `compress.format` says."""
    formats = settings.recipe.compress.formats
    return next(filter(takes_group, formats), formats[0] if formats else "none")
