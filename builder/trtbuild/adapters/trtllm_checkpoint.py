"""The rules by which TensorRT-LLM's PyTorch backend takes a checkpoint, as checks on the files, tensor by tensor.

Only headers and the scales of one number are read. Rules: NVIDIA/TensorRT-LLM, tensorrt_llm/_torch/modules/linear.py
@ed53795b33fc139493f762a1c6c53f691cf52d38 (what each linear method loads) and tensorrt_llm/_torch/model_config.py
@008e0af8 (how quantization is recognized). `trtllm_fused` has the rules on projections that become one layer, also in
experts and where the file has one matrix for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from trtbuild.adapters import trtllm_fused
from trtbuild.adapters import trtllm_tensors as rules
from trtbuild.checkpoint_files import CheckpointFiles
from trtbuild.errors import ArtifactError, Problem
from trtbuild.format_support import Part, recipe_name, refused_flow
from trtbuild.model import read_tensors
from trtbuild.releases import find_release
from trtbuild.support import MIXED, refused_format, sm_version

HF_QUANT_CONFIG = "hf_quant_config.json"
_KV_CACHES = ("FP8", "NVFP4")
# quantization/modelopt_config.py @2edf354d: ModelOpt's name of a format that has another one here.
_ALIASES = {"fp8_pb_wo": "FP8_BLOCK_SCALES"}


@dataclass(frozen=True, slots=True)
class Layout:
    """What of a plan decides whether a checkpoint fits: how it is divided, and the GPU, if it is known."""

    tensor_parallel_size: int = 1
    attention_dp: bool = False
    gpu: str | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any], *, gpu: str | None) -> Layout:
        """The layout of a planned engine step."""
        return cls(
            tensor_parallel_size=values.get("runtime.tensor_parallel_size", 1),
            attention_dp=values.get("runtime.enable_attention_dp", False),
            gpu=gpu,
        )


@dataclass(frozen=True, slots=True)
class CheckpointCheck:
    """One rule: what was looked at, and every problem found."""

    name: str
    problems: tuple[str, ...] = ()
    detail: str = ""


def check(files: CheckpointFiles, version: str, layout: Layout) -> list[CheckpointCheck]:
    """Whether TensorRT-LLM `version` would take the checkpoint; every rule reports.

    Raises:
        ArtifactError: a file of the checkpoint is missing or damaged.
    """
    config = _json(files, "config.json")
    beside = _json(files, HF_QUANT_CONFIG)
    found, wrong = recognize(config, beside)
    recognized = f"{found.algo or 'not quantized'}, KV cache {found.kv_algo or 'not quantized'}"
    checks = [CheckpointCheck("recognition", tuple(wrong), recognized)]
    if wrong:
        return checks
    tensors = {tensor.name: tensor for tensor in read_tensors(files)}
    reader = rules.Reader(files, tensors)
    linears = rules.linears(tensors)

    def divided(layers: Iterable[rules.Linear], quantized: rules.Quantized) -> rules.Found:
        return rules.divisions(layers, quantized, layout.tensor_parallel_size, layout.attention_dp)

    steps: list[tuple[str, Callable[[], rules.Found]]] = [
        ("packing", lambda: _by_format(linears, found, rules.packing)),
        ("excluded modules", lambda: rules.exclusions(linears, found)),
        ("scales", lambda: rules.scales(linears, reader)),
        ("fused projections", lambda: _by_format(linears, found, partial(trtllm_fused.fused, reader=reader))),
        ("AWQ input scales", lambda: _by_format(linears, found, trtllm_fused.pre_quant_scales)),
        ("KV cache scales", lambda: rules.kv_scales(tensors, found, reader)),
        ("tensor parallel", lambda: _by_format(linears, found, divided)),
    ]
    if found.layers:
        steps.append(("formats of joined projections", lambda: trtllm_fused.same_formats(linears, found)))
    for name, step in steps:
        problems, detail = step()
        checks.append(CheckpointCheck(name, tuple(problems), detail))
    return [*checks, _release(found, version), _gpu(found, version, layout)]


def _by_format(
    linears: Iterable[rules.Linear],
    found: rules.Quantized,
    rule: Callable[[list[rules.Linear], rules.Quantized], rules.Found],
) -> rules.Found:
    """A rule on the layers of each format of the checkpoint."""
    results = [rule(layers, quantized) for quantized, layers in found.split(linears)]
    return [problem for problems, _ in results for problem in problems], "; ".join(detail for _, detail in results)


def recognize(config: Mapping[str, Any], beside: Mapping[str, Any]) -> tuple[rules.Quantized, list[str]]:
    """How the checkpoint says it is quantized, and why TensorRT-LLM would not understand it.

    ``hf_quant_config.json`` in its nested shape is understood by every version; without it, newer ones read the
    ``quantization_config`` of ``config.json``.
    """
    inline = config.get("quantization_config")
    if not beside and not isinstance(inline, dict):
        return rules.Quantized(), []
    nested = beside.get("quantization")
    if not isinstance(nested, dict):
        where = f"{HF_QUANT_CONFIG} has no section `quantization`" if beside else f"{HF_QUANT_CONFIG} is missing"
        return rules.Quantized(), [f"{where}: only newer releases read quantization from config.json alone"]
    producer = beside.get("producer")
    problems = []
    if not (isinstance(producer, dict) and producer.get("name") == "modelopt"):
        problems.append(f"{HF_QUANT_CONFIG}: producer.name is not modelopt, so it is not recognized")
    found = rules.Quantized(
        algo=_ALIASES.get(str(nested.get("quant_algo")), nested.get("quant_algo")),
        kv_algo=nested.get("kv_cache_quant_algo"),
        group_size=nested.get("group_size"),
        exclude=tuple(nested.get("exclude_modules") or ()),
        layers=_layers(nested) if nested.get("quant_algo") == MIXED else {},
    )
    if found.algo == MIXED and not found.layers:
        problems.append(f"{HF_QUANT_CONFIG}: {MIXED}, but quantized_layers names no layer")
    if found.algo is None:
        # ValueError in llmapi/llm_utils.py (@0066b2a5), also where only the KV cache is quantized.
        problems.append(f"{HF_QUANT_CONFIG}: names no quant_algo, which TensorRT-LLM requires of this file")
    named: set[str | None] = {layer.algo for layer in found.layers.values()} or {found.algo}
    for algo in sorted(str(name) for name in named if name is not None and name not in rules.LAYOUTS):
        known = ", ".join(sorted(rules.LAYOUTS))
        problems.append(
            f"{HF_QUANT_CONFIG}: quant_algo {algo} has no linear layer in TensorRT-LLM's LLM API, only {known}"
        )
    if found.kv_algo not in (None, *_KV_CACHES):
        known = " or ".join(_KV_CACHES)
        problems.append(f"{HF_QUANT_CONFIG}: kv_cache_quant_algo {found.kv_algo} is not {known}")
    problems += _disagreement(found, inline)
    return found, problems


def _layers(nested: Mapping[str, Any]) -> dict[str, rules.Quantized]:
    """The format of each layer, as tensorrt_llm/_torch/model_config.py @008e0af8 reads `quantized_layers`."""
    listed = nested.get("quantized_layers")
    entries = listed if isinstance(listed, dict) else {}
    return {
        name: rules.Quantized(entry.get("quant_algo"), nested.get("kv_cache_quant_algo"), entry.get("group_size"))
        for name, entry in entries.items()
    }


def _disagreement(found: rules.Quantized, inline: Any) -> list[str]:
    """Where the two files name different algorithms: upstream warns, and tools that read the other one are misled."""
    if not isinstance(inline, dict):
        return []
    named = _ALIASES.get(str(inline.get("quant_algo")), inline.get("quant_algo"))
    if named is not None and named != found.algo:
        return [f"config.json names quant_algo {named}, {HF_QUANT_CONFIG} {found.algo}"]
    return []


def _release(found: rules.Quantized, version: str) -> CheckpointCheck:
    """Whether the LLM API of this release has the formats at all."""
    release = find_release(version, allow_unknown=True)
    if isinstance(release, Problem):
        return CheckpointCheck("release", (f"TensorRT-LLM {version} is in no table",))
    parts: list[tuple[Part, str | None]] = [("kv_cache", found.kv_algo)]
    parts = [("weights", algo) for algo in _algos(found)] + parts
    reasons = [
        f"{algo}: {why}"
        for part, algo in parts
        if algo is not None and (why := refused_flow(part, recipe_name(part, algo), "llm-api", release.line))
    ]
    return CheckpointCheck("release", tuple(reasons), f"TensorRT-LLM {version}")


def _algos(found: rules.Quantized) -> list[str | None]:
    """The formats of layers."""
    return [*sorted({str(layer.algo) for layer in found.layers.values()})] or [found.algo]


def _gpu(found: rules.Quantized, version: str, layout: Layout) -> CheckpointCheck:
    if layout.gpu is None:
        return CheckpointCheck("GPU", (), "target.gpu is not set: not checked")
    sm = sm_version(layout.gpu)
    release = find_release(version, allow_unknown=True)
    if sm is None or isinstance(release, Problem):
        return CheckpointCheck("GPU", (f"{layout.gpu} with TensorRT-LLM {version} is in no table",))
    wanted = _algos(found) + ([f"kv:{found.kv_algo}"] if found.kv_algo else [])
    reasons = [reason for algo in wanted if (reason := refused_format(release.line, algo, sm)) is not None]
    return CheckpointCheck("GPU", tuple(reasons), f"{layout.gpu}, SM{sm}")


def _json(files: CheckpointFiles, name: str) -> dict[str, Any]:
    if name not in files.names_and_sizes():
        return {}
    try:
        value = json.loads(files.read(name))
    except ValueError as error:
        raise ArtifactError(f"{files.where}: {name} is not JSON ({error})", "build the package again") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{files.where}: {name} is not a mapping", "build the package again")
    return value
