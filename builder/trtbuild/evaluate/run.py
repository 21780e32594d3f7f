"""Measure an engine against the original model on held-out text.

The engine is the exported checkpoint, read and executed by the embedded runtime, so that a mistake of the export shows.
The original is run by Transformers in float32. Both see the same windows, one at a time; no logits are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trtbuild.compress.textdata import HeldoutSpec, Samples, heldout_windows
from trtbuild.errors import ArtifactError
from trtbuild.evaluate.metrics import Quality, WindowScore, score_window, summarize
from trtbuild.evaluate.reference import Reference
from trtbuild.runtime import Engine, EngineConfig, JoinedScales, KvCacheConfig
from trtbuild.runtime.checkpoint_files import weight_files
from trtbuild.worker import Progress

_BLOCK_TOKENS = 32
_MAX_NLL = 700.0  # nats; the perplexity of more is no double


def run(request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """The evaluation step.

    Args:
        request: ``source`` and ``engine`` (directories), ``tokens`` (at least so many predictions), ``length`` (of them
            in a window), ``data`` (held-out file or None), ``device``, ``trust_remote_code``; optionally
            ``calibration`` (``data``, ``column``, ``split`` of that text), ``kv_cache_dtype``, ``compute_dtype`` and
            ``weights`` to name the numerics instead of reading engine.json, and ``joined_scales`` (the fields of
            `JoinedScales`) where another engine will join projections.
        progress: called with (windows done, windows, what).

    Raises:
        RecipeError: the held-out text is wrong, too short or calibration text.
        ArtifactError: a checkpoint cannot be loaded, or the engine's numbers are not finite.
        CompatibilityError: the embedded engine does not run this model.
    """
    source, engine_dir = Path(request["source"]), Path(request["engine"])
    trust = bool(request.get("trust_remote_code", False))
    samples = heldout_windows(_heldout_spec(request), engine_dir, trust_remote_code=trust)
    total = len(samples.input_ids)
    config = _engine_config(request, engine_dir, length=len(samples.input_ids[0]) - 1)
    progress(0, total, "loading the engine and the original model")
    joined = JoinedScales(**request["joined_scales"]) if request.get("joined_scales") else None
    with Engine.load(engine_dir, config=config, joined=joined) as engine:
        facts = engine.facts
        reference = Reference(source, device=facts.device, trust_remote_code=trust)
        scores: list[WindowScore] = []
        for number, window in enumerate(samples.input_ids, start=1):
            scores.append(_score(reference, engine, window, number))
            progress(number, total, "windows evaluated")
    kinds = f"{facts.weights} weights, {facts.kv_cache_dtype} KV cache"
    arithmetic = f"embedded engine, {facts.compute_dtype} on {facts.device}, {kinds}{_how_joined(joined)}"
    return _result(summarize(scores), samples, arithmetic) | {
        "bytes": {"reference": _weight_bytes(source), "engine": _weight_bytes(engine_dir)}
    }


def _how_joined(joined: JoinedScales | None) -> str:
    """What was done to the checkpoint's scales before it was measured."""
    if joined is None:
        return ""
    if not joined.layers:
        return "; keys and values with the larger of their scales, as the runtime has them"
    layers = "query, key and value, gate and up" if joined.gate_up else "query, key and value, gate and up of experts"
    cache = "; keys and values with the larger of their scales" if joined.kv_cache else ""
    return (
        f"; scales of joined projections ({layers}) brought to the largest as the runtime does at load, codes rounded "
        f"again through {joined.intermediate}{cache}"
    )


def _heldout_spec(request: Mapping[str, Any]) -> HeldoutSpec:
    calibration = request.get("calibration") or {}
    return HeldoutSpec(
        data=_path(request.get("data")),
        tokens=request["tokens"],
        length=request["length"],
        calibration=_path(calibration.get("data")),
        calibration_column=calibration.get("column"),
        calibration_split=calibration.get("split"),
    )


def _engine_config(request: Mapping[str, Any], engine_dir: Path, *, length: int) -> EngineConfig:
    """The engine's numerics with limits that fit one window: limits change no logit, but memory and speed.

    A request that names the numerics is also answered for a checkpoint that no embedded engine.json lies beside.
    """
    if "kv_cache_dtype" in request:
        names = ("device", "compute_dtype", "weights", "trust_remote_code")
        given = {name: request[name] for name in names if name in request}
        config = EngineConfig(kv_cache=KvCacheConfig(dtype=request["kv_cache_dtype"]), **given)
    else:
        config = replace(EngineConfig.read(engine_dir), device=request.get("device", "auto"))
    blocks = -(-(length + 1) // _BLOCK_TOKENS) + 1
    cache = replace(
        config.kv_cache, tokens_per_block=_BLOCK_TOKENS, max_tokens=blocks * _BLOCK_TOKENS, enable_block_reuse=False
    )
    return replace(
        config,
        max_batch_size=1,
        max_num_tokens=length,
        max_seq_len=max(config.max_seq_len, length + 1),
        enable_chunked_prefill=True,
        kv_cache=cache,
    )


def _score(reference: Reference, engine: Engine, window: tuple[int, ...], number: int) -> WindowScore:
    read = window[:-1]
    expected = reference.logits(read)
    found = engine.logits(read).to(expected.device)
    if found.shape != expected.shape:
        what = f"the engine gives logits of shape {list(found.shape)}, the original model {list(expected.shape)}"
        raise ArtifactError(what, "the two are not the same model: build again")
    with torch.inference_mode():
        score = score_window(expected, found, torch.tensor(window[1:], device=expected.device))
    if not (bool(found.isfinite().all()) and score.engine_nll < _MAX_NLL):
        raise ArtifactError(
            f"the engine's probabilities are not finite in window {number} of the held-out text",
            "the compressed weights or scales are unusable: use another format, or other calibration text",
        )
    return score


def _result(quality: Quality, samples: Samples, arithmetic: str) -> dict[str, Any]:
    windows, length = len(samples.input_ids), len(samples.input_ids[0]) - 1
    return {
        "tokens": windows * length,
        "perplexity": {
            "reference": quality.reference_perplexity,
            "engine": quality.engine_perplexity,
            "ratio": quality.perplexity_ratio.value,
            "ratio_standard_error": _number(quality.perplexity_ratio.standard_error),
        },
        "kl_divergence": {
            "mean": quality.kl_divergence.value,
            "standard_error": _number(quality.kl_divergence.standard_error),
        },
        "top1_agreement": {
            "share": quality.top1_agreement.value,
            "standard_error": _number(quality.top1_agreement.standard_error),
        },
        "data": {
            "source": samples.source,
            "windows": windows,
            "predictions_per_window": length,
            "documents": samples.documents,
            "token_digest": samples.digest,
        },
        "how": (
            f"{arithmetic}, against Transformers in float32 on the original checkpoint; same windows of held-out text; "
            f"KL divergence is KL(original || engine), nats per token; standard errors are over the {windows} windows, "
            "that of the ratio by the delta method on the mean difference of log-likelihood"
        ),
    }


def _number(value: float) -> float | None:
    """JSON has no NaN: a standard error that one window cannot give is null."""
    return None if math.isnan(value) else value


def _weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in weight_files(directory))


def _path(value: str | None) -> Path | None:
    return Path(value) if value else None
